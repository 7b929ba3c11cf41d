"""One row for each variant, with the source of its numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RepViTSpec:
    """Widths and depths of a RepViT.

    Args:
        channels: Channels of the four stages, the first even.
        depths: Stride-1 blocks of the four stages; a stride-2 block precedes those of stages 1 to 3.
        norm_after_sum: Whether the token mixer's three branches are normalized together after their sum (CVPR 2024)
            or the convolutions among them one by one before it (arXiv v1).

    Raises:
        ValueError: if there are not four positive numbers of each, or a width is odd.
    """

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    norm_after_sum: bool = True

    def __post_init__(self) -> None:
        for name in ('channels', 'depths'):
            values = getattr(self, name)
            if len(values) != 4 or any(not isinstance(value, int) or value < 1 for value in values):
                raise ValueError(f'{name}={values!r}: expected four positive integers, one for each stage')
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
