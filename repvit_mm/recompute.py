"""Maps that the backward pass computes again instead of keeping them.

Between the 1x1 convolutions of a mobile block lie a depthwise convolution, a gate and an activation. Their outputs fill
as much memory as those of the 1x1 convolutions and take a fraction of their time. So a module that is cheap to run
leaves a :class:`Recipe` with its output. A convolution that reads the output and runs folded keeps the recipe for its
backward pass, not the map. Modules are called as in any network, and hooks on them see every map.
"""

from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from .compat.pytorch import (
    ConvOptions,
    WeakTensorKeyDictionary,
    autocast_dtype,
    conv_backward,
    conv_with_exact_bias,
    is_compiling,
    is_transforming,
    version,
)

Function = Callable[..., Tensor]


class Recipe(NamedTuple):
    """How a map is computed again: ``function(*kept)``."""

    function: Function
    kept: tuple[Tensor, ...]

    @classmethod
    def of_kept(cls, x: Tensor) -> 'Recipe':
        """The recipe of a map that is kept itself."""
        return cls(lambda x: x, (x,))

    def then(self, function: Function, *others: Tensor) -> 'Recipe':
        """The recipe of ``function(x, *others)``, where this is the recipe of ``x``."""
        first, count = self.function, len(self.kept)
        return Recipe(
            lambda *kept: function(first(*kept[:count]), *kept[count:]),
            (*self.kept, *others),
        )

    def shared(self) -> 'Recipe':
        """The same recipe for two users, the second of which gets what was computed for the first."""
        return Recipe(_TwiceUsed(self.function), self.kept)


class _TwiceUsed:
    """A function that is computed at every other call: a second call returns what the first one computed."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.result: Tensor | None = None

    def __call__(self, *kept: Tensor) -> Tensor:
        if self.result is None:
            self.result = self.function(*kept)
            return self.result
        result, self.result = self.result, None
        return result


class _Left(NamedTuple):
    """A recipe and the version of the map that it was left with."""

    recipe: Recipe
    version: int


# Not an attribute of the maps: it would be pickled with them.
_RECIPES: MutableMapping[Tensor, _Left] = WeakTensorKeyDictionary()


def recipe_of(x: Tensor) -> Recipe | None:
    """The recipe of a map; ``None`` if it has none, was changed since, or if operations do not run eagerly."""
    left = _RECIPES.get(x) if runs_eagerly() else None
    return left.recipe if left is not None and left.version == version(x) else None


def leave(x: Tensor, recipe: Recipe) -> Tensor:
    """Leave a recipe with the map ``x``, which is returned."""
    _RECIPES[x] = _Left(recipe, version(x))
    return x


def runs_eagerly() -> bool:
    """Whether operations run one by one as they are called: nothing compiles, traces, exports or transforms them."""
    return not (is_compiling() or torch.jit.is_tracing() or torch.jit.is_scripting() or is_transforming())


def recomputable(function: Function, x: Tensor, *others: Tensor) -> Tensor:
    """``function(x, *others)``, something cheap, which leaves the recipe of its output.

    If ``x`` comes with a recipe, that is kept for the backward pass in its place.

    Args:
        function: A pure function; autograd keeps ``x`` for it, as for a product or a GELU.
        x: A map.
        others: Further tensors, which are kept.
    """
    if not (torch.is_grad_enabled() and runs_eagerly()):
        return function(x, *others)
    recipe = recipe_of(x)
    if recipe is None:
        return leave(function(x, *others), Recipe.of_kept(x).then(function, *others))
    recipe = recipe.shared()
    return leave(_Recomputed.apply(function, recipe, x, *others), recipe.then(function, *others))


class _Recomputed(torch.autograd.Function):
    """A cheap function that runs again in the backward pass, on what its first input's recipe gives."""

    @staticmethod
    def forward(ctx: Any, function: Function, recipe: Recipe, x: Tensor, *others: Tensor) -> Tensor:
        ctx.function, ctx.recipe = function, recipe.function
        ctx.others = len(others)
        ctx.save_for_backward(*others, *recipe.kept)
        return function(x, *others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        others, kept = saved[: ctx.others], saved[ctx.others :]
        needed = ctx.needs_input_grad[2:]
        inputs = [tensor.detach() for tensor in (ctx.recipe(*kept), *others)]
        for tensor, learns in zip(inputs, needed, strict=True):
            tensor.requires_grad_(learns)
        # What is saved here is used at once: hooks that move saved tensors to the CPU, say, need not see it.
        with torch.enable_grad(), saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            output = ctx.function(*inputs)
        grads = iter(torch.autograd.grad(output, [tensor for tensor in inputs if tensor.requires_grad], grad))
        return None, None, *(next(grads) if learns else None for learns in needed)


def training_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast lets a map's convolutions train; ``None`` without autocast or gradients."""
    return autocast_dtype(x.device.type) if torch.is_grad_enabled() else None


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    recomputes: bool = True,
    residual: bool = False,
) -> Tensor:
    """A convolution that saves the recipe of its input, if it has one. A grouped one leaves a recipe with its output.

    Under autocast its bias is added in float32, and kernels are rounded by :func:`rounded`: what is off by the same
    amount at every place adds up in gradients.

    Args:
        x: Map ``(N, C_in, H, W)``.
        weight: Kernel ``(C_out, C_in / groups, kH, kW)``.
        bias: ``(C_out,)``.
        stride: Stride.
        padding: Zero padding.
        dilation: Distance between the places that a kernel reads.
        groups: Groups.
        recomputes: ``False`` keeps the input and leaves no recipe.
        residual: Add the convolution to its input, in the dtype of the kernel; for training.
    """
    if not torch.is_grad_enabled():
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    dtype, given = training_dtype(x), x
    recomputes = recomputes and runs_eagerly()
    known = recipe_of(x) if recomputes else None
    if dtype is not None and known is None:
        x = x.to(dtype)  # before it is kept
    # A grouped convolution is cheap, so it runs again for whoever reads its output.
    leaves = recomputes and groups > 1
    options = stride, padding, dilation, groups
    recipe = Recipe.of_kept(x) if known is None else known.shared() if leaves else known
    kernel = weight if dtype is None else rounded(weight.detach(), dtype)
    if known is None and dtype is None:
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    else:
        y = _Convolution.apply(options, recipe, kernel, x, weight, bias)
    if residual:
        y = given.to(weight.dtype) + y
    again = partial(_residual if residual else _convolution, options)
    return leave(y, recipe.then(again, kernel, bias)) if leaves else y


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A kernel in a dtype of less precision, with the sum of its taps kept: the smallest tap takes up what is missing.

    The centre of a depthwise kernel holds the identity branch and is rounded the most. On maps that hardly change from
    one place to the next, what counts is the sum.

    Args:
        weight: Kernel ``(C_out, C_in / groups, kH, kW)``.
        dtype: The dtype.
    """
    kernel = weight.to(dtype)
    if kernel.shape[-1] * kernel.shape[-2] == 1 or kernel.dtype is weight.dtype:
        return kernel
    exact, taps = weight.flatten(2), kernel.flatten(2)
    smallest = exact.abs().argmin(-1, keepdim=True)
    missing = (exact - taps).sum(-1, keepdim=True) + taps.gather(-1, smallest)
    return taps.scatter(-1, smallest, missing.to(dtype)).view_as(kernel)


def _convolution(options: ConvOptions, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """A convolution in the dtype of its kernel, without autocast; the bias is added in its own dtype."""
    if kernel.dtype is bias.dtype and autocast_dtype(x.device.type) is None:
        return F.conv2d(x, kernel, bias, *options)
    with torch.autocast(x.device.type, enabled=False):
        if kernel.dtype is bias.dtype:
            return F.conv2d(x, kernel, bias, *options)
        return conv_with_exact_bias(x.to(kernel.dtype), kernel, bias.float(), options)


def _residual(options: ConvOptions, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """A map and its convolution, summed in the dtype of the map that was kept."""
    return x + _convolution(options, x, kernel, bias)


class _Convolution(torch.autograd.Function):
    """A convolution that keeps its input, or the recipe of it, and the kernel that it runs with."""

    @staticmethod
    def forward(
        ctx: Any, options: ConvOptions, recipe: Recipe, kernel: Tensor, x: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.options = options
        ctx.recipe = recipe.function
        ctx.save_for_backward(kernel, *recipe.kept)
        return _convolution(options, x, kernel, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel, *kept = ctx.saved_tensors
        x = ctx.recipe(*kept)
        grads = conv_backward(grad, x.to(kernel.dtype), kernel, ctx.options, ctx.needs_input_grad[3:])
        return None, None, None, *grads
