"""The road from MobileNetV3-L to RepViT, each step of it a network that runs.

RepViT's paper (https://arxiv.org/abs/2307.09283, section 3) starts at MobileNetV3-L and changes one thing at a time.
Here the defaults of :class:`RoadmapSpec` are MobileNetV3-L, each step sets fields of it, and the last step is RepViT-M1
of arXiv v1. ``docs/roadmap.md`` says for each step what the paper fixes and what had to be chosen.

These networks show what each step does. The networks to train and deploy are in :mod:`~repvit_mm.repvit`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from .backbone import check_choice
from .layers import GELU, Conv1x1, ConvBN, NormLinear, SqueezeExcite, StochasticDepth, add_residual
from .repvit import Block, Downsample, RepViT, Stem, TokenMixer
from .specs import check_four

# -------------------------------------------------------------------------------------------------------- the steps

MOBILENETV3_BLOCKS = (
    ((24, 72),),
    ((40, 72), (40, 120), (40, 120)),
    ((80, 240), (80, 200), (80, 184), (80, 184), (112, 480), (112, 672)),
    ((160, 672), (160, 960), (160, 960)),
)
"""Output and hidden channels of each of MobileNetV3-L's blocks behind the stem, stage by stage.

The first block of stages 1 to 3 has stride 2. Source: https://arxiv.org/abs/1905.02244, table 1.
"""

CHOICES = {
    'stem': ('mobilenetv3', 'early'),
    'downsampling': ('shallow', 'deep'),
    'se': ('mobilenetv3', 'alternate', 'every', 'none'),
    'classifier': ('mobilenetv3', 'simple'),
}
"""Field of a spec -> its valid values."""


@dataclass(frozen=True)
class RoadmapSpec:
    """A network on the road; by default MobileNetV3-L with GELU.

    Args:
        mixers_apart: Whether blocks mix first tokens and then channels. If not, they are inverted bottlenecks with the
            depthwise convolution between the two 1x1 convolutions.
        expansion: Hidden channels of a block, as a multiple of its input's; ``None`` for MobileNetV3-L's own.
        channels: Channels of the four stages. With MobileNetV3-L's, stage 2 is 80 wide up to its last two blocks.
        stem: ``'mobilenetv3'``, or ``'early'`` for two 3x3 stride-2 convolutions.
        downsampling: ``'shallow'`` for a block of stride 2. ``'deep'`` for a block of stride 1, then convolutions that
            change resolution and width, then a feed-forward network.
        classifier: ``'mobilenetv3'``, or ``'simple'`` for a linear layer on the pooled map.
        depths: Stride-1 blocks of the four stages, without those that deep downsampling brings.
        kernel_sizes: Of the depthwise convolutions of the four stages, odd.
        se: Which stride-1 blocks have squeeze-and-excitation: those of ``'mobilenetv3'``, ``'alternate'`` ones,
            ``'every'`` one or ``'none'``.
        reparam: Whether depthwise convolutions of stride 1 have further branches, which fold, if mixers are apart.

    Raises:
        ValueError: if a field is not valid, alone or together with the others; names it.
    """

    mixers_apart: bool = False
    expansion: int | None = None
    channels: tuple[int, int, int, int] = (24, 40, 112, 160)
    stem: str = 'mobilenetv3'
    downsampling: str = 'shallow'
    classifier: str = 'mobilenetv3'
    depths: tuple[int, int, int, int] = (1, 2, 5, 2)
    kernel_sizes: tuple[int, int, int, int] = (3, 5, 3, 5)
    se: str = 'mobilenetv3'
    reparam: bool = True

    def __post_init__(self) -> None:
        for name in ('channels', 'depths', 'kernel_sizes'):
            check_four(name, getattr(self, name))
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in ('mixers_apart', 'reparam'):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f'{name}={getattr(self, name)!r}: expected True or False')
        if self.expansion is not None and (not isinstance(self.expansion, int) or self.expansion < 1):
            raise ValueError(f"expansion={self.expansion!r}: expected a positive integer, or None for MobileNetV3-L's")
        if any(size % 2 == 0 for size in self.kernel_sizes):
            raise ValueError(f'kernel_sizes={self.kernel_sizes!r}: expected odd sizes')
        if self.stem == 'early' and self.channels[0] % 2:
            raise ValueError(f'channels={self.channels!r}: the first width must be even, the stem starts with its half')
        if self.depths != RoadmapSpec.depths and (self.expansion is None or self.channels == RoadmapSpec.channels):
            raise ValueError(
                f"depths={self.depths!r}: MobileNetV3-L's widths are those of its own depths {RoadmapSpec.depths}; "
                'set expansion and other channels too'
            )
        if self.downsampling == 'deep' and not (self.mixers_apart and self.expansion):
            raise ValueError("downsampling='deep': it is made of RepViT's blocks; set mixers_apart and expansion too")

    def block_widths(self, stage: int) -> Iterator[tuple[int, int, int]]:
        """Input, hidden and output channels of a stage's blocks, the block of stride 2 included."""
        count = self.depths[stage] + (stage > 0)
        outputs = [self.channels[stage]] * count
        if self.channels == RoadmapSpec.channels:
            outputs = [output for output, _ in MOBILENETV3_BLOCKS[stage]]
        inputs = [self.channels[max(stage - 1, 0)], *outputs[:-1]]
        if self.expansion is None:
            hidden = [hidden for _, hidden in MOBILENETV3_BLOCKS[stage]]
        else:
            hidden = [self.expansion * width for width in inputs]
        return zip(inputs, hidden, outputs, strict=True)

    def has_se(self, stage: int, position: int) -> bool:
        """Whether a block has squeeze-and-excitation.

        Args:
            stage: From 0 to 3.
            position: -1 for the block of stride 2, 0 for the first one behind it.
        """
        depth = self.depths[stage]
        if self.se == 'every':
            return position >= 0
        if position == depth or self.se == 'none':  # the former belongs to the downsampling behind it
            return False
        if self.se == 'alternate':
            return position >= 0 and position % 2 == 0
        return stage in (1, 3) or (stage == 2 and 5 * position >= 3 * depth)


class Step(NamedTuple):
    """A step of the road, and what the paper measured after it.

    Args:
        title: What it does, in two or three words.
        change: The fields of the spec that it sets.
        top1: Accuracy on ImageNet-1k, in percent; ``None`` where the paper has none.
        phone_ms: Latency on an iPhone 12 at 224x224, batch 1, in milliseconds; ``None`` where the paper has none.
    """

    title: str
    change: Mapping[str, Any]
    top1: float | None
    phone_ms: float | None


# Accuracy after 300 epochs without a teacher. The latencies of stage_ratio and kernel_size are those of the paper's
# first versions; the later ones have 0.91 and 0.89.
STEPS = {
    'mobilenetv3': Step('MobileNetV3-L, GELU', {}, 71.5, 1.01),
    'mixers': Step('mixers apart', dict(mixers_apart=True), 68.3, 0.81),
    'expansion': Step('expansion ratio 2', dict(expansion=2), None, 0.65),
    'width': Step('wider stages', dict(channels=(48, 96, 192, 384)), 73.5, 0.89),
    'stem': Step('early convolutions', dict(stem='early'), 73.9, 0.86),
    'downsampling': Step('deeper downsampling', dict(downsampling='deep'), 75.4, 0.96),
    'classifier': Step('simple classifier', dict(classifier='simple'), 74.8, 0.77),
    'stage_ratio': Step('stage ratio 1:1:7:1', dict(depths=(2, 2, 14, 2)), 76.9, 1.02),
    'kernel_size': Step('3x3 kernels', dict(kernel_sizes=(3, 3, 3, 3)), 76.9, 1.00),
    'se': Step('SE across blocks', dict(se='alternate'), 77.4, 0.87),
}

# Changes to the last step. Accuracy (section 4.4) is RepViT-M0.9's after distillation: 78.74 at 0.87 ms unchanged.
ABLATIONS = {
    'without_reparam': Step('without re-parameterization', dict(reparam=False), 78.47, None),
    'without_se': Step('without SE', dict(se='none'), 77.92, 0.83),
    'se_in_every_block': Step('SE in every block', dict(se='every'), 78.75, 0.92),
    'kernel_5x5': Step('5x5 kernels', dict(kernel_sizes=(5, 5, 5, 5)), None, None),
    'shallow_downsampling': Step('shallow downsampling', dict(downsampling='shallow'), None, None),
}


def walk() -> Iterator[tuple[str, RoadmapSpec]]:
    """Name and spec of each step, made from the one before, and of each ablation, made from the last step."""
    spec = RoadmapSpec()
    for name, step in STEPS.items():
        spec = replace(spec, **step.change)
        yield name, spec
    for name, ablation in ABLATIONS.items():
        yield name, replace(spec, **ablation.change)


ROADMAP = dict(walk())

# ------------------------------------------------------------------------------------------------------- the blocks


class InvertedBottleneck(nn.Module):
    """MobileNetV3's block: 1x1 to the hidden channels, depthwise convolution, gate, 1x1; a residual if shapes allow.

    Source: https://arxiv.org/abs/1905.02244, figure 4. Every activation is a GELU and the gate a sigmoid.

    Args:
        in_channels: Channels of the input.
        hidden_channels: Channels between the 1x1 convolutions; the first is left out if they are the input's.
        out_channels: Channels of the output.
        kernel_size: Of the depthwise convolution.
        stride: Of the depthwise convolution.
        with_se: Whether squeeze-and-excitation follows it.
        drop_path_rate: Stochastic depth of the residual branch.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        with_se: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and in_channels == out_channels
        self.expand = ConvBN(in_channels, hidden_channels) if hidden_channels != in_channels else None
        self.depthwise = ConvBN(hidden_channels, hidden_channels, kernel_size, stride, groups=hidden_channels)
        # A quarter of the width, up to the next multiple of 8.
        self.se = SqueezeExcite(hidden_channels, -(-hidden_channels // 32) * 8) if with_se else None
        self.act = GELU()
        self.project = ConvBN(hidden_channels, out_channels)
        self.drop_path = StochasticDepth(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.act(self.expand(x))
        y = self.act(self.depthwise(y))
        if self.se is not None:
            y = self.se(y)
        y = self.project(y)
        return add_residual(x, self.drop_path(y)) if self.residual else y


class FeedForward(nn.Module):
    """1x1 -> GELU -> 1x1. If input and output are equally wide it is residual: that is RepViT's channel mixer.

    Args:
        in_channels: Channels of the input.
        hidden_channels: Channels between the convolutions.
        out_channels: Channels of the output.
        drop_path_rate: Stochastic depth of the residual branch.
    """

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int, drop_path_rate: float) -> None:
        super().__init__()
        self.residual = in_channels == out_channels
        self.expand = ConvBN(in_channels, hidden_channels)
        self.act = GELU()
        self.project = ConvBN(hidden_channels, out_channels, norm_weight=0.0 if self.residual else 1.0)
        self.drop_path = StochasticDepth(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.act(self.expand(x)))
        return add_residual(x, self.drop_path(y)) if self.residual else y


class LargeTokenMixer(TokenMixer):
    """RepViT's token mixer with a larger kernel. The large branch is still called ``conv3x3``.

    Args:
        channels: Channels of the map.
        kernel_size: Of the largest branch.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, norm_after_sum=False)
        self.padding = kernel_size // 2
        self.conv3x3 = ConvBN(channels, channels, kernel_size, groups=channels)


class ApartBlock(Block):
    """RepViT's block, or a step on the way to it: with other kernels, widths and strides, or with a single branch.

    Args:
        in_channels: Channels of the input, and of its token mixer.
        hidden_channels: Hidden channels of its channel mixer.
        out_channels: Channels of the output.
        kernel_size: Of the token mixer.
        stride: Of the token mixer.
        with_se: Whether squeeze-and-excitation follows the token mixer.
        drop_path_rate: Stochastic depth of the channel mixer.
        reparam: Whether a token mixer of stride 1 has its three branches.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        with_se: bool,
        drop_path_rate: float,
        reparam: bool,
    ) -> None:
        super().__init__(in_channels, norm_after_sum=False, with_se=with_se, drop_path_rate=drop_path_rate)
        if stride > 1 or not reparam:
            self.token_mixer = ConvBN(in_channels, in_channels, kernel_size, stride, groups=in_channels)
        elif kernel_size != 3:
            self.token_mixer = LargeTokenMixer(in_channels, kernel_size)
        if (hidden_channels, out_channels) != (2 * in_channels, in_channels):
            self.channel_mixer = FeedForward(in_channels, hidden_channels, out_channels, drop_path_rate)


class DeepDownsample(Downsample):
    """RepViT's downsampling with any kernel and expansion; the block in front of it ends the stage before.

    Args:
        in_channels: Channels of the stage before.
        out_channels: Channels of the stage that begins here.
        kernel_size: Of the depthwise convolution.
        expansion: Hidden channels of the channel mixer, as a multiple of ``out_channels``.
        drop_path_rate: Stochastic depth of the channel mixer.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, expansion: int, drop_path_rate: float
    ) -> None:
        super().__init__(in_channels, out_channels, drop_path_rate)
        if kernel_size != 3:
            self.spatial = ConvBN(in_channels, in_channels, kernel_size, stride=2, groups=in_channels)
        if expansion != 2:
            self.channel_mixer = FeedForward(out_channels, expansion * out_channels, out_channels, drop_path_rate)


class MobileNetV3Stem(nn.Module):
    """MobileNetV3's way to stride 4: a 3x3 convolution, a depthwise separable one, an inverted bottleneck.

    Args:
        out_channels: Channels of the first stage.
    """

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(3, 16, 3, stride=2)
        self.act = GELU()
        self.separable = InvertedBottleneck(16, 16, 16)
        self.bottleneck = InvertedBottleneck(16, 64, out_channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(self.separable(self.act(self.conv1(x))))


def make_head(classifier: str, channels: int, num_classes: int) -> nn.Sequential:
    """The classifier, from the last map ``(N, channels, H, W)`` to logits ``(N, num_classes)``."""
    pool = nn.AdaptiveAvgPool2d(1)
    if classifier == 'simple':
        return nn.Sequential(pool, NormLinear(channels, num_classes, bias=True), nn.Flatten())
    return nn.Sequential(
        ConvBN(channels, 960), GELU(), pool, Conv1x1(960, 1280), GELU(), Conv1x1(1280, num_classes), nn.Flatten()
    )


# ----------------------------------------------------------------------------------------------------- the networks


@MODELS.register_module()
class RepViTRoadmap(RepViT):
    """A step of the road as a backbone for dense prediction.

    Args:
        step: A key of ``STEPS`` or ``ABLATIONS``, or a dict with the fields of :class:`RoadmapSpec` that are not
            MobileNetV3-L's.
        options: Those of :class:`~repvit_mm.repvit.RepViT`.
    """

    specs = ROADMAP
    spec_type = RoadmapSpec
    # Only for networks that are deployed; what the paper measured is in STEPS.
    top1: ClassVar = {}

    def __init__(self, step: str | Mapping[str, Any] = 'se', **options: Any) -> None:
        if not isinstance(step, Mapping):
            check_choice('step', step, list(self.specs))
        if 'arch' in options:
            raise TypeError(f"{type(self).__name__} takes no option 'arch': the nearest is 'step'")
        super().__init__(step, **options)

    def options(self) -> dict[str, Any]:
        return {'step': asdict(self.spec), 'out_indices': self.out_indices, 'tap': self.tap}

    def _make_stem(self) -> nn.Module:
        return (Stem if self.spec.stem == 'early' else MobileNetV3Stem)(self.spec.channels[0])

    def _ends_in_downsampling(self, index: int) -> bool:
        """Whether the last block of a stage is a part of the deep downsampling behind it."""
        return self.spec.downsampling == 'deep' and index < 3

    def _stage_lengths(self) -> list[int]:
        return [depth + (index > 0) + self._ends_in_downsampling(index) for index, depth in enumerate(self.spec.depths)]

    def _make_stage(self, index: int, drop_path_rates: Sequence[float]) -> list[nn.Module]:
        spec = self.spec
        widths = list(spec.block_widths(index))
        if self._ends_in_downsampling(index):
            width = spec.channels[index]
            widths.append((width, spec.expansion * width, width))
        first = -1 if index > 0 else 0
        return [
            self._make_block(index, position, *channels, rate)
            for position, (channels, rate) in enumerate(zip(widths, drop_path_rates, strict=True), first)
        ]

    def _make_block(
        self, index: int, position: int, in_channels: int, hidden_channels: int, out_channels: int, rate: float
    ) -> nn.Module:
        spec, kernel_size = self.spec, self.spec.kernel_sizes[index]
        if position < 0 and spec.downsampling == 'deep':
            return DeepDownsample(in_channels, out_channels, kernel_size, spec.expansion, rate)
        stride = 2 if position < 0 else 1
        shape = in_channels, hidden_channels, out_channels, kernel_size, stride, spec.has_se(index, position), rate
        return ApartBlock(*shape, spec.reparam) if spec.mixers_apart else InvertedBottleneck(*shape)


@MODELS.register_module()
class RepViTRoadmapClassifier(BaseModule):
    """A step of the road as an image classifier.

    Args:
        step: See :class:`RepViTRoadmap`.
        num_classes: Number of classes.
        drop_path_rate: Stochastic depth of the last block.
        init_cfg: Initialization.
    """

    def __init__(
        self,
        step: str | Mapping[str, Any] = 'se',
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.backbone = RepViTRoadmap(step, out_indices=(3,), drop_path_rate=drop_path_rate)
        self.head = make_head(self.backbone.spec.classifier, self.backbone.spec.channels[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of images ``(N, 3, H, W)``, normalized, H and W at least 32."""
        return self.head(*self.backbone(x))
