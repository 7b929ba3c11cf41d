"""Gradients of convolutions, by the way that is fastest where they are computed.

oneDNN, which computes convolutions on a CPU, has two gaps among grouped ones. It sums the gradient of a depthwise
kernel fast only if that is at most three taps wide: that of 7x7 takes ten times as long as the gradient of the map. And
in bfloat16 it has no fast gradient of a map that a strided grouped convolution reads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .compat.pytorch import ConvOptions, conv_backward

WIDTH = 3
"""Taps in a row of a depthwise kernel for which oneDNN is fast."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of a convolution's map, kernel and bias."""

_AROUND_GAPS = ContextVar('around_gaps', default=True)


@contextmanager
def in_one_operation() -> Iterator[None]:
    """Within the context all gradients of a convolution are computed in one operation, as on a GPU."""
    token = _AROUND_GAPS.set(False)
    try:
        yield
    finally:
        _AROUND_GAPS.reset(token)


def sums_by_columns(x: Tensor, weight: Tensor, options: ConvOptions) -> bool:
    """Whether :func:`conv_gradients` computes the gradient of a kernel in parts.

    Args:
        x: Map ``(N, C_in, H, W)``.
        weight: Kernel ``(C_out, C_in / groups, kH, kW)``.
        options: Of the convolution.
    """
    stride, _, dilation, groups = options
    is_wide = groups == x.shape[1] == len(weight) and weight.shape[-1] > WIDTH
    return is_wide and stride == dilation == 1 and _has_gaps(x)


def conv_gradients(grad: Tensor, x: Tensor, weight: Tensor, options: ConvOptions, needed: Sequence[bool]) -> Gradients:
    """Gradients of a convolution's map, kernel and bias, those that are ``needed``.

    Args:
        grad: Of the output, ``(N, C_out, H', W')``.
        x: Map ``(N, C_in, H, W)``.
        weight: Kernel ``(C_out, C_in / groups, kH, kW)``.
        options: Of the convolution.
        needed: Which of the three.
    """
    stride, _, _, groups = options
    if groups > 1 and stride > 1 and x.dtype is torch.bfloat16 and _has_gaps(x):
        of_map, *others = conv_backward(grad.float(), x.float(), weight.float(), options, needed)
        return of_map if of_map is None else of_map.to(x.dtype), *others
    if needed[1] and sums_by_columns(x, weight, options):
        of_map, _, _ = conv_backward(grad, x, weight, options, (needed[0], False, False))
        of_bias = grad.sum((0, 2, 3), dtype=torch.promote_types(grad.dtype, torch.float32)) if needed[2] else None
        return of_map, _depthwise_kernel_gradient(grad, x, weight, options), of_bias
    return conv_backward(grad, x, weight, options, needed)


def _has_gaps(x: Tensor) -> bool:
    """Whether oneDNN computes with a map."""
    return x.device.type == 'cpu' and torch.backends.mkldnn.is_available() and _AROUND_GAPS.get()


def _depthwise_kernel_gradient(grad: Tensor, x: Tensor, weight: Tensor, options: ConvOptions) -> Tensor:
    """The gradient of a depthwise kernel without stride, by columns of at most ``WIDTH`` taps.

    A column's taps see the map from where they stand, so each gets a part of the padded map.
    """
    _, padding, _, groups = options
    padded = F.pad(x, (padding,) * 4)
    columns = []
    for first in range(0, weight.shape[-1], WIDTH):
        column = weight[..., first : first + WIDTH]
        seen = padded[..., first : first + grad.shape[-1] + column.shape[-1] - 1]
        seen = seen.contiguous(memory_format=torch.channels_last)
        columns.append(conv_backward(grad, seen, column, (1, 0, 1, groups), (False, True, False))[1])
    return torch.cat(columns, -1)
