"""The model index and its metafiles say what the configs are: mim and other tools of the model zoo list by them."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
METAFILES = [ROOT / path for path in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']]
FILES = {path: yaml.safe_load(path.read_text()) for path in METAFILES}
MODELS = {model['Name']: (path, model) for path, file in FILES.items() for model in file['Models']}
RECIPES = [path for path in (ROOT / 'configs').glob('[ds]e*/*.py') if path.stem.endswith(('_coco', '_40k'))]
TASKS = {'det': {'Object Detection', 'Instance Segmentation'}, 'seg': {'Semantic Segmentation'}}


def test_every_folder_of_configs_has_its_metafile():
    assert {path.parent for path in METAFILES} == {path.parent for path in RECIPES}


def test_every_recipe_is_listed_once_under_its_own_name():
    listed = [model['Name'] for file in FILES.values() for model in file['Models']]
    assert len(listed) == len(set(listed))
    assert {path.stem for path in RECIPES} <= set(listed)


@pytest.mark.parametrize('name', MODELS)
def test_a_model_s_entry(name):
    path, model = MODELS[name]
    collections = {entry['Name']: entry for entry in FILES[path]['Collections']}
    config = ROOT / model['Config']
    assert config.is_file() and config.stem == name and config.parent == path.parent
    family = next(family for family in ('RepViT', 'FastViT', 'MobileOne') if f'_{family.lower()}_' in name)
    assert family in collections[model['In Collection']]['Metadata']['Architecture']
    assert 'Parameters' in model['Metadata']
    assert model['Metadata'].keys() <= {'Epochs', 'Iterations', 'Training Memory (GB)', 'Parameters', 'FLOPs'}
    assert all(result['Task'] in TASKS[path.parent.name] for result in model.get('Results', ()))
    assert all(0 < value < 100 for result in model.get('Results', ()) for value in result['Metrics'].values())
    # Weights without figures, or figures without weights, are nothing to reproduce.
    assert ('Weights' in model) == ('Results' in model)
    assert model.get('Weights', 'https://').startswith('https://')


@pytest.mark.parametrize('path', METAFILES, ids=lambda path: path.parent.name)
def test_collections(path):
    for collection in FILES[path]['Collections']:
        assert collection.keys() >= {'Name', 'Metadata', 'Paper', 'README'}
        assert (ROOT / collection['README']).is_file()
        assert collection['Paper']['URL'].startswith('https://arxiv.org/abs/')
        assert any(model['In Collection'] == collection['Name'] for model in FILES[path]['Models'])


@pytest.mark.needs_ops
@pytest.mark.parametrize('name', MODELS)
def test_lengths_are_those_of_the_configs(name):
    from mmengine.config import Config

    if 'yolov5' in name:
        pytest.importorskip('mmyolo', reason='MMYOLO, which needs mmcv below 2.1, is not installed')
    _, model = MODELS[name]
    loop = Config.fromfile(ROOT / model['Config']).train_cfg
    expected = {'Epochs': loop.get('max_epochs'), 'Iterations': loop.get('max_iters')}
    assert {key: value for key, value in model['Metadata'].items() if key in expected} == {
        key: value for key, value in expected.items() if value is not None
    }
