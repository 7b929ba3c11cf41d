"""What was found in a data set."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing about a data set.

    Args:
        level: ``'error'`` would stop or ruin a run; ``'warning'`` may be meant.
        text: One line that names the thing and says what to do.
    """

    level: Literal['error', 'warning']
    text: str


@dataclass
class Report:
    """What was found in one data set.

    Args:
        name: Its name in the config, e.g. ``train_dataloader.dataset``.
        kind: Its type.
        classes: Its class names.
        unit: What ``amounts`` counts: ``'boxes'`` or ``'pixels'``.
        images: Number of images.
        empty: Images without any annotation that counts.
        looked_at: Number of images whose annotations were read.
        amounts: Class index -> boxes or pixels of it.
        images_with: Class index -> images with it.
        image_sizes: ``(width, height)`` in pixels of the images whose size is known.
        box_sides: Shorter sides of the boxes in pixels.
        findings: What is worth knowing.
    """

    name: str
    kind: str = ''
    classes: Sequence[str] = ()
    unit: Literal['boxes', 'pixels'] = 'boxes'
    images: int = 0
    empty: int = 0
    looked_at: int = 0
    amounts: Counter[int] = field(default_factory=Counter)
    images_with: Counter[int] = field(default_factory=Counter)
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    box_sides: list[float] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def error(self, text: str) -> None:
        """Note what would stop or ruin a run."""
        self.findings.append(Finding('error', text))

    def warn(self, text: str) -> None:
        """Note what may be meant."""
        self.findings.append(Finding('warning', text))

    @property
    def errors(self) -> list[str]:
        """What would stop or ruin a run."""
        return [finding.text for finding in self.findings if finding.level == 'error']

    @property
    def warnings(self) -> list[str]:
        """What may be meant."""
        return [finding.text for finding in self.findings if finding.level == 'warning']

    def summary(self) -> str:
        """Counts and sizes on one line."""
        read = '' if self.looked_at == self.images else f' (read {self.looked_at:,} of them)'
        parts = [f'{self.images:,} images{read}', f'{sum(self.amounts.values()):,} {self.unit}']
        parts.append(f'{self.empty:,} images without annotation')
        if self.image_sizes:
            widths, heights = zip(*self.image_sizes, strict=True)
            parts.append(f'width {spread(widths)} px, height {spread(heights)} px')
        if self.box_sides:
            parts.append(f'shorter side of a box {spread(self.box_sides)} px')
        return ', '.join(parts)


def spread(values: Sequence[float]) -> str:
    """The smallest, the median and the largest of some numbers."""
    low, middle, high = (f'{number:.4g}' for number in (min(values), float(np.median(values)), max(values)))
    return low if low == high else f'{low} to {high} (median {middle})'


def some(names: Sequence[object], most: int = 3) -> str:
    """The first of some names."""
    shown = ', '.join(map(str, names[:most]))
    return f'{shown} and {len(names) - most:,} more' if len(names) > most else shown


def count(number: int, thing: str) -> str:
    """A number and its thing: ``1 image``, ``2 images``, ``2 boxes``."""
    if number == 1:
        return f'1 {thing}'
    return f'{number:,} {thing}{"es" if thing.endswith(("x", "s")) else "s"}'
