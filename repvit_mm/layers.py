"""What the backbones are built from."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compat.pytorch import ConvOptions, add_conv_, autocast_dtype, conv_activated, fuses_into_convolutions, gelu_
from .recompute import convolve, recipe_of, recomputable, runs_eagerly
from .reparam import (
    KernelSum,
    ReparamBlock,
    add_kernels,
    conv_kernel,
    fold_norm,
    fold_norm_before,
    identity_kernel,
    scale_kernel,
)


class ConvBN(ReparamBlock):
    """Convolution without bias and BatchNorm; odd kernels, "same" padding.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel, odd.
        stride: Stride of the convolution.
        groups: Groups of the convolution.
        norm_weight: Initial weight of the norm; with 0 a residual branch adds nothing at first.
    """

    by_rows = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        norm_weight: float = 1.0,
    ) -> None:
        super().__init__(stride, kernel_size // 2, groups)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, self.padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.constant_(self.bn.weight, norm_weight)

    def branches(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def folded_branches(self) -> KernelSum:
        return fold_norm(conv_kernel(self.conv), self.bn)


class MobileOneBlock(ReparamBlock):
    """Convolution branches, a 1x1 branch and a skip branch, each with its own BatchNorm, summed.

    There is a 1x1 branch if the kernel is larger than 1x1, and a skip branch if input and output have one shape. These
    are only the linear parts of MobileOne's block (https://arxiv.org/abs/2206.04040): gate and activation follow it.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the convolution branches' kernels, odd.
        stride: Stride of the block.
        groups: Groups of its convolutions.
        num_convs: Number of convolution branches, at least 1.
    """

    by_rows = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        num_convs: int = 1,
    ) -> None:
        super().__init__(stride, kernel_size // 2, groups)
        self.convs = nn.ModuleList(
            ConvBN(in_channels, out_channels, kernel_size, stride, groups) for _ in range(num_convs)
        )
        self.scale = ConvBN(in_channels, out_channels, 1, stride, groups) if kernel_size > 1 else None
        self.skip = nn.BatchNorm2d(in_channels) if in_channels == out_channels and stride == 1 else None

    def branches(self, x: Tensor) -> Tensor:
        y = self.convs[0](x)
        for branch in (*self.convs[1:], self.scale, self.skip):
            if branch is not None:
                y = y + branch(x)
        return y

    def folded_branches(self) -> KernelSum:
        kernels = [conv.folded_branches() for conv in self.convs]
        if self.scale is not None:
            kernels.append(self.scale.folded_branches())
        if self.skip is not None:
            kernels.append(fold_norm(identity_kernel(), self.skip))
        return add_kernels(*kernels)


class Conv1x1(nn.Conv2d):
    """1x1 convolution with bias. It saves the recipe of its input for the backward pass, if there is one.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if recipe_of(x) is None else convolve(x, self.weight, self.bias, 1, 0, 1, 1)


_OVERWRITING = ContextVar('overwriting', default=False)


@contextmanager
def overwriting(allowed: bool) -> Iterator[None]:
    """Within the context activations and residual sums may overwrite their operand instead of allocating memory.

    Args:
        allowed: ``False`` if something else may still use the operand, for example a hook that was given it.
    """
    token = _OVERWRITING.set(allowed)
    try:
        yield
    finally:
        _OVERWRITING.reset(token)


def overwrites() -> bool:
    """Whether an operand may be overwritten here: :func:`overwriting` allows it and no gradient is recorded."""
    return runs_eagerly() and not torch.is_grad_enabled() and _OVERWRITING.get()


class GELU(nn.GELU):
    """Exact GELU that may overwrite its input, see :func:`overwriting`."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu_(x) if overwrites() else recomputable(F.gelu, x)


class ReLU(nn.ReLU):
    """ReLU that may overwrite its input, see :func:`overwriting`.

    Autograd keeps the output of a ReLU, and the next convolution keeps the same tensor as its input. So recomputing it
    saves memory only where its input is recomputed too: behind a depthwise convolution, but not behind a 1x1 one.
    """

    def forward(self, x: Tensor) -> Tensor:
        if overwrites():
            return torch.relu_(x)
        return F.relu(x) if recipe_of(x) is None else recomputable(F.relu, x)


_ALONG = ContextVar('along', default=True)


@contextmanager
def module_by_module() -> Iterator[None]:
    """Within the context no convolution takes an activation or a residual sum along."""
    token = _ALONG.set(False)
    try:
        yield
    finally:
        _ALONG.reset(token)


def activated(conv: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """``act(conv(x))``, in one operation where oneDNN offers it and no module in between has to be called.

    Args:
        conv: What equals one convolution, fused or not.
        act: Its activation.
        x: Map ``(N, C_in, H, W)``.
    """
    name = {GELU: 'gelu', ReLU: 'relu'}.get(type(act))
    single = _single_convolution(conv, x) if name else None
    return act(conv(x)) if single is None else conv_activated(x, *single, name)


def add_convolved(x: Tensor, conv: nn.Module, drop_path: nn.Module, hidden: Tensor) -> Tensor:
    """``x + drop_path(conv(hidden))`` likewise, by adding to ``x`` where a residual sum may overwrite its operand.

    Args:
        x: Map ``(N, C, H, W)`` that nobody else holds.
        conv: What equals one convolution, fused or not.
        drop_path: What stands between the convolution and the sum; nothing in evaluation.
        hidden: Map ``(N, C_in, H, W)``.
    """
    idle = isinstance(drop_path, StochasticDepth) and not (drop_path.training and drop_path.rate)
    single = _single_convolution(conv, hidden) if idle and x.dtype is hidden.dtype else None
    if single is None or not x.is_contiguous(memory_format=torch.channels_last):
        return add_residual(x, drop_path(conv(hidden)))
    return add_conv_(x, hidden, *single)


def _single_convolution(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, ConvOptions] | None:
    """Weight, bias and options of what runs as one convolution, where oneDNN's own operators may run it.

    In float32 alone: in bfloat16 they are no faster.
    """
    if not (overwrites() and x.device.type == 'cpu' and x.dtype is torch.float32):
        return None
    if autocast_dtype('cpu') or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    if not (_ALONG.get() and torch.backends.mkldnn.enabled and fuses_into_convolutions()):
        return None
    if isinstance(conv, ReparamBlock) and conv.runs_folded():
        weight, bias = conv.kernel()
        options = conv.stride, conv.padding, conv.dilation, conv.groups
    elif type(conv) in (nn.Conv2d, Conv1x1):
        weight, bias = conv.weight, conv.bias
        options = conv.stride[0], conv.padding[0], conv.dilation[0], conv.groups
    else:
        return None
    return (weight, bias, options) if weight.dtype is torch.float32 else None


def add_residual(x: Tensor, branch: Tensor) -> Tensor:
    """``x + branch``, which may overwrite ``branch``, see :func:`overwriting`."""
    return branch.add_(x) if overwrites() and branch.dtype is x.dtype else x + branch


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (https://arxiv.org/abs/1709.01507): a gate for each channel, from the means of all.

    Args:
        channels: Channels of the map.
        hidden_channels: Width of the bottleneck.
    """

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden_channels, 1)
        self.act = nn.ReLU()
        self.fc2 = nn.Conv2d(hidden_channels, channels, 1)

    def gate(self, x: Tensor) -> Tensor:
        """The gate of each channel, ``(N, C, 1, 1)``, in (0, 1)."""
        return self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return x * gate if recipe_of(x) is None else recomputable(torch.mul, x, gate)


class StochasticDepth(nn.Module):
    """Drops a residual branch for whole images during training (https://arxiv.org/abs/1603.09382).

    Args:
        rate: Probability with which an image's branch is dropped, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * (kept / keep)

    def extra_repr(self) -> str:
        return f'rate={self.rate:.3g}'


class ChannelLinear(nn.Linear):
    """Linear layer over the channels of a map, ``(N, C_in, H, W)`` to ``(N, C_out, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class NormLinear(ReparamBlock):
    """BatchNorm and a linear layer over the channels behind it.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        bias: Whether the linear layer has a bias.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = False) -> None:
        super().__init__(stride=1, padding=0, groups=1)
        self.norm = nn.BatchNorm2d(in_channels)
        self.linear = ChannelLinear(in_channels, out_channels, bias=bias)

    def branches(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    def folded_branches(self) -> KernelSum:
        return fold_norm_before(self.norm, conv_kernel(self.linear))


class LayerScale(ReparamBlock):
    """A layer and a learned factor for each of its output channels (https://arxiv.org/abs/2103.17239).

    Without a BatchNorm it is one convolution in every mode.

    Args:
        layer: The layer, a 1x1 convolution or a :class:`ChannelLinear`.
        channels: Channels of its output.
        init_scale: Initial factor.
    """

    by_rows = True

    def __init__(self, layer: nn.Conv2d | ChannelLinear, channels: int, init_scale: float) -> None:
        super().__init__(stride=1, padding=0, groups=1)
        self.layer = layer
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), init_scale))

    def branches(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.layer_scale

    def folded_branches(self) -> KernelSum:
        return scale_kernel(conv_kernel(self.layer), self.layer_scale[..., 0, 0])


def dilate(stage: nn.Module, before: int, dilation: int) -> None:
    """Make a stage keep the resolution of its input without new weights (the algorithme a trous).

    Its map then holds, at every ``dilation``-th place, what the strided network computes there, and the same for the
    places between them. Source: https://arxiv.org/abs/1412.7062, section 3.1.

    Args:
        stage: Blocks of which at most one layer has a stride.
        before: Dilation of the stage before it, which becomes that layer's.
        dilation: Dilation of all layers behind that layer.
    """
    for layer in stage.modules():
        if isinstance(layer, ReparamBlock):
            factor = before if layer.stride > 1 else dilation
            # A 1x1 kernel has nothing to dilate.
            layer.stride, layer.dilation, layer.padding = 1, factor if layer.padding else 1, factor * layer.padding
        elif isinstance(layer, nn.Conv2d):
            factor = before if layer.stride[0] > 1 else dilation
            layer.stride, layer.dilation = (1, 1), (factor if layer.padding[0] else 1,) * 2
            layer.padding = (factor * layer.padding[0],) * 2
