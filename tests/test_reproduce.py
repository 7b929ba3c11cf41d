"""The comparison with published figures, on a model index, checkpoints and data made for it."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from programs import TOOLS, launch, variables

from repvit_mm.datasets.shapes import write_shapes

ROOT = Path(__file__).parents[1]
CONFIGS = {
    'detector': ROOT / 'configs/det/mask_rcnn_repvit_m0_6_fpn_shapes.py',
    'segmentor': ROOT / 'configs/seg/fpn_repvit_m0_6_shapes.py',
}
sys.path.append(str(TOOLS))
launch_module, reproduce = map(importlib.import_module, ('_launch', 'reproduce'))


def write_index(folder: Path, published: dict[str, dict[str, float]], configs: dict[str, Path]) -> Path:
    """A model index like the repository's: one metafile, each metric in a result of its own."""
    models = [
        {
            'Name': name,
            'Config': os.path.relpath(configs[name], folder),
            'Results': [{'Task': 'any', 'Metrics': {metric: figure}} for metric, figure in figures.items()],
            'Weights': f'http://localhost:9/{name}.pth',
        }
        for name, figures in published.items()
    ]
    models.append({'Name': 'unreleased', 'Config': 'unreleased.py'})
    (folder / 'metafile.yml').write_text(yaml.safe_dump({'Models': models}))
    index = folder / 'index.yml'
    index.write_text('Import:\n  - metafile.yml\n')
    return index


FAKE = """
import json, sys
from pathlib import Path

config, checkpoint, option, folder, fuse = sys.argv[1:]
assert fuse == '--fuse' and option == '--work-dir' and Path(checkpoint).is_file()
plan = json.loads(Path(config).read_text())
print('testing', checkpoint)
if 'metrics' in plan:
    run = Path(folder, plan.get('run', 'run'))
    run.mkdir(parents=True)
    (run / 'run.json').write_text(json.dumps(plan['metrics']))
print('a warning', file=sys.stderr)
sys.exit(plan.get('status', 0))
"""


class TestWithAFakeLauncher:
    """In place of tools/test.py a program that does what its "config" says."""

    @pytest.fixture
    def compare(self, tmp_path, monkeypatch, capfd):
        """Runs the tool on models of the given figures and plans; returns its table, and what it exits with."""
        (tmp_path / 'test.py').write_text(FAKE)
        monkeypatch.setattr(launch_module, 'TOOLS', tmp_path)
        monkeypatch.setenv('COLUMNS', '200')

        def run(published: dict, plans: dict, *arguments: str) -> tuple[str, str]:
            for name, plan in plans.items():
                (tmp_path / f'{name}.pth').touch()
                (tmp_path / name).write_text(json.dumps(plan))
            index = write_index(tmp_path, published, {name: tmp_path / name for name in published})
            said = ''
            try:
                reproduce.main(
                    [*arguments, '--index', f'{index}', '--folder', f'{tmp_path}', '--work-dir', f'{tmp_path / "work"}']
                )
            except SystemExit as end:
                said = str(end.code)
            return capfd.readouterr().out, said

        return run

    def test_figures_within_a_tenth_are_reproduced(self, compare):
        plan = {'metrics': {'coco/bbox_mAP': 0.399, 'coco/segm_mAP': 0.371, 'coco/bbox_mAP_50': 0.6}}
        out, said = compare({'a': {'box AP': 39.8, 'mask AP': 37.2}, 'b': {'mIoU': 40.6}}, {'a': plan, 'b': MIOU})
        assert said == ''
        assert [row(line) for line in out.splitlines() if line.startswith('│')] == [
            ['a', 'box AP', '39.8', '39.90', '+0.10', 'yes'],
            ['a', 'mask AP', '37.2', '37.10', '-0.10', 'yes'],
            ['b', 'mIoU', '40.6', '40.57', '-0.03', 'yes'],
        ]

    @pytest.mark.parametrize('measured', [0.3969, 0.4, float('nan'), -1.0])
    def test_figures_beyond_a_tenth_are_not(self, compare, measured):
        out, said = compare({'a': {'box AP': 39.8}, 'b': {'mIoU': 40.6}}, {
            'a': {'metrics': {'coco/bbox_mAP': measured}}, 'b': MIOU,
        })  # fmt: skip
        assert said.startswith('a: box AP is ') and said.endswith(', published 39.8') and '\n' not in said
        rows = [row(line) for line in out.splitlines() if line.startswith('│')]
        assert [cells[-1] for cells in rows] == ['no', 'yes']

    def test_metric_that_was_not_measured_is_not_reproduced(self, compare):
        out, said = compare({'a': {'mIoU': 40.6, 'FPS': 30}}, {'a': MIOU})
        assert said == 'a: FPS is -, published 30.0'
        assert ['a', 'FPS', '30.0', '-', '-', 'no'] in [row(line) for line in out.splitlines()]

    def test_others_run_when_one_fails(self, compare):
        figures = {name: {'mIoU': 40.6} for name in ('absent', 'failing', 'silent', 'good')}
        out, said = compare(figures, {'failing': {'status': 3}, 'silent': {}, 'good': MIOU})
        absent, failing, silent = said.splitlines()
        assert absent.startswith('absent: checkpoint ') and 'absent.pth not found' in absent
        assert failing == 'failing: a warning'
        assert silent.startswith('silent: tools/test.py left no metrics in ')
        assert [row(line)[-1] for line in out.splitlines() if line.startswith('│')] == ['no', 'no', 'no', 'yes']

    def test_metrics_of_an_earlier_run_do_not_count(self, compare):
        assert compare({'a': {'mIoU': 40.6}}, {'a': MIOU})[1] == ''
        better = {'metrics': {'mIoU': 50.0}, 'run': 'again'}
        assert compare({'a': {'mIoU': 40.6}}, {'a': better})[1] == 'a: mIoU is 50.00, published 40.6'
        assert 'left no metrics' in compare({'a': {'mIoU': 40.6}}, {'a': {}})[1]

    def test_only_the_named_models_run(self, compare):
        out, said = compare({'a': {'mIoU': 40.6}, 'b': {'mIoU': 40.6}}, {'b': MIOU}, 'b')
        assert said == '' and 'a.pth' not in out

    @pytest.mark.parametrize('name', ['bb', 'unreleased'])
    def test_unknown_name_gets_the_nearest(self, compare, name):
        out, said = compare({'a': {'mIoU': 40.6}, 'b': {'mIoU': 40.6}}, {'a': MIOU}, 'a', name)
        assert said.startswith(f'{name}: no model with weights and results; the nearest is ')
        assert out == ''


MIOU = {'metrics': {'mIoU': 40.57}}


def row(line: str) -> list[str]:
    """The cells of a table's line."""
    return [cell.strip() for cell in line.strip('│').split('│')]


def test_checkpoint_that_cannot_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    index = write_index(tmp_path, {'a': {'mIoU': 40.6}}, {'a': tmp_path / 'a.py'})
    with pytest.raises(SystemExit, match=r'^a: checkpoint http://localhost:9/a\.pth cannot be downloaded'):
        reproduce.main(['--index', str(index)])


@pytest.mark.parametrize('content', [None, 'Import: [absent.yml]', 'Models: []', '- a', '{', ''])
def test_index_that_cannot_be_read(tmp_path, content):
    index = tmp_path / 'index.yml'
    if content is not None:
        index.write_text(content)
    with pytest.raises(SystemExit, match=r'^model index .*index\.yml cannot be read: .'):
        reproduce.main(['--index', str(index)])


def test_index_without_released_models(tmp_path):
    with pytest.raises(SystemExit, match='lists no model with Weights and Results'):
        reproduce.main(['--index', str(write_index(tmp_path, {}, {}))])


def test_what_several_models_lack_is_said_once(tmp_path, monkeypatch):
    """Nothing is fetched for a test that cannot run."""
    monkeypatch.setattr(reproduce, 'fetch', None)
    monkeypatch.setitem(sys.modules, 'mmpretrain', None)
    names = ['repvit_m0_9_distill_300e', 'repvit_m0_9_distill_450e']
    with pytest.raises(SystemExit) as end:
        reproduce.main([*names, '--imagenet', str(tmp_path), '--work-dir', str(tmp_path)])
    (said,) = str(end.value).splitlines()
    assert said.startswith(f'{", ".join(names)}: MMPretrain cannot be imported (') and 'pip install mmpretrain' in said


def test_our_own_index():
    """Every released model has a config and figures that a test run measures."""
    entries = reproduce.read_index(ROOT / 'model-index.yml')
    assert len(entries) == 6
    for entry in entries.values():
        assert entry.config.is_file() and entry.config.stem == entry.name
        assert entry.published and entry.published.keys() <= reproduce.METRICS.keys()


def save_random(name: str, path: Path) -> None:
    """A checkpoint of a demo config, as it is before training."""
    cfg = Config.fromfile(CONFIGS[name])
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, path)


@pytest.mark.slow
@pytest.mark.needs_ops
def test_from_end_to_end(tmp_path):
    """Real models, configs and data; published is what tools/test.py measures without fusing, but for one figure."""
    write_shapes(tmp_path / 'data/shapes', train=1, val=2, size=64, seed=0)
    measured = {}
    for name, config in CONFIGS.items():
        save_random(name, tmp_path / f'{name}.pth')
        done = launch(tmp_path, 'test.py', config, f'{name}.pth', '--work-dir', f'plain/{name}')
        assert done.returncode == 0, done.stderr[-3000:]
        (scalars,) = (tmp_path / 'plain' / name).glob('*/*.json')
        measured[name] = json.loads(scalars.read_text())
    box_ap, mask_ap = (100 * measured['detector'][f'coco/{kind}_mAP'] for kind in ('bbox', 'segm'))
    mean_iou = measured['segmentor']['mIoU']
    assert mean_iou > 0

    figures = {
        'detector': {'box AP': box_ap, 'mask AP': mask_ap + 1},
        'absent': {'box AP': 30.0},
        'segmentor': {'mIoU': mean_iou},
    }
    index = write_index(tmp_path, figures, {**CONFIGS, 'absent': CONFIGS['detector']})
    done = launch(tmp_path, 'reproduce.py', '--index', index, '--folder', '.', **variables(COLUMNS='200'))
    assert done.returncode == 1 and 'Traceback' not in done.stdout + done.stderr
    rows = [row(line) for line in done.stdout.splitlines() if line.startswith('│')]
    assert [(*cells[:2], *cells[4:]) for cells in rows] == [
        ('detector', 'box AP', '+0.00', 'yes'),
        ('detector', 'mask AP', '-1.00', 'no'),
        ('absent', 'box AP', '-', 'no'),
        ('segmentor', 'mIoU', '+0.00', 'yes'),
    ]
    # The tests of the two are programs of their own, whose output is shown.
    assert done.stdout.count('FuseOnDeployHook: fused 56 blocks') == 2
    differing, missing = done.stderr.splitlines()[-2:]
    assert differing == f'detector: mask AP is {mask_ap:.2f}, published {mask_ap + 1:.1f}'
    assert missing.startswith('absent: checkpoint absent.pth not found')
