"""RepViT: Revisiting Mobile CNN From ViT Perspective (CVPR 2024, https://arxiv.org/abs/2307.09283)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mmengine.registry import MODELS
from torch import Tensor, nn

from .backbone import ReparamBackbone, refuse_unknown
from .layers import GELU, ConvBN, SqueezeExcite, StochasticDepth, add_residual
from .names import REPVIT_NAMES
from .recompute import conv_after
from .reparam import Kernel, ReparamBlock, add_kernels, conv_kernel, fold_norm, identity_kernel
from .specs import REPVIT_SPECS, RepViTSpec


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
        return conv_after(self.act, self.conv2, self.conv1(x))[0]


class TokenMixer(ReparamBlock):
    """3x3 depthwise, 1x1 depthwise and identity branch, summed.

    Args:
        channels: Channels of the map.
        norm_after_sum: Whether one norm follows the sum and the 1x1 branch has a bias (CVPR 2024), or the 1x1 branch
            has a norm of its own and none follows the sum (arXiv v1).
    """

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

    def equivalent_kernel(self) -> Kernel:
        large = self.conv3x3.equivalent_kernel()
        small = conv_kernel(self.conv1x1) if self.bn is not None else self.conv1x1.equivalent_kernel()
        kernel = add_kernels(large, small, identity_kernel(large))
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
        return self.after_expand(x, self.expand(x))

    def after_expand(self, x: Tensor, hidden: Tensor) -> Tensor:
        """The mixer's output for its input ``x`` and ``hidden = expand(x)``."""
        return add_residual(x, self.drop_path(conv_after(self.act, self.project, hidden)[0]))


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
        hidden, x = conv_after(self.token_mixer, self.channel_mixer.expand, x, self.se)
        return self.channel_mixer.after_expand(x, hidden)


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
        return self.channel_mixer(conv_after(self.spatial, self.channel, x)[0])


@MODELS.register_module()
class RepViT(ReparamBackbone):
    """RepViT backbone for dense prediction.

    Source: https://arxiv.org/abs/2307.09283 and https://github.com/THU-MIG/RepViT.

    Args:
        arch: ``m0_6 m0_9 m1_0 m1_1 m1_5 m2_3``, arXiv v1's ``m1 m2 m3``, or a dict with the fields of
            :class:`~repvit_mm.specs.RepViTSpec`.
        out_indices: Stages whose maps are returned, increasing, from 0 to 3.
        tap: ``'stage_end'`` takes the map behind a stage's last block, as the authors' ADE20K models do;
            ``'pre_downsample'`` the one before it in stages 0 to 2, as their COCO models do.
        norm_eval: Keep all BatchNorm statistics frozen during training; weights and biases go on learning. Every
            block then runs, and learns, as one convolution, unless ``fold_frozen=False``.
        frozen_stages: -1 freezes nothing, 0 the stem, k also the first k stages.
        with_cp: Recompute each block in the backward pass instead of keeping its maps.
        fold_frozen: Run each block whose statistics are frozen as the one convolution that it equals, recompute in the
            backward pass what lies between the 1x1 convolutions; if all are frozen, compute in channels_last on a CPU.
            ``False`` runs and keeps every branch, in the memory format of the input.
        deploy: Build the network with its blocks already fused; it cannot be trained.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0 at the first one.
        init_cfg: Initialization, e.g. ``dict(type='Pretrained', checkpoint=...)``; the authors' files load as they are.

    Raises:
        ValueError: if a value is not valid; names the option and the nearest valid value.
        TypeError: likewise for an option that does not exist.
    """

    specs = REPVIT_SPECS
    spec_type = RepViTSpec
    naming = REPVIT_NAMES
    taps: ClassVar = {'stage_end': 0, 'pre_downsample': 1}

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'm1_1',
        out_indices: Sequence[int] = (0, 1, 2, 3),
        tap: str = 'stage_end',
        norm_eval: bool = False,
        frozen_stages: int = -1,
        with_cp: bool = False,
        fold_frozen: bool = True,
        deploy: bool = False,
        drop_path_rate: float = 0.0,
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown(type(self), unknown)
        super().__init__(
            arch, out_indices, tap, drop_path_rate, norm_eval, frozen_stages, with_cp, fold_frozen, deploy, init_cfg
        )

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
