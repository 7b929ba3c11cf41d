"""What reaches into private parts of the frameworks does what it is there for."""

import ctypes
import os
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.runner import CheckpointLoader, Runner
from torch import nn

import repvit_mm
from repvit_mm.checkpoint import CheckpointError, cached
from repvit_mm.compat.openmmlab import offer_configs, offer_configs_of_forks
from repvit_mm.compat.openvino import SignalStack, same_signal_stack
from repvit_mm.compat.pytorch import conv_with_exact_bias, has_hooks, is_transforming, onednn_has_bfloat16


class Payload:
    def __reduce__(self):
        return os.mkdir, ('was_made',)


@pytest.mark.parametrize('address', ['open-mmlab://vgg16_caffe', 'mmcls://vgg11'])
def test_readers_of_model_zoos_run_nothing(tmp_path, monkeypatch, address):
    """Each of them fetches from an address of its own; here the file has been fetched before."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    fetched = []

    def fetch(address: str, target: str) -> None:
        fetched.append(target)
        torch.save(Payload(), target)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', fetch)
    with pytest.raises(CheckpointError, match=r'refers to posix\.mkdir'):
        CheckpointLoader.load_checkpoint(address)
    assert fetched == [str(cached(fetched[0].rpartition('/')[2]))] and not Path('was_made').exists()


def test_configs_of_a_package_can_be_inherited_from(tmp_path, monkeypatch):
    package = tmp_path / 'my_package'
    (package / '.mim/configs/sub').mkdir(parents=True)
    (package / '__init__.py').touch()
    (package / 'part.py').touch()
    distribution = tmp_path / 'my_package-1.dist-info'
    distribution.mkdir()
    (distribution / 'METADATA').write_text('Metadata-Version: 2.1\nName: my_package\nVersion: 1\n')
    (package / '.mim/model-index.yml').write_text('Import: []\n')
    (package / '.mim/configs/sub/base.py').write_text('a = 1\n')
    (tmp_path / 'config.py').write_text("_base_ = 'my_package::sub/base.py'\nb = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Exception, match='my_package'):
        Config.fromfile(tmp_path / 'config.py')
    offer_configs('my_package', 'my_package.part')
    cfg = Config.fromfile(tmp_path / 'config.py')
    assert (cfg.a, cfg.b) == (1, 2)


def test_collate_functions_that_a_config_inherits_can_be_built():
    """MMEngine notes in each part of an inherited config where it is from; MMYOLO's name a function there."""
    collate = dict(type='pseudo_collate', _scope_='mmengine')
    loader = dict(batch_size=2, dataset=[1, 2], sampler=dict(type='DefaultSampler', shuffle=False), collate_fn=collate)
    assert list(Runner.build_dataloader(loader)) == [[1, 2]]
    assert collate == dict(type='pseudo_collate', _scope_='mmengine')
    with pytest.raises(TypeError, match='_scope_'):
        list(Runner.build_dataloader.__wrapped__(loader))


def test_hooks_are_seen():
    linear = nn.Linear(1, 1)
    assert not has_hooks(linear)
    kinds = [name for name in dir(linear) if name.startswith('register_') and name.endswith('_hook')]
    kinds = [name for name in kinds if 'forward' in name or 'backward' in name]
    assert len(kinds) >= 5
    for kind in kinds:
        linear = nn.Linear(1, 1)  # one with a hook of the old kind takes none of the new
        handle = getattr(linear, kind)(lambda *_: None)
        assert has_hooks(linear), kind
        handle.remove()
        assert not has_hooks(linear)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert has_hooks(linear)
    handle.remove()
    assert not has_hooks(linear)


def test_transforms_are_seen():
    def ask(x: torch.Tensor) -> torch.Tensor:
        assert is_transforming()
        return x

    x = torch.ones(2)
    torch.func.vmap(ask)(x)
    torch.func.jvp(ask, (x,), (x,))
    torch.func.grad(lambda x: ask(x).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        assert is_transforming()
    assert not is_transforming()


@pytest.mark.needs_ops
def test_package_offers_its_own_configs():
    name = 'seg/fpn_repvit_m0_6_shapes.py'
    theirs = Config.fromfile(Path(repvit_mm.__file__).parents[1] / 'configs' / name)
    assert Config.fromstring(f"_base_ = 'repvit_mm::{name}'", '.py').model == theirs.model


def test_configs_of_a_fork_are_found_by_the_module(monkeypatch):
    table = {'torch': 'no-such-distribution', 'mmengine': 'torch', 'mmaction': 'no-such-distribution'}
    for module, distribution in table.items():
        monkeypatch.setitem(MODULE2PACKAGE, module, distribution)
    offer_configs_of_forks()
    assert {module: MODULE2PACKAGE[module] for module in table} == {**table, 'torch': 'torch'}


@pytest.mark.parametrize(('groups', 'size', 'dilation'), [(1, 1, 1), (1, 3, 1), (8, 3, 1), (1, 3, 2)])
def test_bias_is_added_before_the_sum_is_rounded(groups, size, dilation):
    options = 2, dilation * (size // 2), dilation, groups
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 40, 40, generator=generator).bfloat16()
    weight = torch.randn(8, 8 // groups, size, size, generator=generator).bfloat16()
    bias = torch.randn(8, generator=generator)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), *options)

    def offset(y: torch.Tensor) -> float:
        """What every place of a channel is off by, the worst one's."""
        return (y.double() - exact).mean((0, 2, 3)).abs().max().item()

    y = conv_with_exact_bias(x, weight, bias, options)
    rounded = torch.nn.functional.conv2d(x, weight, bias.bfloat16(), *options)
    assert y.dtype is torch.bfloat16 and y.shape == exact.shape
    assert relative_error(y, exact) < 4e-3
    if onednn_has_bfloat16():
        assert offset(y) < 0.5 * offset(rounded)


def test_openvino_leaves_the_signal_stack_alone():
    """Cores that are destroyed in the order in which they were made leave one that is no longer there."""
    openvino = pytest.importorskip('openvino')

    def stack() -> tuple:
        found = SignalStack()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
        return found.address, found.flags, found.size

    before = stack()
    with same_signal_stack():
        cores = [openvino.Core(), openvino.Core()]
        for core in cores:
            core.get_property('CPU', 'FULL_DEVICE_NAME')
        del core
        while cores:
            del cores[0]
        left = stack()
    assert stack() == before
    if left == before:
        pytest.skip('this OpenVINO puts every stack back')
