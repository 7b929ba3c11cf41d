"""The benchmark: that it measures what it says. How long anything takes is nowhere asserted."""

import copy
import importlib
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from helpers import SMALL, largest_error, randomize
from PIL import Image
from torch import nn

from repvit_mm import RepViT, switch_to_deploy
from repvit_mm.deploy.timing import interleave
from repvit_mm.loading import FAMILIES
from repvit_mm.reparam import reparam_blocks

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / 'tools'
sys.path.append(str(TOOLS))
_bench, _routes, benchmark = map(importlib.import_module, ('_bench', '_routes', 'benchmark'))

CPU = torch.device('cpu')
DETECTION = ROOT / 'configs/det/mask_rcnn_repvit_m0_6_fpn_shapes.py'
SEGMENTATION = ROOT / 'configs/seg/fpn_repvit_m0_6_shapes.py'


def small_source() -> '_routes.Source':
    cls, arch = SMALL['repvit']
    return _routes.Source('RepViT:small', randomize(cls(arch)).eval(), torch.randn(2, 3, 64, 64))


# G at 224x224, from the authors' README; their classifiers add less than 0.001.
@pytest.mark.parametrize(
    ('arch', 'published'), [('m0_9', 0.8), ('m1_0', 1.1), ('m1_1', 1.3), ('m1_5', 2.3), ('m2_3', 4.5)]
)
def test_macs_are_the_published_ones(arch, published):
    network = switch_to_deploy(RepViT(arch).eval())
    assert round(_bench.count_macs(network, torch.zeros(1, 3, 224, 224)) / 1e9, 1) == published


def test_macs_and_parameters_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 1, 1, groups=8)).eval()
    assert _bench.count_macs(network, torch.zeros(1, 3, 8, 8)) == 16 * 8 * 27 + 16 * 8 * 9
    assert _bench.count_parameters(network) == (8 * 27 + 8) + 16 + (8 * 9 + 8)


def test_matrix_product_has_as_many_multiply_accumulates(monkeypatch):
    monkeypatch.setitem(_bench.MATRIX_SIZE, 'cpu', 64)
    product, macs = _bench.matrix_product(CPU, torch.float32)
    assert product().shape == (64, 64) and macs == 64**3


class TestInterleave:
    def test_turns_rotate_and_the_second_run_of_each_is_timed(self):
        now, ran = [0.0], []

        def candidate(name, durations):
            remaining = iter(durations)

            def run():
                ran.append(name)
                now[0] += next(remaining)

            return run

        # Two runs that do not count, then three turns of an untimed (9) and a timed run.
        candidates = {'a': candidate('a', [9, 9, 9, 1, 9, 5, 9, 3]), 'b': candidate('b', [9, 9, 9, 2, 9, 2, 9, 2])}
        measured = interleave(candidates, 3, CPU, clock=lambda: now[0])
        assert measured == {'a': (3, 2, 4), 'b': (2, 2, 2)}
        assert ''.join(ran) == 'bbaa' + 'aabb' + 'bbaa' + 'aabb'

    def test_one_round(self):
        ticks = iter(range(100))
        assert interleave({'a': lambda: None}, 1, CPU, clock=lambda: next(ticks)) == {'a': (1, 1, 1)}


class TestMemory:
    def test_saved_for_backward_by_hand(self):
        """The convolution keeps its input, GELU the convolution's output, the sum of two views one tensor once."""
        network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU())
        image = torch.randn(2, 3, 8, 8)
        numbers = image.numel() + 2 * 4 * 8 * 8
        assert _bench.saved_bytes(lambda: network(image).sum().backward(), network) == 4 * numbers

        def views():
            hidden = network(image)
            (hidden[:, :2] * hidden[:, 2:]).sum().backward()

        assert _bench.saved_bytes(views, network) == 4 * (numbers + 2 * 4 * 8 * 8)

    def test_frozen_block_saves_less_than_its_branches(self):
        network = randomize(RepViT(SMALL['repvit'][1], norm_eval=True)).train()
        images = torch.randn(2, 3, 128, 128)
        with ExitStack() as stack:
            plain = _routes.plain_copy(network, stack)
            saved = [
                _bench.saved_bytes(lambda model=model: sum(x.sum() for x in model(images)).backward(), model)
                for model in (plain, network)
            ]
        assert saved[1] < saved[0]

    def test_peak_by_hand(self):
        def run():
            first = torch.zeros(1000)
            second = first.neg()
            del first
            return second.neg()

        # Two tensors of 4000 bytes live at once, never three.
        assert _bench.peak_bytes(run, CPU) == 8000


class TestRoutes:
    @pytest.mark.parametrize('name', ['plain', 'folded', 'fused_plain', 'fused'])
    def test_each_gives_the_maps(self, name):
        source = small_source()
        with ExitStack() as stack, torch.no_grad():
            expected = _routes.plain_copy(source.network, stack)(source.images)
            route = _routes.ROUTES[name](source, stack)
            _routes.check(name, route, expected, 1e-4)
            blocks = reparam_blocks(route.network)
            assert bool(blocks) == (name in ('plain', 'folded'))
            assert all(block.folds == (name != 'plain') for block in blocks)

    @pytest.mark.parametrize('name', ['onnxruntime', 'openvino'])
    def test_libraries_give_the_maps(self, name):
        pytest.importorskip(name)
        source = small_source()
        with ExitStack() as stack, torch.no_grad():
            _routes.check(name, _routes.ROUTES[name](source, stack), source.network(source.images), 1e-4)
            half = _routes.Source(source.name, source.network, source.images.half())
            with pytest.raises(_routes.LeftOut, match='float32 only'):
                _routes.ROUTES[name](half, stack)

    def test_library_that_is_absent_or_broken(self, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / 'broken_library.py').write_text("raise RuntimeError('it does not fit this torch at all')")
        with pytest.raises(_routes.LeftOut, match='does not fit this torch'):
            _routes.optional('broken_library')
        with pytest.raises(_routes.LeftOut, match='absent_library'):
            _routes.optional('absent_library')

    def test_route_that_differs_is_refused(self):
        source = small_source()
        with ExitStack() as stack, torch.no_grad():
            expected = source.network(source.images)
            fused = _routes.fused(source, stack)
            conv = next(module for module in fused.network.modules() if isinstance(module, nn.Conv2d))
            conv.bias += 0.1
            with pytest.raises(_routes.WrongRoute, match='route fused differs'):
                _routes.check('fused', fused, expected, 1e-4)
            conv.bias.fill_(float('nan'))
            with pytest.raises(_routes.WrongRoute, match='by nan'):
                _routes.check('fused', fused, expected, 1e-4)
            with pytest.raises(_routes.WrongRoute, match='3 maps instead of 4'):
                _routes.check('few', _routes.Route(lambda: expected[:3]), expected, 1e-4)

    def test_broken_route_ends_the_run(self, tmp_path, monkeypatch):
        def broken(source, stack):
            return _routes.Route(lambda: [2 * map_ for map_ in source.network(source.images)])

        monkeypatch.setitem(_routes.ROUTES, 'fused', broken)
        with pytest.raises(SystemExit, match='route fused of RepViT:m0_6 differs'):
            benchmark.main(f'backbone m0_6 --size 64 --batch 1 --routes plain fused --out-dir {tmp_path}'.split())
        assert not list(tmp_path.iterdir())

    def test_wrong_gradients_are_refused(self):
        network = randomize(RepViT(SMALL['repvit'][1], norm_eval=True)).train()
        networks = {'plain': network, 'folded': copy.deepcopy(network)}
        images = torch.randn(1, 3, 64, 64)
        benchmark.check_gradients('small', networks, images)
        networks['folded'].stages[1][1].token_mixer.bn.weight.register_hook(lambda gradient: 1.01 * gradient)
        with pytest.raises(_routes.WrongRoute, match=r'stages\.1\.1\.token_mixer\.bn\.weight differs by 1\.0e-02'):
            benchmark.check_gradients('small', networks, images)


def test_weights_like_trained_ones():
    """No branch is hidden: a change in the last block of all shows in the maps."""
    network = RepViT(SMALL['repvit'][1])
    images = torch.randn(2, 3, 128, 128)
    _bench.make_trained_like(network, images)
    assert not network.training
    with torch.no_grad():
        before = network(images)
        network.stages[0][0].channel_mixer.project.bn.weight.mul_(1.1)
        assert largest_error(network(images), before) > 1e-3
        assert all(0.1 < map_.std() < 10 for map_ in before)


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
    done = launch('train', 'm0_6', '--size', '64', '96', '--rounds', '2', '--out-dir', tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = results(tmp_path, 'train')['rows']
    assert [row['route'] for row in rows] == ['plain', 'folded']
    assert all(row['saved_bytes'] > 0 and row['peak_bytes'] > 0 and row['ms'] > 0 for row in rows)


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
    ],
)
def test_one_line_on_what_cannot_be_measured(arguments, message, tmp_path):
    command, *rest = arguments
    with pytest.raises(SystemExit) as end:
        benchmark.main([command, '--out-dir', str(tmp_path), *rest])
    assert message in str(end.value.code) and '\n' not in str(end.value.code)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu():
    done = launch('backbone', '--device', 'cuda')
    assert done.returncode == 1
    assert done.stderr == '--device cuda: torch finds no GPU here; --device cpu measures the processor\n'


def test_without_names_all_of_published_accuracy_are_measured():
    names = benchmark.choose([])
    assert names == [f'{cls.__name__}:{arch}' for cls in FAMILIES for arch in cls.top1]
    assert {'RepViT:m0_6', 'RepViT:m2_3'} <= set(names) and 'RepViT:m1' not in names
    assert benchmark.choose(['m1_1', 'RepViT:m1_1', 'm2']) == ['RepViT:m1_1', 'RepViT:m2']


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.slow
@pytest.mark.needs_ops
def test_whole_models(tmp_path, train):
    options = ['--train', '--batch', '2', '--cfg-options', 'model.backbone.norm_eval=True'] if train else []
    done = launch(
        'model', DETECTION, SEGMENTATION, '--size', '64', '96', '--rounds', '1', '--out-dir', tmp_path, *options
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = results(tmp_path, 'model')['rows']
    routes = ['plain', 'folded'] if train else ['plain', 'folded', 'fused']
    names = [f'{config.stem} 64x96' for config in (DETECTION, SEGMENTATION)]
    assert [(row['name'], row['route']) for row in rows] == [(name, route) for name in names for route in routes]
    assert all(row['ms'] > 0 and row['peak_bytes'] > 0 and (not train or row['saved_bytes'] > 0) for row in rows)
