"""Structural re-parameterization: blocks of linear branches that equal one convolution.

The idea is RepVGG's (https://arxiv.org/abs/2101.03697). Here it is written down once: a :class:`ReparamBlock` states
its equivalent kernel as a differentiable function of its own parameters. Three things follow from that one statement.

* With live BatchNorm statistics the block runs its branches.
* With frozen statistics it runs one convolution with the equivalent kernel: same output, same gradients.
* :func:`switch_to_deploy` writes the kernel into a plain ``nn.Conv2d`` in the block's place.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .compat.pytorch import BatchNorm, has_hooks, in_backward, multiply_each, named_tree_of, tensors_of, tree_of
from .recompute import convolve, runs_eagerly


class Kernel(NamedTuple):
    """A convolution as two tensors: weight ``(C_out, C_in / groups, kH, kW)`` and bias ``(C_out,)``."""

    weight: Tensor
    bias: Tensor


Scale = Tensor | float
"""A factor for each output channel, ``(C_out,)``, or one for all."""


class Term(NamedTuple):
    """A kernel whose output channels are scaled."""

    weight: Tensor | None
    """``(C_out, C_in / groups, kH, kW)``, that of a linear layer ``(C_out, C_in)``; ``None`` for the identity."""
    scale: Scale = 1.0


class KernelSum(NamedTuple):
    """Parallel convolutions that are not added up yet: what a block's branches are once its norms are folded.

    Norms and layer scales multiply output channels. So the algebra below handles vectors of one number for each channel
    and leaves the weights, which are a thousand times as large, for the end: :func:`add_up` goes over each once.
    """

    terms: tuple[Term, ...]
    """The first one that is no identity has the largest kernel."""
    bias: Tensor | None = None
    """``(C_out,)``; ``None`` for zero."""


def conv_kernel(layer: nn.Conv2d | nn.Linear) -> KernelSum:
    """The kernel of a convolution, or of a linear layer over the channels (a 1x1 one)."""
    return KernelSum((Term(layer.weight),), layer.bias)


def identity_kernel() -> KernelSum:
    """The kernel that leaves a map as it is."""
    return KernelSum((Term(None),))


def add_kernels(*kernels: KernelSum) -> KernelSum:
    """The sum of parallel convolutions; the first one has the largest kernel."""
    biases = [kernel.bias for kernel in kernels if kernel.bias is not None]
    return KernelSum(tuple(term for kernel in kernels for term in kernel.terms), sum(biases[1:], *biases[:1] or [None]))


def scale_kernel(kernel: KernelSum, scale: Scale) -> KernelSum:
    """A convolution followed by a factor for each channel."""
    terms = tuple(Term(weight, scale if _is_one(before) else before * scale) for weight, before in kernel.terms)
    return KernelSum(terms, None if kernel.bias is None else kernel.bias * scale)


def subtract_kernel(first: KernelSum, second: KernelSum) -> KernelSum:
    """The difference of parallel convolutions; the first one has the larger kernel."""
    return add_kernels(first, scale_kernel(second, -1.0))


def norm_scale(norm: BatchNorm) -> Tensor:
    """The factor of each channel, ``(C,)``, by which a BatchNorm with frozen statistics multiplies.

    Raises:
        ValueError: if the norm keeps no running statistics, so that it is no fixed function.
    """
    if norm.running_mean is None:
        raise ValueError(f'{norm} keeps no running statistics: only a norm with track_running_stats=True can be folded')
    scale = torch.rsqrt(norm.running_var + norm.eps)
    return scale if norm.weight is None else scale * norm.weight


def norm_shift(norm: BatchNorm, scale: Tensor, given: Tensor | None = None) -> Tensor:
    """What a BatchNorm with frozen statistics makes of the constant map ``given`` ``(C,)``; of zero by default.

    Args:
        norm: The norm.
        scale: Its :func:`norm_scale`.
        given: The map's value in each channel.
    """
    offset, factor = (norm.running_mean, -1.0) if given is None else (given - norm.running_mean, 1.0)
    return factor * offset * scale if norm.bias is None else torch.addcmul(norm.bias, offset, scale, value=factor)


def fold_norm(kernel: KernelSum, norm: BatchNorm) -> KernelSum:
    """A convolution followed by a BatchNorm with frozen statistics, as one convolution.

    Raises:
        ValueError: if the norm keeps no running statistics, so that it is no fixed function.
    """
    scale = norm_scale(norm)
    return KernelSum(scale_kernel(KernelSum(kernel.terms), scale).terms, norm_shift(norm, scale, kernel.bias))


def fold_norm_before(norm: BatchNorm, kernel: KernelSum) -> KernelSum:
    """A BatchNorm with frozen statistics followed by an ungrouped 1x1 convolution, as one convolution.

    Raises:
        ValueError: if the kernel is larger, because zeros padded behind the norm are not zeros padded before it; or if
            the norm keeps no running statistics.
    """
    weight, bias = add_up(kernel)
    height, width = weight.shape[-2:]
    if height != 1 or width != 1:
        raise ValueError(f'cannot fold a norm into a {height}x{width} kernel behind it, only into a 1x1 one')
    scale = norm_scale(norm)
    matrix = weight[..., 0, 0]
    return KernelSum((Term(matrix * scale),), torch.addmv(bias, matrix, norm_shift(norm, scale)))


def add_up(kernel: KernelSum) -> Kernel:
    """The one convolution that parallel ones equal."""
    weight = add_weights(kernel.terms)
    return Kernel(weight, weight.new_zeros(len(weight)) if kernel.bias is None else kernel.bias)


def add_weights(terms: Iterable[Term]) -> Tensor:
    """The weight ``(C_out, C_in / groups, kH, kW)`` of :func:`add_up`."""
    first, *others = sorted(terms, key=lambda term: term.weight is None)  # what an identity looks like, others tell
    total = _scaled(first.weight, first.scale)
    total = total[..., None, None] if total.ndim == 2 else total
    for weight, scale in others:
        if weight is None:
            total = total + _scaled(identity_weight(total), scale)
        else:
            scaled = _scaled(weight, scale)
            total = total + pad_weight(scaled[..., None, None] if scaled.ndim == 2 else scaled, total.shape[2:])
    return total


def identity_weight(like: Tensor) -> Tensor:
    """The weight that leaves a map as it is, for the channels, groups, size, dtype and device of ``like``."""
    out_channels, in_channels_per_group, height, width = like.shape
    # Output channel c of a group takes its input channel c. Not nn.init.dirac_, which takes a step for each channel.
    # In float32 first: before torch 2.2 there is none in bfloat16.
    centre = torch.eye(in_channels_per_group, device=like.device).to(like.dtype)
    centre = centre.repeat(out_channels // in_channels_per_group, 1)[:, :, None, None]
    return pad_weight(centre, (height, width))


def pad_weight(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """The same convolution with a larger kernel of ``size`` (kH, kW), zero around the old one."""
    (height, width), (old_height, old_width) = size, weight.shape[2:]
    more_y, more_x = int(height - old_height), int(width - old_width)  # sizes are tensors while a network is traced
    if more_y < 0 or more_x < 0 or more_y % 2 or more_x % 2:
        raise ValueError(f'cannot centre a {old_height}x{old_width} kernel in a {height}x{width} one')
    pad_y, pad_x = more_y // 2, more_x // 2
    return F.pad(weight, (pad_x, pad_x, pad_y, pad_y)) if more_y or more_x else weight


def _is_one(scale: Scale) -> bool:
    return not isinstance(scale, Tensor) and scale == 1


def _for_rows(scale: Tensor, weight: Tensor) -> Tensor:
    """A scale in a shape that multiplies the rows of a weight."""
    return scale.view(-1, *(1,) * (weight.ndim - 1))


def _scaled(weight: Tensor, scale: Scale) -> Tensor:
    """A weight, its rows multiplied."""
    if isinstance(scale, Tensor):
        return weight * _for_rows(scale, weight)
    return weight if scale == 1 else weight * scale


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

    A subclass states the function twice: :meth:`branches` runs it as it is trained, :meth:`folded_branches` gives the
    kernels that add up to the convolution it equals. Which of them :meth:`forward` takes depends on the BatchNorms
    alone.

    Args:
        stride: Stride of the equivalent convolution.
        padding: Its zero padding.
        groups: Its groups.

    Its dilation is 1 until :func:`~repvit_mm.layers.dilate` changes it.
    """

    folds = True
    """Whether frozen statistics make the block run as one convolution; see :func:`plain_formulation`."""
    by_rows = False
    """Whether :meth:`folded_branches` only scales output channels, so that many blocks are folded as if they were one;
    see :func:`equivalent_kernels`."""
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
        self._learned: tuple[bool, ...] | None = None  # which parts of the last shared kernel got gradients

    @abstractmethod
    def branches(self, x: Tensor) -> Tensor:
        """The block as it is trained, ``(N, C_in, H, W)`` to ``(N, C_out, H', W')``."""

    @abstractmethod
    def folded_branches(self) -> KernelSum:
        """The block's branches while its statistics are frozen, differentiable."""

    def equivalent_kernel(self) -> Kernel:
        """The one convolution that the block equals while its statistics are frozen, differentiable."""
        return add_up(self.folded_branches())

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

    def keeps_kernel(self) -> bool:
        """Whether :meth:`kernel` compares what the block is made of instead of folding it anew.

        It does while nothing learns, on a CPU. On a GPU comparing takes longer than folding.
        """
        learns = torch.is_grad_enabled()
        return not any(tensor.device.type != 'cpu' or (learns and tensor.requires_grad) for tensor in tensors_of(self))

    def kernel(self) -> Kernel:
        """:meth:`equivalent_kernel`, computed once for as long as no gradient flows into it and nothing has changed.

        On a CPU, that is; where gradients flow and on a GPU, see :func:`kernels_together`.
        """
        if self._shared is not None:
            learns = torch.is_grad_enabled()
            self._learned = tuple(part.requires_grad for part in self._shared) if learns else None
            return self._shared
        if not runs_eagerly():
            return self.equivalent_kernel()
        if not self.keeps_kernel():
            self._kept = None
            if in_backward() and self._learned is not None:
                return self._kernel_again(self._learned)
            self._learned = None
            return self.equivalent_kernel()
        tensors = [tensor for tensor in tensors_of(self) if tensor.is_floating_point()]
        epsilons = [module.eps for module in tree_of(self) if isinstance(module, BatchNorm)]
        kept = self._kept
        if kept is None or not kept.matches(tensors, epsilons):
            # Tensors made in inference mode could not be used outside it.
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept = KeptKernel(self.equivalent_kernel(), tensors, epsilons)
        return kept.kernel

    def _kernel_again(self, learned: Iterable[bool]) -> Kernel:
        """The kernel for the second run of a block whose first run was handed a shared one.

        Checkpointing runs it in the backward pass, for the tensors that operations had saved. Gradients flow through
        the first run, so this kernel is a value alone; but operations have to save it as they saved the first one. A
        first run without gradients is the older way of checkpointing: there they flow through the second.
        """
        with torch.no_grad():
            kernel = self.equivalent_kernel()
        return Kernel(*(part.detach().requires_grad_(learns) for part, learns in zip(kernel, learned, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        if self._shared is None and not self.runs_folded():
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


class _BranchesOf(nn.Module):
    """A block's folded branches as a module's output, which is what ``functional_call`` calls."""

    def __init__(self, block: ReparamBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self) -> KernelSum:
        return self.block.folded_branches()


class _Joined(torch.autograd.Function):
    """Tensors one behind the other. Their gradients are parts of one tensor, taken in one operation.

    It is a copy: of two summands the gradient is one and the same tensor. Parameters hold their gradients and add to
    them in place, so no two may share memory.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.rows = [len(tensor) for tensor in tensors]
        return torch.cat(tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.clone().split(ctx.rows)


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else _Joined.apply(*tensors)


class _ScaledRows(torch.autograd.Function):
    """Weights, each times its scale: ``(*weights, *scales)`` to the products.

    The gradients of the products are overwritten: convolutions make them, and nobody else gets them.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        count = len(tensors) // 2
        return tuple(multiply_each(tensors[:count], tensors[count:])) if count else ()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        count = len(tensors) // 2
        weights, scales = tensors[:count], tensors[count:]
        of_scales: Sequence[Tensor | None] = [None] * count
        if any(ctx.needs_input_grad[count:]):
            of_scales = [
                (grad * weight).sum(tuple(range(1, weight.ndim)), keepdim=True)
                for grad, weight in zip(grads, weights, strict=True)
            ]
        return *multiply_each(grads, scales, in_place=not torch.is_grad_enabled()), *of_scales


class _Folding(NamedTuple):
    """A block, taken apart.

    Args:
        block: The block.
        kind: What blocks have in common whose vectors are folded together.
        vectors: Name -> its parameters and buffers of one number for each channel.
        weights: Name -> its other parameters.
    """

    block: ReparamBlock
    kind: tuple[Any, ...]
    vectors: dict[str, Tensor]
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, block: ReparamBlock) -> '_Folding | None':
        """``None`` if the block is folded by itself."""
        kind: list[Any] = []
        vectors, weights = {}, {}
        for prefix, module in named_tree_of(block):
            if isinstance(module, ReparamBlock):
                if not module.by_rows:
                    return None
            elif not isinstance(module, _PLAIN):
                return None  # a parametrization, say
            kind.append((prefix, type(module), getattr(module, 'eps', None)))
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.ndim:  # a norm counts its batches
                    (weights if tensor.ndim in (2, 4) else vectors)[prefix + name] = tensor
                    kind.append((name, tensor.dtype, tensor.device, tensor.requires_grad))
        return cls(block, tuple(kind), vectors, weights)

    @property
    def rows(self) -> int:
        """Output channels."""
        return len(next(iter(self.weights.values())))

    @property
    def unit(self) -> Any:
        """What blocks have in common whose weights are added up together: small ones, depthwise and of one size."""
        shapes = tuple(weight.shape[1:] for weight in self.weights.values())
        return shapes if all(len(shape) == 3 and shape[0] == 1 for shape in shapes) else self.block


_PLAIN = (nn.Conv2d, nn.Linear, BatchNorm, nn.ModuleList)
"""What a block that is folded with others may have inside, beside further blocks."""


class _Unit(NamedTuple):
    """Blocks whose weights are one behind the other, and their branches."""

    blocks: list[ReparamBlock]
    rows: list[int]
    terms: list[Term]
    biases: Sequence[Tensor | None]

    @property
    def is_single(self) -> bool:
        """Whether it is one weight, times a scale."""
        return len(self.terms) == 1 and isinstance(self.terms[0].scale, Tensor)

    @property
    def learns(self) -> bool:
        """Whether a gradient flows into its first weight or the scale of that."""
        weight, scale = self.terms[0]
        return weight.requires_grad or scale.requires_grad


def _fold_vectors(group: Iterable[_Folding]) -> Iterator[_Unit]:
    """The branches of blocks of one kind, whose vectors are folded as if they were those of one block."""
    units: dict[Any, list[_Folding]] = {}
    for folding in group:
        units.setdefault(folding.unit, []).append(folding)
    members = [folding for unit in units.values() for folding in unit]
    first = members[0]
    joined = {f'block.{name}': _join([each.vectors[name] for each in members]) for name in first.vectors}
    terms, bias = functional_call(_BranchesOf(first.block), joined, (), tie_weights=False)
    names = {weight: name for name, weight in first.weights.items()}
    rows = [[folding.rows for folding in unit] for unit in units.values()]
    # In the shape that multiplies a weight: a view for all, not one for each.
    scales = [
        _for_rows(scale, next(iter(first.weights.values()))).split([sum(each) for each in rows])
        if isinstance(scale, Tensor)
        else [scale] * len(units)
        for _, scale in terms
    ]
    biases = iter([None] * len(members) if bias is None else bias.split([folding.rows for folding in members]))
    for index, unit in enumerate(units.values()):
        weights = [None if weight is None else _join([u.weights[names[weight]] for u in unit]) for weight, _ in terms]
        unit_terms = [Term(weight, scale[index]) for weight, scale in zip(weights, scales, strict=True)]
        yield _Unit([each.block for each in unit], rows[index], unit_terms, list(islice(biases, len(unit))))


def equivalent_kernels(blocks: Iterable[ReparamBlock]) -> dict[ReparamBlock, Kernel]:
    """The equivalent kernels of many blocks, folded together.

    What block by block takes thousands of small operations takes about as many here as a network has convolutions. The
    vectors of all blocks of one kind are folded as one long vector. Weights are multiplied by their scales in place
    of their norms; those of depthwise kernels lie one behind the other. Gradients go the same way back.
    """
    kernels: dict[ReparamBlock, Kernel] = {}
    alike: dict[Any, list[_Folding]] = {}
    for block in blocks:
        folding = _Folding.of(block)
        if folding is None:
            kernels[block] = block.equivalent_kernel()
        else:
            alike.setdefault(folding.kind, []).append(folding)
    units = [unit for group in alike.values() for unit in _fold_vectors(group)]
    for learning in (True, False):  # what does not learn gets no gradient
        single = [unit for unit in units if unit.is_single and unit.learns is learning]
        terms = [term for unit in single for term in unit.terms]
        products = _ScaledRows.apply(*(term.weight for term in terms), *(term.scale for term in terms))
        for unit, product in zip(single, products, strict=True):
            unit.terms[:] = [Term(product)]
    for unit in units:
        weight = add_weights(unit.terms)
        parts = [weight] if len(unit.blocks) == 1 else weight.split(unit.rows)
        for block, part, bias in zip(unit.blocks, parts, unit.biases, strict=True):
            kernels[block] = Kernel(part, part.new_zeros(len(part)) if bias is None else bias)
    return kernels


@contextmanager
def kernels_together(model: nn.Module) -> Iterator[None]:
    """Within the context the frozen blocks of ``model`` use kernels that are folded together at its beginning.

    Blocks that keep their kernels go on doing so.
    """
    blocks = [block for block in reparam_blocks(model) if block.runs_folded() and not block.keeps_kernel()]
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
