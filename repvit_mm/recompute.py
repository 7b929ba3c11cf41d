"""Convolutions that do not keep their input for the backward pass where it is cheap to compute again.

Between the 1x1 convolutions of a mobile block lie a depthwise convolution, a gate and an activation: their outputs fill
as much memory as those of the 1x1 convolutions and take a fraction of their time. With frozen statistics each block is
one convolution, so its input, recomputed from the input of what comes before it, is all that its backward pass needs.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .reparam import ReparamBlock, conv_backward, conv_kernel, runs_eagerly


class Gate(Protocol):
    """A module that multiplies a map ``(N, C, H, W)`` by a gate ``(N, C, 1, 1)`` of its own making."""

    def gate(self, x: Tensor) -> Tensor:
        """The gate for ``x``."""

    def __call__(self, x: Tensor) -> Tensor:
        """``x * self.gate(x)``."""


def conv_after(
    cheap: nn.Module, conv: ReparamBlock | nn.Conv2d, x: Tensor, gate: Gate | None = None
) -> tuple[Tensor, Tensor]:
    """A convolution behind something cheap: ``conv(gate(cheap(x)))``.

    Where gradients are recorded and blocks run folded, the backward pass recomputes the convolution's input from ``x``.

    Args:
        cheap: An activation without parameters, or a :class:`~repvit_mm.reparam.ReparamBlock`, a depthwise one say.
        conv: What follows; square stride and padding, no dilation.
        x: Input of ``cheap``, ``(N, C, H, W)``.
        gate: Squeeze-and-excitation between the two.

    Returns:
        The convolution's output and its input.
    """
    blocks = [module for module in (cheap, conv) if isinstance(module, ReparamBlock)]
    recorded = blocks and torch.is_grad_enabled() and runs_eagerly()
    if not (recorded and all(block.runs_folded() for block in blocks)):
        middle = cheap(x) if gate is None else gate(cheap(x))
        return conv(middle), middle
    recipe, kept = (cheap.convolve, (x, *cheap.kernel())) if cheap in blocks else (cheap, (x,))
    middle = recipe(*kept)
    scale = None if gate is None else gate.gate(middle)
    if conv in blocks:
        kernel, options = conv.kernel(), (conv.stride, conv.padding, conv.groups)
    else:
        kernel, options = conv_kernel(conv), (conv.stride[0], conv.padding[0], conv.groups)
    output, scaled = _ConvOfRecomputed.apply(options, recipe, middle, scale, *kernel, *kept)
    return output, middle if scaled is None else scaled


class _ConvOfRecomputed(torch.autograd.Function):
    """``conv(middle * scale)`` and its input; ``middle = recipe(*kept)`` is not kept but computed twice.

    The gradients for ``kept`` reach them through ``middle``, which autograd knows how to differentiate.
    """

    @staticmethod
    def forward(
        ctx: Any,
        options: tuple[int, int, int],
        recipe: Callable[..., Tensor],
        middle: Tensor,
        scale: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        *kept: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        device = middle.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        ctx.options, ctx.recipe = options, recipe
        ctx.save_for_backward(scale, weight, *kept)
        ctx.set_materialize_grads(False)
        stride, padding, groups = options
        scaled = None if scale is None else middle * scale
        # Rounded to half precision, a bias would be off by the same amount at every place.
        output = F.conv2d(
            middle if scaled is None else scaled,
            weight,
            bias if ctx.autocast is None else None,
            stride,
            padding,
            1,
            groups,
        )
        return output if ctx.autocast is None else output.add_(bias.view(-1, 1, 1)), scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_scaled: Tensor | None) -> tuple[Tensor | None, ...]:
        scale, weight, *kept = ctx.saved_tensors
        needs_middle, needs_scale, *needs_kernel = ctx.needs_input_grad[2:6]
        autocast = nullcontext() if ctx.autocast is None else torch.autocast(*ctx.autocast)
        # Without gradients an activation would overwrite what is kept.
        with autocast, torch.enable_grad():
            middle = ctx.recipe(*(tensor.detach() for tensor in kept))
        scaled = middle if scale is None else middle * scale
        grad_kernel: tuple[Tensor | None, Tensor | None] = (None, None)
        if grad_output is not None:
            dtype = grad_output.dtype
            needed = (needs_middle or needs_scale, *needs_kernel)
            through, *grad_kernel = conv_backward(grad_output, scaled.to(dtype), weight.to(dtype), *ctx.options, needed)
            grad_scaled = through if grad_scaled is None else through.add_(grad_scaled)
        if scale is None or grad_scaled is None:
            return None, None, grad_scaled, None, *grad_kernel, *(None for _ in kept)
        grad_scale = (grad_scaled * middle).sum((2, 3), keepdim=True)
        return None, None, grad_scaled * scale, grad_scale, *grad_kernel, *(None for _ in kept)
