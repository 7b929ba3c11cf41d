"""Folding the norms of whole models: the same outputs, and nothing folded that does not belong together."""

import copy

import pytest
import torch
from helpers import since_torch
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from small_models import like_trained, small_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvit_mm import fold
from repvit_mm.backbone import ReparamBackbone
from repvit_mm.fold import fold_conv_norms
from repvit_mm.reparam import reparam_blocks

BN = dict(type='BN')


def norms_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def assert_folds(model: nn.Module, *folded: str, **left: str) -> fold.FoldReport:
    """Fold a module of 6 channels and compare its output, in float64 so that only a wrong fold differs."""
    model = like_trained(model).double().eval()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    expected = model(x)
    report = fold_conv_norms(model)
    assert report.folded == list(folded)
    assert report.left.keys() == {name.replace('__', '.') for name in left}
    for name, reason in left.items():
        assert reason in report.left[name.replace('__', '.')]
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    if folded:
        assert report.difference < 1e-12
    return report


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(kernel_size=3, padding=1, stride=2, groups=3, dilation=2),
        dict(kernel_size=3, padding=1, padding_mode='reflect'),
        dict(kernel_size=3, padding=1, padding_mode='circular'),
        dict(bias=True),
        dict(order=('act', 'conv', 'norm')),
        dict(conv_cfg=dict(type='Conv2d')),
        dict(norm_cfg=dict(type='SyncBN')),
        dict(norm_cfg=dict(type='BN', affine=False)),
        dict(norm_cfg=dict(type='BN', eps=0.1)),
    ],
    ids=str,
)
def test_conv_module(options):
    if options.get('norm_cfg', BN).get('affine', True):
        assert_folds(ConvModule(6, 9, **{'kernel_size': 1, 'norm_cfg': BN} | options), 'bn')
    else:
        module = ConvModule(6, 9, 1, norm_cfg=BN)
        module.bn = nn.BatchNorm2d(9, affine=False)
        module.bn.running_mean.normal_()
        report = fold_conv_norms(module.eval())
        assert report.folded == ['bn'] and report.difference < 1e-6


def test_folded_conv_module_is_like_one_without_a_norm():
    module = ConvModule(6, 9, 3, norm_cfg=BN).eval()
    fold_conv_norms(module)
    plain = ConvModule(6, 9, 3)
    assert [name for name, _ in module.named_modules()] == [name for name, _ in plain.named_modules()]
    assert module.norm is None and not module.with_norm and module.with_bias


def test_parts_of_a_separable_convolution():
    module = DepthwiseSeparableConvModule(6, 9, 3, padding=1, norm_cfg=BN)
    assert_folds(module, 'depthwise_conv.bn', 'pointwise_conv.bn')


class Shared(nn.Module):
    """Levels that share a convolution and have norms of their own, as RTMDet's heads."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(ConvModule(6, 6, 3, padding=1, norm_cfg=BN) for _ in range(3))
        for level in self.levels:
            level.conv = self.levels[0].conv

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([level(x) for level in self.levels])


def test_convolution_with_several_norms_becomes_several():
    model = Shared()
    assert_folds(model, 'levels.0.bn', 'levels.1.bn', 'levels.2.bn')
    assert len({id(level.conv) for level in model.levels}) == 3


def test_norm_behind_several_convolutions():
    model = Shared()
    for level in model.levels:
        level.conv, level.bn = copy.deepcopy(level.conv), model.levels[0].bn
    assert_folds(model, 'levels.0.bn', 'levels.1.bn', 'levels.2.bn')


class Residual(nn.Module):
    """As ResNet's blocks: convolutions and norms that only the forward pass brings together."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


class Misleading(Residual):
    """Registered side by side, and not run so: the norm comes behind the sum of both convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.bn2(self.conv1(x) + self.conv2(x)))


class Tapped(Residual):
    """The convolution's own output is used as well."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return y + self.bn1(y) + self.bn2(self.conv2(x))


class Twice(Residual):
    """A convolution that runs twice, once without its norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.bn1(self.conv1(x))) + self.bn2(self.conv2(x))


class Deciding(Residual):
    """What it runs depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)) if x.sum() > 0 else self.bn2(self.conv2(x))


def test_pairs_of_the_traced_graph():
    assert_folds(Residual(), 'bn1', 'bn2')
    assert_folds(
        nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6)),
        '1',
        **{'3': 'no convolution'},
    )


def test_what_only_looks_like_a_pair_stays():
    assert_folds(Misleading(), bn1='no convolution', bn2='no convolution')
    assert_folds(Tapped(), 'bn2', bn1='no convolution')
    assert_folds(Twice(), 'bn2', bn1='no convolution')
    assert_folds(Deciding(), bn1='cannot be traced', bn2='cannot be traced')


def test_what_is_no_fixed_map_of_a_convolution_stays():
    assert_folds(ConvModule(6, 6, 1, norm_cfg=dict(type='GN', num_groups=2)), gn='GroupNorm')
    assert_folds(ConvModule(6, 6, 1, norm_cfg=BN, order=('norm', 'conv', 'act')), bn='order')
    assert_folds(ConvModule(6, 6, 1, norm_cfg=BN, with_spectral_norm=True), bn='spectral')
    assert_folds(ConvModule(6, 6, 1, norm_cfg=dict(type='BN', track_running_stats=False)), bn='statistics')
    assert_folds(ConvModule(6, 6, 2, norm_cfg=BN, conv_cfg=dict(type='deconv')), bn='ConvTranspose2d')


def test_training_norm_is_refused_and_nothing_folded():
    model = nn.Sequential(ConvModule(6, 6, 1, norm_cfg=BN), ConvModule(6, 6, 1, norm_cfg=BN)).eval()
    model[1].bn.train()
    with pytest.raises(ValueError, match=r'1\.bn is in training mode'):
        fold_conv_norms(model)
    assert norms_of(model) == ['0.bn', '1.bn']


@pytest.mark.parametrize(
    'dtype',
    [
        pytest.param(torch.float16, marks=since_torch('2.3', 'a convolution in float16 on a CPU')),
        torch.bfloat16,
        torch.float32,
    ],
)
def test_dtype_and_memory_format_stay(dtype):
    module = like_trained(ConvModule(6, 8, 3, norm_cfg=BN)).eval()
    x = torch.randn(2, 6, 8, 8)
    expected = module(x)
    module = module.to(dtype=dtype, memory_format=torch.channels_last)
    report = fold_conv_norms(module)
    assert module.conv.weight.dtype == module.conv.bias.dtype == dtype
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(module(x.to(dtype)).float(), expected, rtol=tolerance, atol=tolerance)
    assert report.difference < tolerance


@pytest.mark.needs_ops
@pytest.mark.parametrize('name', ['retinanet', 'atss', 'rtmdet', 'semantic_fpn'])
def test_whole_models(name, log):
    model = small_model(name)
    images = torch.randn(1, 3, 64, 64)
    expected = model(images, mode='tensor')
    blocks = reparam_blocks(model)
    report = fold_conv_norms(model)
    assert reparam_blocks(model) == blocks, "the backbone's are not this function's"
    theirs = [f'{name}.' for name, module in model.named_modules() if isinstance(module, ReparamBackbone)]
    assert not [norm for norm in norms_of(model) if not norm.startswith(tuple(theirs))]
    flat, flat_expected = (
        torch.utils._pytree.tree_flatten(maps)[0] for maps in (model(images, mode='tensor'), expected)
    )
    for found, right in zip(flat, flat_expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert str(report) in log
    assert ('GroupNorm' in str(report)) == (name == 'atss')
    assert fold_conv_norms(model).folded == [], 'nothing is left the second time'


def test_wrong_folding_is_noticed(monkeypatch):
    """The twin of all tests above: a fold that forgets the statistics."""
    right = fold.fold_norm

    def forgetful(kernel, norm):
        weight, bias = right(kernel, norm)
        return type(kernel)(weight, bias + 0.1)

    monkeypatch.setattr(fold, 'fold_norm', forgetful)
    model = like_trained(Residual()).eval()
    assert fold_conv_norms(model).difference > 1e-3
    with pytest.raises(AssertionError):
        assert_folds(Residual(), 'bn1', 'bn2')


def test_broken_statistics_show_in_the_difference():
    module = ConvModule(6, 6, 1, norm_cfg=BN).eval()
    module.bn.running_mean[0] = float('nan')
    assert not fold_conv_norms(module).difference < 1
