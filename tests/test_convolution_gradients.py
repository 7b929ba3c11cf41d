"""Gradients of convolutions against autograd's in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import Tensor

import repvit_mm.convolution_gradients
from repvit_mm.compat.pytorch import ConvOptions
from repvit_mm.convolution_gradients import conv_gradients, in_one_operation, sums_by_columns

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='this torch has no oneDNN')

CASES = {
    '7x7 depthwise': ((6, 1, 7, 7), (1, 3, 1, 6)),
    '5x5 depthwise, less padding': ((6, 1, 5, 5), (1, 1, 1, 6)),
    '4x4 depthwise, no padding': ((6, 1, 4, 4), (1, 0, 1, 6)),
    '9x9 depthwise': ((6, 1, 9, 9), (1, 4, 1, 6)),
    '3x3 depthwise': ((6, 1, 3, 3), (1, 1, 1, 6)),
    '7x7 depthwise, dilated': ((6, 1, 7, 7), (1, 6, 2, 6)),
    '7x7 grouped': ((6, 3, 7, 7), (1, 3, 1, 2)),
    '7x7 depthwise, two outputs a channel': ((12, 1, 7, 7), (1, 3, 1, 6)),
    '3x3 depthwise, strided': ((6, 1, 3, 3), (2, 1, 1, 6)),
    '7x7 strided, two outputs a channel': ((12, 1, 7, 7), (2, 3, 1, 6)),
    '1x1': ((4, 6, 1, 1), (1, 0, 1, 1)),
    '3x3, strided': ((4, 6, 3, 3), (2, 1, 1, 1)),
}
IN_COLUMNS = {name for name in CASES if name.split(',')[0] in {f'{k}x{k} depthwise' for k in (4, 5, 7, 9)}} - {
    '7x7 depthwise, dilated',
    '7x7 depthwise, two outputs a channel',
}


def exact(x: Tensor, weight: Tensor, grad: Tensor, options: ConvOptions) -> tuple[Tensor, ...]:
    """By autograd in float64; the bias is zero."""
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight, torch.zeros(len(weight)))]
    return torch.autograd.grad(F.conv2d(*leaves, *options), leaves, grad.double())


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize('case', CASES)
def test_gradients_are_those_of_float64(case, dtype, tolerance, memory_format):
    shape, options = CASES[case]
    x = torch.randn(2, 6, 11, 14).to(dtype).contiguous(memory_format=memory_format)
    weight = torch.randn(shape).to(dtype)
    grad = torch.randn_like(F.conv2d(x, weight, None, *options))
    assert sums_by_columns(x, weight, options) == (case in IN_COLUMNS)
    expected = exact(x, weight, grad, options)
    for needed in itertools.product((True, False), repeat=3):
        found = conv_gradients(grad, x, weight, options, needed)
        for wanted, a, b in zip(needed, found, expected, strict=True):
            assert not wanted or (a.shape == b.shape and relative_error(a, b) < tolerance)


def test_what_is_slow_is_not_asked_of_onednn(monkeypatch):
    """No kernel's gradient of more than three columns, and no map's of a strided grouped convolution in bfloat16."""
    asked = []
    real = repvit_mm.convolution_gradients.conv_backward

    def conv_backward(grad, x, weight, options, needed):
        asked.append((weight.shape[-1], x.dtype, options[0], tuple(needed)))
        return real(grad, x, weight, options, needed)

    monkeypatch.setattr(repvit_mm.convolution_gradients, 'conv_backward', conv_backward)
    x, needed = torch.randn(2, 6, 16, 16, dtype=torch.bfloat16), (True, True, True)
    conv_gradients(x, x, torch.randn(6, 1, 7, 7, dtype=x.dtype), (1, 3, 1, 6), needed)
    kernels = [width for width, _, _, (_, of_kernel, of_bias) in asked if of_kernel or of_bias]
    assert kernels == [3, 3, 1] and len(asked) == 4
    asked.clear()
    with in_one_operation():
        conv_gradients(x, x, torch.randn(6, 1, 7, 7, dtype=x.dtype), (1, 3, 1, 6), needed)
    assert asked == [(7, x.dtype, 1, needed)]
    asked.clear()
    conv_gradients(x[..., ::2, ::2], x, torch.randn(6, 1, 3, 3, dtype=x.dtype), (2, 1, 1, 6), needed)
    assert asked == [(3, torch.float32, 2, needed)]
