"""Structural re-parameterization: blocks of linear branches that equal one convolution.

The idea is RepVGG's (https://arxiv.org/abs/2101.03697). Here it is written down once: a :class:`ReparamBlock` states
its equivalent kernel as a differentiable function of its own parameters. Three things follow from that one statement.

* With live BatchNorm statistics the block runs its branches.
* With frozen statistics it runs one convolution with the equivalent kernel: same output, same gradients.
* :func:`switch_to_deploy` writes the kernel into a plain ``nn.Conv2d`` in the block's place.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .compat.pytorch import BatchNorm, has_hooks, tensors_of, tree_of
from .recompute import convolve, runs_eagerly


class Kernel(NamedTuple):
    """A convolution as two tensors: weight ``(C_out, C_in / groups, kH, kW)`` and bias ``(C_out,)``.

    Every function that computes kernels also takes stacks of them, with the same leading dimensions in both tensors.
    """

    weight: Tensor
    bias: Tensor


def conv_kernel(layer: nn.Conv2d | nn.Linear) -> Kernel:
    """The kernel of a convolution, or of a linear layer over the channels (a 1x1 one); a missing bias is zero."""
    weight = layer.weight[..., None, None] if isinstance(layer, nn.Linear) else layer.weight
    bias = weight.new_zeros(weight.shape[:-3]) if layer.bias is None else layer.bias
    return Kernel(weight, bias)


def identity_kernel(like: Kernel) -> Kernel:
    """The kernel that leaves a map as it is, for the channels, groups, size, dtype and device of ``like``."""
    out_channels, in_channels_per_group, height, width = like.weight.shape[-4:]
    # Output channel c of a group takes its input channel c. Not nn.init.dirac_, which takes a step for each channel.
    centre = torch.eye(in_channels_per_group, dtype=like.weight.dtype, device=like.weight.device)
    centre = centre.repeat(out_channels // in_channels_per_group, 1)[:, :, None, None]
    weight = F.pad(centre, (width // 2, width // 2, height // 2, height // 2))
    return Kernel(weight, torch.zeros_like(like.bias))


def pad_kernel(kernel: Kernel, size: tuple[int, int]) -> Kernel:
    """The same convolution with a larger kernel of ``size`` (kH, kW), zero around the old one."""
    (height, width), (old_height, old_width) = size, kernel.weight.shape[-2:]
    more_y, more_x = int(height - old_height), int(width - old_width)  # sizes are tensors while a network is traced
    if more_y < 0 or more_x < 0 or more_y % 2 or more_x % 2:
        raise ValueError(f'cannot centre a {old_height}x{old_width} kernel in a {height}x{width} one')
    pad_y, pad_x = more_y // 2, more_x // 2
    return Kernel(F.pad(kernel.weight, (pad_x, pad_x, pad_y, pad_y)), kernel.bias)


def add_kernels(first: Kernel, *others: Kernel) -> Kernel:
    """The sum of parallel convolutions; the first one has the largest kernel."""
    weight, bias = first
    for other in others:
        padded = pad_kernel(other, weight.shape[-2:])
        weight, bias = weight + padded.weight, bias + padded.bias
    return Kernel(weight, bias)


def subtract_kernel(first: Kernel, second: Kernel) -> Kernel:
    """The difference of parallel convolutions; the first one has the larger kernel."""
    return add_kernels(first, Kernel(-second.weight, -second.bias))


def scale_kernel(kernel: Kernel, scale: Tensor) -> Kernel:
    """A convolution followed by a factor for each channel, ``scale`` ``(C_out,)``."""
    return Kernel(kernel.weight * scale[..., None, None, None], kernel.bias * scale)


def norm_scale(norm: BatchNorm) -> Tensor:
    """The factor of each channel, ``(C,)``, by which a BatchNorm with frozen statistics multiplies.

    Raises:
        ValueError: if the norm keeps no running statistics, so that it is no fixed function.
    """
    if norm.running_mean is None:
        raise ValueError(f'{norm} keeps no running statistics: only a norm with track_running_stats=True can be folded')
    scale = torch.rsqrt(norm.running_var + norm.eps)
    return scale if norm.weight is None else scale * norm.weight


def fold_norm(kernel: Kernel, norm: BatchNorm) -> Kernel:
    """A convolution followed by a BatchNorm with frozen statistics, as one convolution.

    Raises:
        ValueError: if the norm keeps no running statistics, so that it is no fixed function.
    """
    # In few steps: on a GPU each of them is a launch, for every block in every iteration.
    scale = norm_scale(norm)
    centred = kernel.bias - norm.running_mean
    bias = centred * scale if norm.bias is None else torch.addcmul(norm.bias, centred, scale)
    return Kernel(kernel.weight * scale[..., None, None, None], bias)


def fold_norm_before(norm: BatchNorm, kernel: Kernel) -> Kernel:
    """A BatchNorm with frozen statistics followed by an ungrouped 1x1 convolution, as one convolution.

    Raises:
        ValueError: if the kernel is larger, because zeros padded behind the norm are not zeros padded before it; or if
            the norm keeps no running statistics.
    """
    height, width = kernel.weight.shape[-2:]
    if height != 1 or width != 1:
        raise ValueError(f'cannot fold a norm into a {height}x{width} kernel behind it, only into a 1x1 one')
    scale = norm_scale(norm)
    shift = -norm.running_mean * scale if norm.bias is None else norm.bias - norm.running_mean * scale
    bias = kernel.bias + (kernel.weight[..., 0, 0] @ shift[..., None])[..., 0]
    return Kernel(kernel.weight * scale[..., None, :, None, None], bias)


class KeptKernel:
    """A kernel and copies of what it was computed from.

    Version counters would be cheaper to compare, but nothing that writes through ``tensor.data`` moves them: EMA's
    swaps, fused optimizers, ``vector_to_parameters``, NumPy views.

    Args:
        kernel: The kernel.
        tensors: All parameters and buffers that it depends on.
        epsilons: Those of the block's norms.
    """

    def __init__(self, kernel: Kernel, tensors: list[Tensor], epsilons: list[float]) -> None:
        self.kernel = kernel
        self.copies = [tensor.clone() for tensor in tensors]
        self.epsilons = epsilons

    def matches(self, tensors: list[Tensor], epsilons: list[float]) -> bool:
        """Whether the kernel was computed from these very values: every element is compared."""
        return (
            epsilons == self.epsilons
            and len(tensors) == len(self.copies)
            and all(
                tensor.dtype == copied.dtype and tensor.device == copied.device and torch.equal(tensor, copied)
                for tensor, copied in zip(tensors, self.copies, strict=True)
            )
        )


class ReparamBlock(nn.Module, ABC):
    """Linear branches and BatchNorms that together equal one convolution.

    A subclass states the function twice: :meth:`branches` runs it as it is trained, :meth:`equivalent_kernel` gives
    the convolution it equals. Which of them :meth:`forward` takes depends on the BatchNorms alone.

    Args:
        stride: Stride of the equivalent convolution.
        padding: Its zero padding.
        groups: Its groups.

    Its dilation is 1 until :func:`~repvit_mm.layers.dilate` changes it.
    """

    folds = True
    """Whether frozen statistics make the block run as one convolution; see :func:`plain_formulation`."""
    recomputes = True
    """Whether the one convolution takes part in what :mod:`~repvit_mm.recompute` does."""

    def __init__(self, stride: int, padding: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding
        self.dilation = 1
        self.groups = groups
        self._kept: KeptKernel | None = None
        self._shared: Kernel | None = None  # see kernels_together

    @abstractmethod
    def branches(self, x: Tensor) -> Tensor:
        """The block as it is trained, ``(N, C_in, H, W)`` to ``(N, C_out, H', W')``."""

    @abstractmethod
    def equivalent_kernel(self) -> Kernel:
        """The one convolution that the block equals while its statistics are frozen, differentiable."""

    def statistics_frozen(self) -> bool:
        """Whether every BatchNorm of the block is a fixed affine map (``eval`` mode, running statistics kept)."""
        return all(
            not module.training and module.running_mean is not None
            for module in tree_of(self)
            if isinstance(module, BatchNorm)
        )

    def runs_folded(self) -> bool:
        """Whether :meth:`forward` runs one convolution, not the branches.

        A hook on a module inside the block has to see that module called, or may give it another weight.
        """
        if not (self.folds and self.statistics_frozen()):
            return False
        return not (runs_eagerly() and any(map(has_hooks, tree_of(self)[1:])))

    def kernel(self) -> Kernel:
        """:meth:`equivalent_kernel`, computed once for as long as no gradient flows into it and nothing has changed.

        On a CPU, that is. On a GPU comparing takes longer than computing, see :func:`kernels_together`.
        """
        if self._shared is not None:
            return self._shared
        if not runs_eagerly():
            return self.equivalent_kernel()
        tensors = [tensor for tensor in tensors_of(self) if tensor.is_floating_point()]
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if learns or any(tensor.device.type != 'cpu' for tensor in tensors):
            self._kept = None
            return self.equivalent_kernel()
        epsilons = [module.eps for module in tree_of(self) if isinstance(module, BatchNorm)]
        kept = self._kept
        if kept is None or not kept.matches(tensors, epsilons):
            # Tensors made in inference mode could not be used outside it.
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept = KeptKernel(self.equivalent_kernel(), tensors, epsilons)
        return kept.kernel

    def forward(self, x: Tensor) -> Tensor:
        if not self.runs_folded():
            return self.branches(x)
        options = self.stride, self.padding, self.dilation, self.groups
        return convolve(x, *self.kernel(), *options, recomputes=self.recomputes)

    def train(self, mode: bool = True) -> 'ReparamBlock':
        self._kept = None  # its memory is not needed while branches run
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_kept': None, '_shared': None}

    @torch.no_grad()
    def to_conv(self) -> nn.Conv2d:
        """The block as a plain convolution of the same device, dtype and mode, folded in float64.

        Raises:
            ValueError: if a BatchNorm keeps no running statistics, or a hook computes a weight before each pass.
        """
        for name, module in self.named_modules():
            for attribute, value in vars(module).items():
                if isinstance(value, Tensor):  # no parameter and no buffer
                    raise ValueError(
                        f'a hook computes {name}.{attribute} of a {type(self).__name__} anew in each pass (pruning, '
                        'weight norm): make it permanent before fusing, with torch.nn.utils.prune.remove or its like'
                    )
        # A SyncBatchNorm's process group cannot be copied; the copy shares it.
        process_groups = [getattr(module, 'process_group', None) for module in self.modules()]
        twin = copy.deepcopy(self, {id(group): group for group in process_groups if group is not None})
        like = next(self.parameters())
        device = 'cpu' if like.device.type == 'mps' else like.device  # which has no float64
        weight, bias = twin.to(device, torch.float64).equivalent_kernel()
        out_channels, in_channels_per_group, *size = weight.shape
        conv = nn.Conv2d(
            in_channels_per_group * self.groups,
            out_channels,
            tuple(size),
            self.stride,
            self.padding,
            self.dilation,
            groups=self.groups,
            device=like.device,
            dtype=like.dtype,
        )
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
        return conv.train(self.training).requires_grad_(like.requires_grad)


def reparam_blocks(model: nn.Module) -> list[ReparamBlock]:
    """The outermost re-parameterizable blocks of a module tree: the ones that deploying replaces."""
    if isinstance(model, ReparamBlock):
        return [model]
    return [block for child in model.children() for block in reparam_blocks(child)]


def switch_to_deploy(model: nn.Module, blocks: Collection[ReparamBlock] | None = None) -> nn.Module:
    """Replace each re-parameterizable block in a module tree by the one convolution that it equals.

    Works in place and leaves every other module, and each module's device, dtype and mode, as it is. A model without
    such blocks, a fused one say, comes back unchanged.

    Args:
        model: Any module: a backbone, a whole detector, one wrapped for distributed running.
        blocks: The blocks to replace; all outermost ones unless given.

    Returns:
        The same ``model``; only if it is itself a block, the convolution that takes its place.

    Raises:
        ValueError: if a BatchNorm keeps no running statistics, or a hook computes a weight (pruning). Nothing is
            replaced then.
    """
    # Every kernel is computed before the first block is replaced; a block used in two places stays one convolution.
    convs = {block: block.to_conv() for block in (reparam_blocks(model) if blocks is None else blocks)}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and module in convs:
            parent, _, name = path.rpartition('.')
            setattr(model.get_submodule(parent), name, convs[module])
    return convs.get(model, model)


class _KernelOf(nn.Module):
    """A block's equivalent kernel as a module's output, which is what ``functional_call`` calls."""

    def __init__(self, block: ReparamBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self) -> Kernel:
        return self.block.equivalent_kernel()


def equivalent_kernels(blocks: Iterable[ReparamBlock]) -> dict[ReparamBlock, Kernel]:
    """The equivalent kernels of many blocks, those of blocks of one kind and size computed together.

    This takes a fraction of the operations that folding block by block takes, but it copies the parameters. It pays
    off on a GPU, where each of these operations takes longer to launch than to run.
    """
    alike: dict[Any, list[ReparamBlock]] = {}
    for block in blocks:
        modules = tuple((type(module), getattr(module, 'eps', None)) for module in tree_of(block))
        tensors = tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in tensors_of(block))
        alike.setdefault((modules, tensors), []).append(block)
    kernels = {}
    for group in alike.values():
        columns: dict[str, list[Tensor]] = {}
        for block in group:
            for name, tensor in (*block.named_parameters(), *block.named_buffers()):
                if tensor.is_floating_point():
                    columns.setdefault(f'block.{name}', []).append(tensor)
        stacks = {name: torch.stack(column) for name, column in columns.items()}
        weights, biases = functional_call(_KernelOf(group[0]), stacks, ())
        kernels.update(zip(group, map(Kernel, weights.unbind(), biases.unbind()), strict=True))
    return kernels


@contextmanager
def kernels_together(model: nn.Module) -> Iterator[None]:
    """Within the context the frozen blocks of ``model`` use kernels that are computed together at its beginning."""
    blocks = [block for block in reparam_blocks(model) if block.runs_folded()]
    kernels = equivalent_kernels(dict.fromkeys(blocks))
    for block, kernel in kernels.items():
        block._kept, block._shared = None, kernel
    try:
        yield
    finally:
        for block in kernels:
            block._shared = None


@contextmanager
def plain_formulation(model: nn.Module) -> Iterator[None]:
    """Within the context the blocks of ``model`` run their branches even where the statistics are frozen.

    This is the second formulation of the same function: what folding is checked and measured against.
    """
    before = {block: block.folds for block in model.modules() if isinstance(block, ReparamBlock)}
    for block in before:
        block.folds = False
    try:
        yield
    finally:
        for block, folds in before.items():
            block.folds = folds
