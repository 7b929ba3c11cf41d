"""One row for each variant, with the source of its numbers."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


class Top1(NamedTuple):
    """Accuracy that a variant's authors published on ImageNet-1k, in percent; ``None`` where they published none.

    Args:
        plain: Trained on the labels alone.
        distilled: Trained with a teacher too.
    """

    plain: float | None = None
    distilled: float | None = None


def check_four(name: str, values: tuple[int, ...]) -> None:
    """Raise a ``ValueError`` that names the field unless it holds four positive integers."""
    if len(values) != 4 or any(not isinstance(value, int) or value < 1 for value in values):
        raise ValueError(f'{name}={values!r}: expected four positive integers, one for each stage')


@dataclass(frozen=True)
class RepViTSpec:
    """Widths and depths of a RepViT.

    Args:
        channels: Channels of the four stages, the first even.
        depths: Stride-1 blocks of the four stages; a stride-2 block precedes those of stages 1 to 3.
        norm_after_sum: Whether the token mixer's three branches are normalized together after their sum (CVPR 2024)
            or the convolutions among them one by one before it (arXiv v1).

    Raises:
        ValueError: if there are not four positive numbers of each, or the first width is odd.
    """

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    norm_after_sum: bool = True

    def __post_init__(self) -> None:
        check_four('channels', self.channels)
        check_four('depths', self.depths)
        if not isinstance(self.norm_after_sum, bool):
            raise ValueError(f'norm_after_sum={self.norm_after_sum!r}: expected True or False')
        if self.channels[0] % 2:
            raise ValueError(f'channels={self.channels!r}: the first width must be even, the stem starts with its half')


# Source: https://github.com/THU-MIG/RepViT, model/repvit.py; the depths are runs of its stride-1 rows.
REPVIT_SPECS = {
    'm0_6': RepViTSpec((40, 80, 160, 320), (2, 2, 9, 1)),
    'm0_9': RepViTSpec((48, 96, 192, 384), (3, 3, 15, 2)),
    'm1_0': RepViTSpec((56, 112, 224, 448), (3, 3, 15, 2)),
    'm1_1': RepViTSpec((64, 128, 256, 512), (3, 3, 13, 2)),
    'm1_5': RepViTSpec((64, 128, 256, 512), (5, 5, 25, 4)),
    'm2_3': RepViTSpec((80, 160, 320, 640), (7, 7, 35, 2)),
    # The models of arXiv 2307.09283v1.
    'm1': RepViTSpec((48, 96, 192, 384), (3, 3, 15, 2), norm_after_sum=False),
    'm2': RepViTSpec((64, 128, 256, 512), (3, 3, 13, 2), norm_after_sum=False),
    'm3': RepViTSpec((64, 128, 256, 512), (5, 5, 19, 2), norm_after_sum=False),
}
# Source: the README there; 300 epochs.
REPVIT_TOP1 = {
    'm0_6': Top1(distilled=74.1),
    'm0_9': Top1(distilled=78.7),
    'm1_0': Top1(distilled=80.0),
    'm1_1': Top1(distilled=80.7),
    'm1_5': Top1(distilled=82.3),
    'm2_3': Top1(distilled=83.3),
}


@dataclass(frozen=True)
class FastViTSpec:
    """Widths and depths of a FastViT.

    Args:
        channels: Channels of the four stages, each a multiple of the one before it: a patch embedding is depthwise.
        depths: Blocks of the four stages; a patch embedding precedes those of stages 1 to 3.
        mlp_ratio: Width of the feed-forward networks relative to their stage's.
        attention: Whether the last stage mixes tokens by attention, in heads of 32 channels, behind a conditional
            position encoding; every other stage has RepMixers.
        layer_scale: Initial layer scale.

    Raises:
        ValueError: if a field cannot be; names it.
    """

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    mlp_ratio: int = 4
    attention: bool = False
    layer_scale: float = 1e-5

    def __post_init__(self) -> None:
        check_four('channels', self.channels)
        check_four('depths', self.depths)
        if any(width % before for before, width in pairwise(self.channels)):
            raise ValueError(f'channels={self.channels!r}: each width must be a multiple of the one before it')
        if not isinstance(self.mlp_ratio, int) or self.mlp_ratio < 1:
            raise ValueError(f'mlp_ratio={self.mlp_ratio!r}: expected a positive integer')
        if not isinstance(self.attention, bool):
            raise ValueError(f'attention={self.attention!r}: expected True or False')
        if self.attention and self.channels[-1] % HEAD_CHANNELS:
            raise ValueError(
                f'channels={self.channels!r}: with attention the last width must be a multiple of {HEAD_CHANNELS}'
            )
        if not isinstance(self.layer_scale, int | float) or not self.layer_scale > 0:
            raise ValueError(f'layer_scale={self.layer_scale!r}: expected a positive number')


HEAD_CHANNELS = 32
"""Channels of one attention head of a FastViT."""

# Source: https://github.com/apple/ml-fastvit, models/fastvit.py.
FASTVIT_SPECS = {
    't8': FastViTSpec((48, 96, 192, 384), (2, 2, 4, 2), mlp_ratio=3),
    't12': FastViTSpec((64, 128, 256, 512), (2, 2, 6, 2), mlp_ratio=3),
    's12': FastViTSpec((64, 128, 256, 512), (2, 2, 6, 2)),
    'sa12': FastViTSpec((64, 128, 256, 512), (2, 2, 6, 2), attention=True),
    'sa24': FastViTSpec((64, 128, 256, 512), (4, 4, 12, 4), attention=True),
    'sa36': FastViTSpec((64, 128, 256, 512), (6, 6, 18, 6), attention=True, layer_scale=1e-6),
    'ma36': FastViTSpec((76, 152, 304, 608), (6, 6, 18, 6), attention=True, layer_scale=1e-6),
}
# Source: the README there; 256x256 pixels.
FASTVIT_TOP1 = {
    't8': Top1(76.2, 77.2),
    't12': Top1(79.3, 80.3),
    's12': Top1(79.9, 81.1),
    'sa12': Top1(80.9, 81.9),
    'sa24': Top1(82.7, 83.4),
    'sa36': Top1(83.6, 84.2),
    'ma36': Top1(83.9, 84.6),
}


@dataclass(frozen=True)
class MobileOneSpec:
    """Widths and depths of a MobileOne.

    Args:
        channels: Channels of the four stages.
        depths: Blocks of the four stages, each a 3x3 depthwise and a 1x1 layer; the first of a stage has stride 2.
        num_convs: Convolution branches of each layer behind the stem, which has one.
        se_depths: How many of each stage's last blocks have squeeze-and-excitation.

    Raises:
        ValueError: if a field cannot be; names it.
    """

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    num_convs: int = 1
    se_depths: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __post_init__(self) -> None:
        check_four('channels', self.channels)
        check_four('depths', self.depths)
        if not isinstance(self.num_convs, int) or self.num_convs < 1:
            raise ValueError(f'num_convs={self.num_convs!r}: expected a positive integer')
        possible = [range(depth + 1) for depth in self.depths]
        if len(self.se_depths) != 4 or any(n not in upto for n, upto in zip(self.se_depths, possible, strict=True)):
            raise ValueError(f'se_depths={self.se_depths!r}: expected four integers from 0 to depths={self.depths!r}')

    @property
    def stem_channels(self) -> int:
        """Channels of the stem."""
        return min(64, self.channels[0])


# Source: https://arxiv.org/abs/2206.04040, tables 2 and 3: 64, 128, 256 and 512 channels times a width multiplier.
MOBILEONE_SPECS = {
    's0': MobileOneSpec((48, 128, 256, 1024), (2, 8, 10, 1), num_convs=4),
    's1': MobileOneSpec((96, 192, 512, 1280), (2, 8, 10, 1)),
    's2': MobileOneSpec((96, 256, 640, 2048), (2, 8, 10, 1)),
    's3': MobileOneSpec((128, 320, 768, 2048), (2, 8, 10, 1)),
    's4': MobileOneSpec((192, 448, 896, 2048), (2, 8, 10, 1), se_depths=(0, 0, 5, 1)),
}
# Source: the README of https://github.com/apple/ml-mobileone.
MOBILEONE_TOP1 = {
    's0': Top1(71.4),
    's1': Top1(75.9),
    's2': Top1(77.4),
    's3': Top1(78.1),
    's4': Top1(79.4),
}
