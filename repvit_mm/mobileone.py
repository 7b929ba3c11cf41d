"""MobileOne: An Improved One millisecond Mobile Backbone (CVPR 2023, https://arxiv.org/abs/2206.04040)."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from .backbone import ReparamBackbone
from .layers import MobileOneBlock, ReLU, SqueezeExcite, activated
from .names import MOBILEONE_NAMES
from .specs import MOBILEONE_SPECS, MOBILEONE_TOP1, MobileOneSpec


class Layer(nn.Module):
    """Re-parameterizable convolution, squeeze-and-excitation if asked for, ReLU.

    Args:
        conv: The convolution.
        channels: Channels of its output.
        with_se: Whether squeeze-and-excitation follows it.
    """

    def __init__(self, conv: MobileOneBlock, channels: int, with_se: bool = False) -> None:
        super().__init__()
        self.conv = conv
        self.se = SqueezeExcite(channels, max(1, channels // 16)) if with_se else None
        self.act = ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.se is None:
            return activated(self.conv, self.act, x)
        return self.act(self.se(self.conv(x)))


class Block(nn.Sequential):
    """3x3 depthwise layer for space, 1x1 layer for channels.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the depthwise layer.
        num_convs: Convolution branches of each layer.
        with_se: Whether both layers have squeeze-and-excitation.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, num_convs: int, with_se: bool) -> None:
        super().__init__()
        depthwise = MobileOneBlock(in_channels, in_channels, 3, stride, groups=in_channels, num_convs=num_convs)
        pointwise = MobileOneBlock(in_channels, out_channels, 1, num_convs=num_convs)
        self.depthwise = Layer(depthwise, in_channels, with_se)
        self.pointwise = Layer(pointwise, out_channels, with_se)


@MODELS.register_module()
class MobileOne(ReparamBackbone):
    """MobileOne backbone for dense prediction.

    Source: https://arxiv.org/abs/2206.04040 and https://github.com/apple/ml-mobileone. The authors' stage 0 is the stem
    here, their stages 1 to 4 are stages 0 to 3. It has no residual branches, so ``drop_path_rate`` stays 0.

    Args:
        arch: ``s0 s1 s2 s3 s4``, or a dict with the fields of :class:`~repvit_mm.specs.MobileOneSpec`.
        options: Those of :class:`~repvit_mm.backbone.ReparamBackbone`.
    """

    specs = MOBILEONE_SPECS
    top1 = MOBILEONE_TOP1
    spec_type = MobileOneSpec
    naming = MOBILEONE_NAMES

    def __init__(self, arch: str | Mapping[str, Any] = 's1', **options: Any) -> None:
        super().__init__(arch, **options)

    def _make_stem(self) -> nn.Module:
        channels = self.spec.stem_channels
        return Layer(MobileOneBlock(3, channels, 3, stride=2), channels)

    def _stage_lengths(self) -> list[int]:
        return list(self.spec.depths)

    def _residual_lengths(self) -> list[int]:
        return [0, 0, 0, 0]

    def _make_stage(self, index: int, drop_path_rates: Sequence[float]) -> list[nn.Module]:
        spec = self.spec
        depth, se_depth = spec.depths[index], spec.se_depths[index]
        before, channels = (spec.stem_channels, *spec.channels)[index : index + 2]
        return [
            Block(
                channels if position > 0 else before,
                channels,
                stride=1 if position > 0 else 2,
                num_convs=spec.num_convs,
                with_se=position >= depth - se_depth,
            )
            for position in range(depth)
        ]
