"""FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization (ICCV 2023).

Source: https://arxiv.org/abs/2303.14189.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from .backbone import ReparamBackbone
from .compat.pytorch import is_transforming, plain_attention
from .layers import (
    GELU,
    ChannelLinear,
    Conv1x1,
    ConvBN,
    LayerScale,
    MobileOneBlock,
    NormLinear,
    StochasticDepth,
    activated,
    add_convolved,
    add_residual,
)
from .names import FASTVIT_NAMES
from .recompute import convolve, training_dtype
from .reparam import (
    KernelSum,
    ReparamBlock,
    add_kernels,
    conv_kernel,
    fold_norm,
    identity_kernel,
    identity_weight,
    scale_kernel,
    subtract_kernel,
)
from .specs import FASTVIT_SPECS, FASTVIT_TOP1, HEAD_CHANNELS, FastViTSpec


class RepMixer(ReparamBlock):
    """Token mixer ``x + layer_scale * (mixer(x) - norm(x))``: one 3x3 depthwise convolution.

    Args:
        channels: Channels of the map.
        layer_scale: Initial layer scale.
    """

    by_rows = True

    def __init__(self, channels: int, layer_scale: float) -> None:
        super().__init__(stride=1, padding=1, groups=channels)
        self.mixer = MobileOneBlock(channels, channels, 3, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))

    def branches(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        """As every block. Where autocast trains it, the sum is float32, as the layer scale makes it in the branches."""
        if training_dtype(x) is None or not self.runs_folded():
            return super().forward(x)
        weight, bias = self.kernel()
        options = self.stride, self.padding, self.dilation, self.groups
        return convolve(x, weight - identity_weight(weight), bias, *options, recomputes=self.recomputes, residual=True)

    def folded_branches(self) -> KernelSum:
        difference = subtract_kernel(self.mixer.folded_branches(), fold_norm(identity_kernel(), self.norm))
        return add_kernels(scale_kernel(difference, self.layer_scale[..., 0, 0]), identity_kernel())


class Attention(nn.Module):
    """Residual self-attention among all places of a map.

    Args:
        channels: Channels of the map, a multiple of 32.
        layer_scale: Initial layer scale.
        drop_path_rate: Stochastic depth of the residual branch.
    """

    def __init__(self, channels: int, layer_scale: float, drop_path_rate: float) -> None:
        super().__init__()
        self.qkv = NormLinear(channels, 3 * channels)
        self.project = LayerScale(ChannelLinear(channels, channels), channels, layer_scale)
        self.drop_path = StochasticDepth(drop_path_rate)
        for linear in (self.qkv.linear, self.project.layer):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.project.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).flatten(2).unflatten(1, (3, -1, HEAD_CHANNELS))
        # Contiguous, (N, heads, H * W, 32): the kernels that keep no H * W x H * W weights take nothing else.
        query, key, value = heads.transpose(-2, -1).contiguous().unbind(1)
        # The fused kernels have no forward derivative and no rule for vmap.
        with plain_attention() if is_transforming() else nullcontext():
            mixed = F.scaled_dot_product_attention(query, key, value)
        branch = self.drop_path(self.project(mixed.transpose(-2, -1).reshape(x.shape)))
        # Float32, as the layer scale makes it in the branches.
        return add_residual(x if training_dtype(x) is None else x.float(), branch)


class ConvFFN(nn.Module):
    """Residual 7x7 depthwise -> 1x1 -> GELU -> 1x1 with a layer scale.

    Args:
        channels: Channels of the map.
        hidden_channels: Channels between the 1x1 convolutions.
        layer_scale: Initial layer scale.
        drop_path_rate: Stochastic depth of the residual branch.
    """

    def __init__(self, channels: int, hidden_channels: int, layer_scale: float, drop_path_rate: float) -> None:
        super().__init__()
        self.depthwise = ConvBN(channels, channels, 7, groups=channels)
        self.expand = Conv1x1(channels, hidden_channels)
        self.act = GELU()
        self.project = LayerScale(nn.Conv2d(hidden_channels, channels, 1), channels, layer_scale)
        self.drop_path = StochasticDepth(drop_path_rate)
        for conv in (self.depthwise.conv, self.expand, self.project.layer):
            nn.init.trunc_normal_(conv.weight, std=0.02)
        for conv in (self.expand, self.project.layer):
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = activated(self.expand, self.act, self.depthwise(x))
        return add_convolved(x, self.project, self.drop_path, hidden)


class Block(nn.Sequential):
    """Token mixer and channel mixer.

    Args:
        spec: Of the network.
        stage: Index of the stage, from 0 to 3.
        drop_path_rate: Stochastic depth of the residual branches; RepMixer has none.
    """

    def __init__(self, spec: FastViTSpec, stage: int, drop_path_rate: float) -> None:
        super().__init__()
        channels = spec.channels[stage]
        if spec.attention and stage == 3:
            self.token_mixer = Attention(channels, spec.layer_scale, drop_path_rate)
        else:
            self.token_mixer = RepMixer(channels, spec.layer_scale)
        self.channel_mixer = ConvFFN(channels, spec.mlp_ratio * channels, spec.layer_scale, drop_path_rate)


class LargeKernelConv(ReparamBlock):
    """7x7 and 3x3 branch of stride 2, each with its own BatchNorm, summed; depthwise with several outputs a channel.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, a multiple of ``in_channels``.
    """

    by_rows = True

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(stride=2, padding=3, groups=in_channels)
        self.large = ConvBN(in_channels, out_channels, 7, stride=2, groups=in_channels)
        self.small = ConvBN(in_channels, out_channels, 3, stride=2, groups=in_channels)

    def branches(self, x: Tensor) -> Tensor:
        return self.large(x) + self.small(x)

    def folded_branches(self) -> KernelSum:
        return add_kernels(self.large.folded_branches(), self.small.folded_branches())


class PositionEncoding(ReparamBlock):
    """Conditional position encoding (https://arxiv.org/abs/2102.10882): a 7x7 depthwise convolution and identity.

    Without a BatchNorm it is one convolution in every mode.

    Args:
        channels: Channels of the map.
    """

    by_rows = True

    def __init__(self, channels: int) -> None:
        super().__init__(stride=1, padding=3, groups=channels)
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)

    def branches(self, x: Tensor) -> Tensor:
        return self.conv(x) + x

    def folded_branches(self) -> KernelSum:
        return add_kernels(conv_kernel(self.conv), identity_kernel())


class Stem(nn.Module):
    """3x3 stride-2, 3x3 depthwise stride-2 and 1x1 block, each followed by a GELU.

    Args:
        out_channels: Channels of the first stage.
    """

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.conv1 = MobileOneBlock(3, out_channels, 3, stride=2)
        self.act1 = GELU()
        self.conv2 = MobileOneBlock(out_channels, out_channels, 3, stride=2, groups=out_channels)
        self.act2 = GELU()
        self.conv3 = MobileOneBlock(out_channels, out_channels, 1)
        self.act3 = GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = activated(self.conv1, self.act1, x)
        x = activated(self.conv2, self.act2, x)
        return activated(self.conv3, self.act3, x)


class PatchEmbedding(nn.Module):
    """Stride-2 block between two stages: large kernels for space, 1x1 for channels, position encoding if asked for.

    Args:
        in_channels: Channels of the stage before.
        out_channels: Channels of the stage that begins here.
        with_position: Whether a position encoding ends it, for attention.
    """

    def __init__(self, in_channels: int, out_channels: int, with_position: bool) -> None:
        super().__init__()
        # No activation between them: the released weights were trained without it.
        self.spatial = LargeKernelConv(in_channels, out_channels)
        self.channel = MobileOneBlock(out_channels, out_channels, 1)
        self.act = GELU()
        self.position = PositionEncoding(out_channels) if with_position else None

    def forward(self, x: Tensor) -> Tensor:
        x = activated(self.channel, self.act, self.spatial(x))
        return x if self.position is None else self.position(x)


@MODELS.register_module()
class FastViT(ReparamBackbone):
    """FastViT backbone for dense prediction.

    Source: https://arxiv.org/abs/2303.14189 and https://github.com/apple/ml-fastvit. Its four maps are the stages' own
    ends; in the authors' dense code the last map of the attention variants is taken before the attention.

    Args:
        arch: ``t8 t12 s12 sa12 sa24 sa36 ma36``, or a dict with the fields of
            :class:`~repvit_mm.specs.FastViTSpec`.
        out_indices: Stages whose maps are returned, increasing, from 0 to 3.
        out_norm: Put a BatchNorm behind each returned map, as the authors' dense code does. Classification weights
            have none: it starts fresh. It is not fused, and ``frozen_stages`` leaves it learning.
        options: Those of :class:`~repvit_mm.backbone.ReparamBackbone`.
    """

    specs = FASTVIT_SPECS
    top1 = FASTVIT_TOP1
    spec_type = FastViTSpec
    naming = FASTVIT_NAMES
    optional: ClassVar = {'out_norms.': 'it has output norms: set out_norm=True or take another file'}

    def __init__(self, arch: str | Mapping[str, Any] = 'sa12', *, out_norm: bool = False, **options: Any) -> None:
        super().__init__(arch, **options)
        self.out_norm = out_norm
        if out_norm:
            norms = {str(index): nn.BatchNorm2d(self.spec.channels[index]) for index in self.out_indices}
            self.out_norms = nn.ModuleDict(norms).train(self.training)

    def _make_stem(self) -> nn.Module:
        return Stem(self.spec.channels[0])

    def _stage_lengths(self) -> list[int]:
        return [depth + (index > 0) for index, depth in enumerate(self.spec.depths)]

    def _residual_lengths(self) -> list[int]:
        return list(self.spec.depths)

    def _make_stage(self, index: int, drop_path_rates: Sequence[float]) -> list[nn.Module]:
        channels = self.spec.channels
        blocks: list[nn.Module] = []
        if index > 0:
            with_position = self.spec.attention and index == 3
            blocks.append(PatchEmbedding(channels[index - 1], channels[index], with_position))
        return blocks + [Block(self.spec, index, rate) for rate in drop_path_rates]

    def _output(self, index: int, x: Tensor) -> Tensor:
        return self.out_norms[str(index)](x) if self.out_norm else x

    def options(self) -> dict[str, Any]:
        return {**super().options(), 'out_norm': self.out_norm}

    def is_not_built(self, name: str) -> bool:
        if self.out_norm and (match := re.match(r'out_norms\.([0-3])\.', name)):
            return match[1] not in self.out_norms
        return super().is_not_built(name)
