"""The benchmark's routes of a backbone: each gives its maps, and one that does not is refused."""

import copy
from contextlib import ExitStack

import pytest
import torch
from helpers import SMALL, randomize
from torch import nn

from repvit_mm import RepViT, switch_to_deploy
from repvit_mm.compat.pytorch import multiplies_bfloat16
from repvit_mm.deploy.benchmark.routes import (
    FILES,
    ROUTES,
    LeftOut,
    Route,
    Source,
    WrongRoute,
    check,
    optional,
    plain_copy,
)
from repvit_mm.deploy.benchmark.training import check_gradients
from repvit_mm.deploy.verify import TOLERANCES, relative_error
from repvit_mm.reparam import reparam_blocks

LIBRARIES = {
    'onnxruntime_int8': 'onnxruntime',
    'openvino_bf16': 'openvino',
    'openvino_int8': 'nncf',
    'torchscript': 'torch',
    'torch_export': 'torch',
}
"""Name of a route -> its library, where they are called otherwise."""


SLOW = ('openvino_bf16', 'openvino_int8', 'executorch')


def small_source() -> Source:
    cls, arch = SMALL['repvit']
    return Source('RepViT:small', randomize(cls(arch)).eval(), torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize('name', ['plain', 'folded', 'fused_plain', 'fused', 'fused_modules'])
def test_each_gives_the_maps(name):
    source = small_source()
    with ExitStack() as stack, torch.no_grad():
        expected = plain_copy(source.network, stack)(source.images)
        route = ROUTES[name](source, stack)
        check(name, route, expected, 1e-4)
        blocks = reparam_blocks(route.network)
        assert bool(blocks) == (name in ('plain', 'folded'))
        assert all(block.folds == (name != 'plain') for block in blocks)


def test_fused_in_bfloat16(monkeypatch):
    """Kernels are folded before they are rounded: that is as near as bfloat16 comes."""
    source = small_source()
    with ExitStack() as stack, torch.no_grad():
        expected = plain_copy(source.network, stack)(source.images)
        if multiplies_bfloat16():
            route = ROUTES['fused_bf16'](source, stack)
            check('fused_bf16', route, expected, 0.0)  # it has its own tolerance
            assert {parameter.dtype for parameter in route.network.parameters()} == {torch.bfloat16}
            assert next(source.network.parameters()).dtype is torch.float32
            rounded_first = switch_to_deploy(copy.deepcopy(source.network).bfloat16())
            errors = [
                relative_error(maps[-1].float(), expected[-1])
                for maps in (route.run(), rounded_first(source.images.bfloat16()))
            ]
            assert 1e-3 < errors[0] < errors[1]
        monkeypatch.setattr('repvit_mm.precision.multiplies_bfloat16', lambda: False)
        for name in ('fused_bf16', 'compiled_bf16', 'openvino_bf16'):
            with pytest.raises(LeftOut, match='neither AVX512-BF16 nor AMX'):
                ROUTES[name](source, stack)


@pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FILES])
def test_files_give_the_maps(name):
    pytest.importorskip(LIBRARIES.get(name, name))
    source = small_source()
    with ExitStack() as stack, torch.no_grad():
        expected = source.network(source.images)
        if FILES[name].precision == 'bfloat16' and not multiplies_bfloat16():
            pytest.skip('the processor has no bfloat16')
        route = ROUTES[name](source, stack)
        check(name, route, expected, 0.0)  # it has its own tolerance
        assert route.tolerance == TOLERANCES[FILES[name].precision].maps
        error = relative_error(torch.as_tensor(route.run()[-1]), expected[-1])
        assert (error > 1e-4) == (FILES[name].precision != 'float32')
        with pytest.raises(WrongRoute, match=f'route {name} differs'):
            check(name, route, [2 * map_ for map_ in expected], 0.0)
        half = Source(source.name, source.network, source.images.half())
        with pytest.raises(LeftOut, match='from float32 only'):
            ROUTES[name](half, stack)


def test_file_whose_library_is_missing(monkeypatch):
    monkeypatch.setattr('repvit_mm.deploy.export.versions', lambda names: {})
    with ExitStack() as stack, pytest.raises(LeftOut, match='needs the package'):
        ROUTES['onnxruntime'](small_source(), stack)


def test_library_that_is_absent_or_broken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'broken_library.py').write_text("raise RuntimeError('it does not fit this torch at all')")
    with pytest.raises(LeftOut, match='does not fit this torch'):
        optional('broken_library')
    with pytest.raises(LeftOut, match='absent_library'):
        optional('absent_library')


def test_route_that_differs_is_refused():
    source = small_source()
    with ExitStack() as stack, torch.no_grad():
        expected = source.network(source.images)
        fused = ROUTES['fused'](source, stack)
        conv = next(module for module in fused.network.modules() if isinstance(module, nn.Conv2d))
        conv.bias += 0.1
        with pytest.raises(WrongRoute, match='route fused differs'):
            check('fused', fused, expected, 1e-4)
        conv.bias.fill_(float('nan'))
        with pytest.raises(WrongRoute, match='by nan'):
            check('fused', fused, expected, 1e-4)
        with pytest.raises(WrongRoute, match='3 maps instead of 4'):
            check('few', Route(lambda: expected[:3]), expected, 1e-4)


def test_wrong_gradients_are_refused():
    network = randomize(RepViT(SMALL['repvit'][1], norm_eval=True)).train()
    networks = {'plain': network, 'folded': copy.deepcopy(network)}
    images = torch.randn(1, 3, 64, 64)
    check_gradients('small', networks, images)
    networks['folded'].stages[1][1].token_mixer.bn.weight.register_hook(lambda gradient: 1.01 * gradient)
    with pytest.raises(WrongRoute, match=r'stages\.1\.1\.token_mixer\.bn\.weight differs by 1\.0e-02'):
        check_gradients('small', networks, images)
