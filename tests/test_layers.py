from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import Operations, dilated, normalize, randomize, relative_error
from torch import Tensor, nn

from repvit_mm.compat.pytorch import fuses_into_convolutions
from repvit_mm.layers import (
    GELU,
    ChannelLinear,
    ConvBN,
    LayerScale,
    MobileOneBlock,
    NormLinear,
    ReLU,
    SqueezeExcite,
    StochasticDepth,
    activated,
    add_convolved,
    module_by_module,
    overwriting,
)
from repvit_mm.reparam import plain_formulation


@pytest.mark.parametrize('kernel_size', [1, 3, 5, 7])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('groups', [1, 2, 4])
def test_conv_bn_is_convolution_and_norm(kernel_size, stride, groups):
    block = randomize(ConvBN(4, 8, kernel_size, stride, groups).double()).eval()
    assert [name for name, _ in block.named_parameters()] == ['conv.weight', 'bn.weight', 'bn.bias']
    x = torch.randn(2, 4, 9, 12).double()
    bn = block.bn
    expected = F.conv2d(x, block.conv.weight, stride=stride, padding=kernel_size // 2, groups=groups)
    assert expected.shape[2:] == (-(-9 // stride), -(-12 // stride)), 'the padding is "same"'
    expected = F.batch_norm(expected, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    with plain_formulation(block):
        assert relative_error(block(x), expected) < 1e-12


def test_conv_bn_starts_with_the_given_norm_weight():
    assert (ConvBN(4, 4).bn.weight == 1).all()
    residual = ConvBN(4, 4, norm_weight=0.0)
    assert (residual(torch.randn(2, 4, 5, 5)) == 0).all()


@pytest.mark.parametrize('num_convs', [1, 3])
def test_mobile_one_block_is_the_sum_of_its_branches(num_convs):
    block = randomize(MobileOneBlock(6, 6, 3, groups=6, num_convs=num_convs).double()).eval()
    x = torch.randn(2, 6, 9, 7).double()
    expected = sum(normalize(F.conv2d(x, b.conv.weight, padding=1, groups=6), b.bn) for b in block.convs)
    expected = expected + normalize(F.conv2d(x, block.scale.conv.weight, groups=6), block.scale.bn)
    expected = expected + normalize(x, block.skip)
    assert len(block.convs) == num_convs
    assert relative_error(block(x), expected) < 1e-12
    with plain_formulation(block):
        assert relative_error(block(x), expected) < 1e-12


@pytest.mark.parametrize(
    ('arguments', 'has_scale', 'has_skip'),
    [((6, 6, 3), True, True), ((6, 6, 1), False, True), ((6, 6, 3, 2), True, False), ((6, 8, 1), False, False)],
)
def test_mobile_one_block_has_the_branches_that_its_shape_allows(arguments, has_scale, has_skip):
    block = MobileOneBlock(*arguments)
    assert (block.scale is not None, block.skip is not None) == (has_scale, has_skip)


def test_squeeze_excite_gates_channels_by_the_mean_of_all():
    layer = randomize(SqueezeExcite(6, 8).double())
    x = torch.randn(2, 6, 5, 7).double()
    first, second = (conv.weight.flatten(1) for conv in (layer.fc1, layer.fc2))
    hidden = (x.flatten(2).sum(-1) / 35 @ first.T + layer.fc1.bias).clamp(min=0)
    gate = 1 / (1 + torch.exp(-(hidden @ second.T + layer.fc2.bias)))
    assert hidden.shape == (2, 8)
    assert relative_error(layer(x), x * gate[..., None, None]) < 1e-12


class TestReLU:
    def test_is_relu(self):
        x = torch.randn(2, 6, 5, 7, requires_grad=True)
        y = ReLU()(x)
        assert torch.equal(y, x.clamp(min=0))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, (x > 0).float())

    def test_overwrites_its_input_only_where_that_is_allowed_and_without_gradients(self):
        x = torch.randn(2, 6, 5, 7)
        before = x.clone()
        with overwriting(True):
            ReLU()(x)
        with torch.no_grad():
            ReLU()(x)
        assert torch.equal(x, before)
        with torch.no_grad(), overwriting(True):
            assert ReLU()(x) is x
        assert torch.equal(x, before.clamp(min=0))


def test_norm_linear_is_norm_and_linear_layer_over_the_channels():
    block = randomize(NormLinear(6, 9).double()).eval()
    x = torch.randn(2, 6, 5, 7).double()
    norm, linear = block.norm, block.linear
    expected = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    expected = torch.einsum('nchw,oc->nohw', expected, linear.weight)
    assert linear.bias is None
    with plain_formulation(block):
        assert relative_error(block(x), expected) < 1e-12
    assert relative_error(block(x), expected) < 1e-12


@pytest.mark.parametrize('layer', [nn.Conv2d(6, 9, 1), nn.Conv2d(6, 9, 1, bias=False), ChannelLinear(6, 9)], ids=str)
def test_layer_scale_is_a_factor_for_each_channel_from_the_start_one(layer):
    block = LayerScale(layer, 9, 0.25).double()
    x = torch.randn(2, 6, 5, 7).double()
    assert relative_error(block(x), 0.25 * layer(x)) < 1e-12
    randomize(block)
    expected = layer(x) * block.layer_scale.view(1, 9, 1, 1)
    assert relative_error(block(x), expected) < 1e-12
    with plain_formulation(block):
        assert relative_error(block(x), expected) < 1e-12


@pytest.mark.parametrize(('rate', 'training'), [(0.0, True), (0.0, False), (0.7, False)])
def test_stochastic_depth_leaves_the_map_alone(rate, training):
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(StochasticDepth(rate).train(training)(x), x)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_stochastic_depth_drops_whole_images_and_keeps_the_mean(dtype):
    images = 4096
    y = StochasticDepth(0.25)(torch.ones(images, 3, 2, 2, dtype=dtype))
    assert y.dtype is dtype
    values = y.flatten(1)
    assert (values == values[:, :1]).all(), 'an image is dropped as a whole'
    dropped = values[:, 0] == 0
    assert torch.equal(values[~dropped], torch.ones(1, dtype=dtype).div(0.75).expand_as(values[~dropped]))
    # Five standard deviations of a binomial count.
    assert abs(dropped.sum().item() - 0.25 * images) < 5 * (images * 0.25 * 0.75) ** 0.5


def test_stochastic_depth_shows_its_rate():
    assert 'rate=0.25' in str(nn.Sequential(StochasticDepth(0.25)))


class TestInOneOperation:
    """Convolutions that take the activation, or the residual sum, along."""

    @pytest.fixture(params=['fused', 'unfused', 'without bias', 'dilated'])
    def conv(self, request: pytest.FixtureRequest) -> nn.Module:
        fuses_into_convolutions()  # it tries them once
        return {
            'fused': lambda: nn.Conv2d(6, 6, 3, padding=1, groups=2),
            'unfused': lambda: randomize(ConvBN(6, 6, 3, groups=6)).eval(),
            'without bias': lambda: nn.Conv2d(6, 6, 1, bias=False),
            'dilated': lambda: dilated(randomize(ConvBN(6, 6, 3))).eval(),
        }[request.param]()

    @pytest.fixture
    def x(self) -> Tensor:
        return torch.randn(2, 6, 9, 7).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    @pytest.mark.parametrize('act', [GELU, ReLU])
    def test_with_the_activation(self, conv, act, x):
        expected = act()(conv(x))
        with overwriting(True), Operations() as seen:
            y = activated(conv, act(), x)
        assert relative_error(y, expected) < 1e-5
        if fuses_into_convolutions():
            assert 'mkldnn._convolution_pointwise.default' in seen.names and not any('elu' in n for n in seen.names)

    @torch.no_grad()
    def test_with_the_residual_sum(self, conv, x):
        hidden = torch.randn_like(x)
        expected = x + conv(hidden)
        with overwriting(True), Operations() as seen:
            y = add_convolved(x, conv, StochasticDepth(0.1).eval(), hidden)
        assert relative_error(y, expected) < 1e-5
        if fuses_into_convolutions():
            assert y is x and 'mkldnn._convolution_pointwise_.binary' in seen.names

    @torch.no_grad()
    @pytest.mark.parametrize(
        'obstacle',
        ['somebody looks', 'switched off', 'float64', 'other format', 'autocast', 'no such operator', 'another act'],
    )
    def test_falls_back(self, x, obstacle, monkeypatch):
        conv, act, hidden = nn.Conv2d(6, 6, 1), GELU(), torch.randn_like(x)
        if obstacle == 'float64':
            conv, x, hidden = conv.double(), x.double(), hidden.double()
        elif obstacle == 'other format':
            x, hidden = x.contiguous(), hidden.contiguous()
        elif obstacle == 'no such operator':
            monkeypatch.setattr('repvit_mm.layers.fuses_into_convolutions', lambda: False)
        elif obstacle == 'another act':
            act = nn.SiLU()
        with torch.autocast('cpu', torch.bfloat16, enabled=obstacle == 'autocast'):
            expected = act(conv(x)), x + conv(hidden)
            switch = module_by_module() if obstacle == 'switched off' else nullcontext()
            with overwriting(obstacle != 'somebody looks'), switch, Operations() as seen:
                y = activated(conv, act, x)
                if obstacle != 'another act':
                    total = add_convolved(x, conv, StochasticDepth(0.0), hidden)
                    assert relative_error(total, expected[1]) < 1e-6 and total.dtype is expected[1].dtype
        assert relative_error(y, expected[0]) < 1e-6 and y.dtype is expected[0].dtype
        assert not any('mkldnn' in name for name in seen.names)

    def test_an_operator_that_computes_something_else_is_not_taken(self, monkeypatch):
        """The guard tries it; twin of the operator as it is."""
        monkeypatch.setattr('repvit_mm.compat.pytorch.add_conv_', lambda total, *args: total)
        assert not fuses_into_convolutions.__wrapped__()
        monkeypatch.setattr('repvit_mm.compat.pytorch.add_conv_', None)
        assert not fuses_into_convolutions.__wrapped__()
