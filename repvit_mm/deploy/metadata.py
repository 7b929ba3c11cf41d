"""The description that an exported file carries in its metadata. Needs the standard library only."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

KEY = 'repvit_mm'
"""The entry of a file's metadata that holds its :class:`FileInfo` as JSON."""

Task = Literal['detection', 'segmentation', 'backbone']

TASKS: dict[str, Task] = {'mmdet': 'detection', 'mmseg': 'segmentation', 'mmyolo': 'detection'}
"""Default scope of a config -> the task of its model."""


class MetadataError(ValueError):
    """A text is not the description of an exported file; the message is one line that says why."""


@dataclass(frozen=True)
class FileInfo:
    """The description of an exported file, and how images are prepared for it.

    The input is called ``images``: float32 ``(N, 3, H, W)``, RGB, values from 0 to 255. Outputs, by task:

    * detection: ``boxes`` ``(N, K, 4)`` as x1 y1 x2 y2 in pixels of the input, ``scores`` ``(N, K)`` in falling order,
      ``labels`` ``(N, K)`` as indices of ``classes``, ``count`` ``(N,)``: how many of an image's K are detections. The
      others have score 0 and label -1. A model that predicts masks has ``masks`` ``(N, K, h, w)`` too: probabilities,
      each mask over its box, for :func:`~repvit_mm.deploy.masks.paste_masks`.
    * segmentation: ``labels`` ``(N, H, W)`` or ``logits`` ``(N, C, H, W)``.
    * backbone: ``map0``, ``map1``, ... ``(N, C_i, H_i, W_i)``.

    Args:
        task: What the outputs are.
        outputs: Their names, in the file's order.
        classes: Class names; empty for a backbone.
        palette: An RGB colour for each class, or empty.
        sizes: Heights and widths in pixels that the file takes, the default one first; empty if it takes any.
        batch: How many images the file takes at once; ``None`` if any number.
        mean: Mean of each channel, RGB, in the input's units.
        std: Standard deviation of each channel, in the same units.
        divisor: The network's input is padded to multiples of it, at the right and at the bottom.
        preprocessing_inside: Whether the file itself normalizes and pads. If not, this package's runtimes do it.
        scale: Width and height in pixels that the config's test pipeline resizes images to, or ``None``.
        keep_ratio: Whether an image keeps its aspect ratio; then ``scale`` is an upper bound.
        scale_divisor: Each side of the resized image is resized up to a multiple of it.
        canvas: Width and height in pixels that the test pipeline then pads to, at the right and at the bottom, or
            ``None``. Unlike the padding inside, this belongs to the image.
        canvas_value: What it pads with, from 0 to 255.
        score_threshold: Detections below it should not be drawn.
        mask_threshold: The least probability of a pixel that belongs to a mask.
        precision: The precision in which it computes: ``'float32'``, ``'float16'``, ``'bfloat16'`` where the processor
            has it, or ``'int8'``.
        exact_products: Whether it was made for processors that add products of 8-bit numbers exactly, by VNNI or the
            like. Any other file is right on every processor.
        config: Name of the config.
        checkpoint: Name of the checkpoint's file.
        sha256: The checkpoint's SHA-256.
        versions: The libraries that made the file, and their versions.
    """

    task: Task
    outputs: tuple[str, ...]
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    batch: int | None = 1
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    divisor: int = 1
    preprocessing_inside: bool = True
    scale: tuple[int, int] | None = None
    keep_ratio: bool = False
    scale_divisor: int = 1
    canvas: tuple[int, int] | None = None
    canvas_value: float = 0.0
    score_threshold: float = 0.3
    mask_threshold: float = 0.5
    precision: str = 'float32'
    exact_products: bool = False
    config: str = ''
    checkpoint: str = ''
    sha256: str = ''
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the input if they are fixed."""
        return self.sizes[0] if self.sizes else None

    def to_dict(self) -> dict[str, Any]:
        """The fields in the types that JSON has."""
        return json.loads(json.dumps(asdict(self)))

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> 'FileInfo':
        """The opposite of :meth:`to_dict`. Fields that a later version added are ignored.

        Raises:
            MetadataError: if a field is missing or has an invalid value.
        """
        known = {f.name: _tuples(values[f.name]) for f in fields(cls) if f.name in values}
        try:
            info = cls(**known)
        except TypeError as error:
            raise MetadataError(f'its description lacks something ({error})') from None
        if info.task not in get_args(Task):
            raise MetadataError(f'its task is {info.task!r}: expected one of {", ".join(get_args(Task))}')
        return info

    @classmethod
    def from_json(cls, text: str) -> 'FileInfo':
        """The opposite of :meth:`to_json`.

        Raises:
            MetadataError: if the text is no such description.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise MetadataError(f'its description is no JSON ({error})') from None
        if not isinstance(values, Mapping):
            raise MetadataError('its description is no JSON object')
        return cls.from_dict(values)


def _tuples(value: Any) -> Any:
    """Lists, which JSON makes of tuples, as tuples again."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
