"""The benchmark: that it measures what it says. How long anything takes is nowhere asserted."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from repvit_mm.deploy.benchmark import routes
from repvit_mm.loading import FAMILIES

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / 'tools'
sys.path.append(str(TOOLS))
benchmark = importlib.import_module('benchmark')

DETECTION = ROOT / 'configs/det/mask_rcnn_repvit_m0_6_fpn_shapes.py'
SEGMENTATION = ROOT / 'configs/seg/fpn_repvit_m0_6_shapes.py'


def test_broken_route_ends_the_run(tmp_path, monkeypatch):
    def broken(source, stack):
        return routes.Route(lambda: [2 * map_ for map_ in source.network(source.images)])

    monkeypatch.setitem(routes.ROUTES, 'fused', broken)
    with pytest.raises(SystemExit, match='route fused of RepViT:m0_6 differs'):
        benchmark.main(f'backbone m0_6 --size 64 --batch 1 --routes plain fused --out-dir {tmp_path}'.split())
    assert not list(tmp_path.iterdir())


def launch(*arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, TOOLS / 'benchmark.py', *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)


def results(folder: Path, command: str) -> dict:
    """The JSON file of a run; its picture can be read too."""
    with Image.open(folder / f'{command}.png') as picture:
        assert picture.width > 600 and len(picture.getcolors(picture.width * picture.height)) > 10
    return json.loads((folder / f'{command}.json').read_text())


# A user of the backbone alone may have neither mmcv nor the libraries that stand on it.
WITHOUT_MMCV = """
import runpy, sys
sys.modules.update(dict.fromkeys(('mmcv', 'mmdet', 'mmseg')))
sys.path.insert(0, sys.argv[1])
sys.argv = ['benchmark.py', *sys.argv[2:]]
runpy.run_module('benchmark', run_name='__main__')
"""


@pytest.mark.slow
def test_backbone_from_the_command_line_without_mmcv(tmp_path):
    routes = ['plain', 'folded', 'fused']
    command = ['backbone', 'm0_6', '--size', '64', '--rounds', '2', '--batch', '1', '2', '--routes', *routes]
    done = subprocess.run(
        [sys.executable, '-c', WITHOUT_MMCV, TOOLS, *command, '--threads', '1', '--out-dir', tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'RepViT:m0_6, 64x64, float32 on cpu' in done.stdout
    content = results(tmp_path, 'backbone')
    assert content['machine']['threads'] == 1 and content['machine']['versions']['torch'] == torch.__version__
    assert content['settings']['rounds'] == 2 and content['left_out'] == {}
    rows = content['rows']
    assert [(row['batch'], row['route']) for row in rows] == [(n, r) for n in (1, 2) for r in (*routes, 'roofline')]
    for row in rows:
        lower, upper = row['quartiles_ms']
        assert 0 < lower <= row['ms'] <= upper
        assert row['images_per_s'] == pytest.approx(1000 * row['batch'] / row['ms'])
    assert rows[3]['ms'] == pytest.approx(1e-6 * rows[3]['macs'] / rows[3]['gmacs_per_s'])
    assert rows[0]['times_first'] == rows[3]['times_roofline'] == 1
    assert rows[0]['parameters'] > rows[2]['parameters'] and rows[0]['macs'] > rows[1]['macs'] == rows[2]['macs']
    assert all(row['peak_bytes'] > 0 for row in rows[:3])


@pytest.mark.slow
def test_train_from_the_command_line(tmp_path):
    done = launch('train', 'm0_6', '--amp', '--size', '64', '96', '--rounds', '2', '--out-dir', tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = results(tmp_path, 'train')['rows']
    routes = ['plain', 'folded', 'folded, all maps kept', 'deployed']
    assert [row['route'] for row in rows] == routes + [f'{route}, mixed' for route in routes]
    saved = [row['saved_bytes'] for row in rows]
    assert all(mixed < single for single, mixed in zip(saved[:3], saved[4:7], strict=True))
    assert saved[1] < saved[2], 'what is computed again is not kept'
    assert all(row['saved_bytes'] > 0 and row['peak_bytes'] > 0 and row['ms'] > 0 for row in rows)


def test_distances_of_gradients_from_the_command_line(tmp_path, capsys):
    benchmark.main(f'train m0_6 t8 --gradients --size 32 --rounds 1 --out-dir {tmp_path}'.split())
    shown = capsys.readouterr().out
    assert 'distances from float64 in mixed precision' in shown and 'FastViT:t8' in shown
    rows = results(tmp_path, 'train')['rows']
    assert [(row['name'], row['route']) for row in rows] == [
        (name, route) for name in ('RepViT:m0_6', 'FastViT:t8') for route in ('plain', 'folded')
    ]
    assert all(0 < row[loss] < 1 for row in rows for loss in ('drawn', 'squares'))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['backbone', 'm1_2'], 'arch m1_2 is not registered: the nearest is m1_'),
        (['train', 'RepVit:m1_1'], 'arch RepVit:m1_1 is not registered: the nearest is RepViT:m1_1'),
        (['backbone', '--size', '16'], '--size 16: expected height and width, at least 32 each'),
        (['backbone', '--size', '64', '64', '64'], '--size 64 64 64: expected height and width'),
        (['train', '--rounds', '0'], '--rounds: expected a positive number'),
        (
            ['backbone', 'm0_6', '--size', '64', '--dtype', 'bfloat16', '--routes', 'openvino'],
            'none of the routes can be taken',
        ),
        (['train', '--out-dir', f'{DETECTION}/out'], 'cannot be made'),
        (['model', 'absent.py'], 'config absent.py not found'),
        pytest.param(
            ['model', str(DETECTION), '--train', '--size', '64'],
            'trains with live statistics',
            marks=pytest.mark.needs_ops,
        ),
        pytest.param(
            ['backbone', '--device', 'cuda'],
            '--device cuda: torch finds no GPU here; --device cpu measures the processor',
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU'),
        ),
    ],
)
def test_one_line_on_what_cannot_be_measured(arguments, message, tmp_path):
    command, *rest = arguments
    with pytest.raises(SystemExit) as end:
        benchmark.main([command, '--out-dir', str(tmp_path), *rest])
    assert message in str(end.value.code) and '\n' not in str(end.value.code)


def test_routes_of_a_whole_model_are_those_that_run_here(capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(['model', str(SEGMENTATION), '--routes', 'plain', 'coreml'])
    assert end.value.code == 2 and "invalid choice: 'coreml'" in capsys.readouterr().err


def test_without_names_all_of_published_accuracy_are_measured():
    names = benchmark.choose([])
    assert names == [f'{cls.__name__}:{arch}' for cls in FAMILIES for arch in cls.top1]
    assert {'RepViT:m0_6', 'RepViT:m2_3'} <= set(names) and 'RepViT:m1' not in names
    assert benchmark.choose(['m1_1', 'RepViT:m1_1', 'm2']) == ['RepViT:m1_1', 'RepViT:m2']


@pytest.mark.slow
@pytest.mark.needs_ops
def test_training_of_a_whole_model(tmp_path):
    options = ['--batch', '2', '--cfg-options', 'model.backbone.norm_eval=True']
    done = launch('model', DETECTION, '--train', '--size', '64', '96', '--rounds', '1', '--out-dir', tmp_path, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = results(tmp_path, 'model')['rows']
    assert [row['route'] for row in rows] == ['plain', 'folded']
    assert all(row['ms'] > 0 and row['peak_bytes'] > 0 and row['saved_bytes'] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.needs_ops
def test_inference_of_a_whole_model(tmp_path):
    pytest.importorskip('onnxruntime')
    wanted = ['plain', 'fused', 'onnxruntime']
    command = ['model', SEGMENTATION, '--size', '64', '96', '--rounds', '1', '--out-dir', tmp_path, '--routes']
    done = launch(*command, *wanted)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = results(tmp_path, 'model')['rows']
    assert [row['route'] for row in rows] == wanted
    assert all(row['ms'] > 0 and row['process_bytes'] > 0 for row in rows)
    # Without torch in it, the file's process is smaller.
    assert rows[2]['process_bytes'] < rows[1]['process_bytes'] and 'peak_bytes' not in rows[2]
