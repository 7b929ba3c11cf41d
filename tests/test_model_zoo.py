"""The model zoo is what the configs, the metafiles and the tables of variants say."""

import json
import re

import model_zoo
import pytest
import yaml

MODELS = [model for path in model_zoo.METAFILES for model in yaml.safe_load(path.read_text())['Models']]
RELEASED = [model for model in MODELS if 'Weights' in model]


@pytest.mark.slow
def test_page_shows_what_configs_and_metafiles_say():
    assert model_zoo.PAGE.read_text() == model_zoo.page(), 'write it anew: python tests/model_zoo.py'


def test_page_lists_each_model_of_the_index_once():
    listed = re.findall(r'^\| \[`([\w-]+)`\]\(\.\./(\S+)\)', model_zoo.PAGE.read_text(), re.M)
    assert listed == [(model['Name'], model['Config']) for model in MODELS]


@pytest.mark.parametrize('model', RELEASED, ids=lambda model: model['Name'])
def test_index_agrees_with_the_page_of_checkpoints(model):
    """Which somebody wrote by hand."""
    (row,) = (
        line
        for line in (model_zoo.ROOT / 'docs/checkpoints.md').read_text().splitlines()
        if line.startswith(f'| `{model["Weights"].rpartition("/")[2]}` | `{model["Config"]}`')
    )
    figures = {name: value for result in model['Results'] for name, value in result['Metrics'].items()}
    assert row.endswith(f'| {", ".join(f"{name} {value}" for name, value in figures.items())} |')


def test_latencies_of_a_benchmark_reach_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(model_zoo, 'LATENCIES', tmp_path / 'data/latency.json')
    assert list(model_zoo.latencies()) == []
    rows = [
        {'name': name, 'batch': batch, 'route': route, 'ms': ms, 'macs': 1}
        for name, batch, route, ms in (
            ('RepViT:m0_6', 1, 'fused', 12.345),
            ('RepViT:m0_6', 1, 'roofline', 1.0),
            ('RepViT:m0_6', 8, 'fused', 99.0),
            ('FastViT:t8', 1, 'fused', 20.0),
            ('FastViT:t8', 1, 'onnxruntime', 10.0),
        )
    ]
    machine = {'processor': 'a processor', 'threads': 2, 'cores': 4, 'versions': {'torch': '2.13.0'}}
    content = {
        'command': 'python x --out-dir /y --rounds 3',
        'settings': {'size': [512, 512], 'rounds': 3},
        'machine': machine,
        'rows': rows,
    }
    (tmp_path / 'backbone.json').write_text(json.dumps(content))
    model_zoo.take_latencies(tmp_path / 'backbone.json')
    text = ''.join(model_zoo.latencies())
    assert (
        '512x512' in text
        and '3 rounds on a processor, 2 threads, torch 2.13.0' in text
        and '\npython x --rounds 3\n' in text
    )
    assert text.endswith(
        '|  | fused | onnxruntime |\n| --- | ---: | ---: |\n| RepViT m0_6 | 12.3 |  |\n| FastViT t8 | 20.0 | 10.0 |\n'
    )
