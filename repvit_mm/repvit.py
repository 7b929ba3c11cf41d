"""RepViT: Revisiting Mobile CNN From ViT Perspective (CVPR 2024, https://arxiv.org/abs/2307.09283)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mmengine.registry import MODELS
from torch import Tensor, nn

from .backbone import ReparamBackbone
from .layers import GELU, ConvBN, SqueezeExcite, StochasticDepth, activated, add_convolved
from .names import REPVIT_NAMES
from .reparam import KernelSum, ReparamBlock, add_kernels, conv_kernel, fold_norm, identity_kernel
from .specs import REPVIT_SPECS, REPVIT_TOP1, RepViTSpec


class Stem(nn.Module):
    """Two 3x3 stride-2 convolutions with a GELU between them.

    Args:
        out_channels: Channels of the first stage.
    """

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(3, out_channels // 2, 3, stride=2)
        self.act = GELU()
        self.conv2 = ConvBN(out_channels // 2, out_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(activated(self.conv1, self.act, x))


class TokenMixer(ReparamBlock):
    """3x3 depthwise, 1x1 depthwise and identity branch, summed.

    Args:
        channels: Channels of the map.
        norm_after_sum: Whether one norm follows the sum and the 1x1 branch has a bias (CVPR 2024), or the 1x1 branch
            has a norm of its own and none follows the sum (arXiv v1).
    """

    by_rows = True

    def __init__(self, channels: int, norm_after_sum: bool) -> None:
        super().__init__(stride=1, padding=1, groups=channels)
        self.conv3x3 = ConvBN(channels, channels, 3, groups=channels)
        if norm_after_sum:
            self.conv1x1 = nn.Conv2d(channels, channels, 1, groups=channels)
            self.bn = nn.BatchNorm2d(channels)
        else:
            self.conv1x1 = ConvBN(channels, channels, 1, groups=channels)
            self.bn = None

    def branches(self, x: Tensor) -> Tensor:
        x = self.conv3x3(x) + self.conv1x1(x) + x
        return x if self.bn is None else self.bn(x)

    def folded_branches(self) -> KernelSum:
        large = self.conv3x3.folded_branches()
        small = conv_kernel(self.conv1x1) if self.bn is not None else self.conv1x1.folded_branches()
        kernel = add_kernels(large, small, identity_kernel())
        return kernel if self.bn is None else fold_norm(kernel, self.bn)


class ChannelMixer(nn.Module):
    """Residual 1x1 -> GELU -> 1x1 of twice the width.

    Args:
        channels: Channels of the map.
        drop_path_rate: Stochastic depth of the residual branch.
    """

    def __init__(self, channels: int, drop_path_rate: float) -> None:
        super().__init__()
        self.expand = ConvBN(channels, 2 * channels)
        self.act = GELU()
        self.project = ConvBN(2 * channels, channels, norm_weight=0.0)
        self.drop_path = StochasticDepth(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        return add_convolved(x, self.project, self.drop_path, activated(self.expand, self.act, x))


class Block(nn.Module):
    """Stride-1 block: token mixer, squeeze-and-excitation if asked for, channel mixer.

    Args:
        channels: Channels of the map.
        norm_after_sum: See :class:`TokenMixer`.
        with_se: Whether squeeze-and-excitation follows the token mixer.
        drop_path_rate: Stochastic depth of the channel mixer.
    """

    def __init__(self, channels: int, norm_after_sum: bool, with_se: bool, drop_path_rate: float) -> None:
        super().__init__()
        self.token_mixer = TokenMixer(channels, norm_after_sum)
        # A quarter of the width, to the nearest multiple of 8 (halves go up).
        self.se = SqueezeExcite(channels, max(8, (channels + 16) // 32 * 8)) if with_se else None
        self.channel_mixer = ChannelMixer(channels, drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        if self.se is not None:
            x = self.se(x)
        return self.channel_mixer(x)


class Downsample(nn.Module):
    """Stride-2 block: 3x3 depthwise for space, 1x1 for channels, channel mixer.

    Args:
        in_channels: Channels of the stage before.
        out_channels: Channels of the stage that begins here.
        drop_path_rate: Stochastic depth of the channel mixer.
    """

    def __init__(self, in_channels: int, out_channels: int, drop_path_rate: float) -> None:
        super().__init__()
        self.spatial = ConvBN(in_channels, in_channels, 3, stride=2, groups=in_channels)
        self.channel = ConvBN(in_channels, out_channels)
        self.channel_mixer = ChannelMixer(out_channels, drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_mixer(self.channel(self.spatial(x)))


@MODELS.register_module()
class RepViT(ReparamBackbone):
    """RepViT backbone for dense prediction.

    Source: https://arxiv.org/abs/2307.09283 and https://github.com/THU-MIG/RepViT.

    Args:
        arch: ``m0_6 m0_9 m1_0 m1_1 m1_5 m2_3``, arXiv v1's ``m1 m2 m3``, or a dict with the fields of
            :class:`~repvit_mm.specs.RepViTSpec`.
        options: Those of :class:`~repvit_mm.backbone.ReparamBackbone`. ``tap='stage_end'`` takes the map behind a
            stage's last block, as the authors' ADE20K models do; ``'pre_downsample'`` the one before it in stages 0 to
            2, as their COCO models do.
    """

    specs = REPVIT_SPECS
    top1 = REPVIT_TOP1
    spec_type = RepViTSpec
    naming = REPVIT_NAMES
    taps: ClassVar = {'stage_end': 0, 'pre_downsample': 1}

    def __init__(self, arch: str | Mapping[str, Any] = 'm1_1', **options: Any) -> None:
        super().__init__(arch, **options)

    def _make_stem(self) -> nn.Module:
        return Stem(self.spec.channels[0])

    def _stage_lengths(self) -> list[int]:
        return [depth + (index > 0) for index, depth in enumerate(self.spec.depths)]

    def _make_stage(self, index: int, drop_path_rates: Sequence[float]) -> list[nn.Module]:
        channels, depth = self.spec.channels, self.spec.depths[index]
        rates = iter(drop_path_rates)
        blocks: list[nn.Module] = []
        if index > 0:
            blocks.append(Downsample(channels[index - 1], channels[index], next(rates)))
        for position, rate in enumerate(rates):
            # Squeeze-and-excitation alternates; a block that feeds a downsample has none.
            with_se = position % 2 == 0 and (index == 3 or position < depth - 1)
            blocks.append(Block(channels[index], self.spec.norm_after_sum, with_se, rate))
        return blocks
