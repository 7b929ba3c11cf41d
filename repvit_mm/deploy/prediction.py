"""Turns an image into a file's input, and its outputs into a prediction. Needs numpy and OpenCV only.

Sizes are (height, width) in pixels; images are ``(H, W, 3)`` uint8 in OpenCV's order of channels, BGR.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from .masks import paste_masks
from .metadata import FileInfo
from .runtimes import Runtime

if TYPE_CHECKING:
    from supervision import CompactMask


@dataclass(frozen=True)
class Detections:
    """What a detector sees in an image.

    Args:
        boxes: ``(K, 4)`` float32, x1 y1 x2 y2 in the image's pixels.
        scores: ``(K,)`` float32, in falling order.
        labels: ``(K,)`` int, indices of the class names.
        masks: ``(K, H, W)`` bool of the image's size, dense or compact; ``None`` if the detector predicts none.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: 'np.ndarray | CompactMask | None' = None

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> 'Detections':
        """The detections whose score is at least ``score``."""
        kept = np.flatnonzero(self.scores >= score)
        masks = None if self.masks is None else self.masks[kept]
        return Detections(self.boxes[kept], self.scores[kept], self.labels[kept], masks)


@dataclass(frozen=True)
class LabelMap:
    """What a segmentor sees in an image: ``labels`` ``(H, W)`` int, an index of the class names for each pixel."""

    labels: np.ndarray


Prediction = Detections | LabelMap


@dataclass(frozen=True)
class FittedImage:
    """An image as a file takes it.

    Args:
        pixels: ``(3, H, W)`` float32, RGB, values from 0 to 255.
        original: Size of the image.
        content: Size of the part of ``pixels`` that boxes may cover: the resized image, or the config's canvas, which
            counts as a part of it. Right of it and below it is padding.
        scale: How much higher and wider the image became: pixels of the input for one pixel of the image.
    """

    pixels: np.ndarray
    original: tuple[int, int]
    content: tuple[int, int]
    scale: tuple[float, float]


def fit_image(image: np.ndarray, info: FileInfo) -> FittedImage:
    """Make an image ready for a file.

    It is resized as the config's test pipeline resizes it, by the same function of OpenCV, and padded to the config's
    canvas if it has one. A file of fixed size bounds the resizing further, and its input is filled up: with the
    canvas's value, or else with the mean colour, which normalization turns into zeros. If it takes several sizes, the
    one is chosen in which the image comes out largest.

    Args:
        image: ``(H, W, 3)`` uint8, BGR.
        info: What the file says of itself.
    """
    original = image.shape[:2]
    # Of equals max takes the first, which is the default.
    bound = max(info.sizes, key=lambda size: np.prod(content_size(original, info, size)), default=None)
    resized = resize(image, content_size(original, info, bound), info, bound)
    height, width = content = resized.shape[:2]
    scale = (width / original[1], height / original[0])
    if info.canvas:
        content = tuple(map(max, content, info.canvas[::-1]))
        content = tuple(map(min, content, bound)) if bound else content
    return FittedImage(pad(to_input(resized), bound or content, info), original, content, scale)


def content_size(original: tuple[int, int], info: FileInfo, bound: tuple[int, int] | None = None) -> tuple[int, int]:
    """Size that an image is resized to: the rule of mmcv's ``Resize``, within ``bound`` if there is one."""
    if info.scale and not info.keep_ratio:
        return bound or info.scale[::-1]
    long, short = max(original), min(original)
    factor = min(max(info.scale) / long, min(info.scale) / short) if info.scale else 1.0
    if not bound:
        return tuple(max(int(side * factor + 0.5), 1) for side in original)
    factor = min(factor, *(limit / side for limit, side in zip(bound, original, strict=True)))
    return tuple(min(max(int(side * factor + 0.5), 1), limit) for side, limit in zip(original, bound, strict=True))


def resize(
    image: np.ndarray, size: tuple[int, int], info: FileInfo, bound: tuple[int, int] | None = None
) -> np.ndarray:
    """Resize an image, then each side up to a multiple of ``info.scale_divisor``: twice, as the pipeline does."""
    image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    divisor = info.scale_divisor
    if divisor > 1:
        size = tuple(-(-side // divisor) * divisor for side in size)
        size = tuple(map(min, size, bound)) if bound else size
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    return image


def to_input(image: np.ndarray) -> np.ndarray:
    """``(H, W, 3)`` uint8 BGR as ``(3, H, W)`` float32 RGB."""
    return np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1), np.float32)


def pad(pixels: np.ndarray, size: tuple[int, int], info: FileInfo) -> np.ndarray:
    """Fill up ``(3, H, W)`` to ``size``, at the right and the bottom."""
    height, width = pixels.shape[1:]
    padded = np.empty((3, *size), np.float32)
    padded[:] = info.canvas_value if info.canvas else np.asarray(info.mean, np.float32)[:, None, None]
    padded[:, :height, :width] = pixels
    return padded


def predict(runtime: Runtime, fitted: FittedImage) -> Prediction:
    """Run a file on one image.

    Returns:
        What it sees, in the pixels of the original image.

    Raises:
        RuntimeFileError: if the file does not take the image, or fails.
    """
    # A file for several images at once gets the same one several times.
    images = np.repeat(fitted.pixels[None], runtime.info.batch or 1, axis=0)
    outputs = {name: array[0] for name, array in runtime.run(images).items()}
    if runtime.info.task == 'segmentation':
        return label_map(outputs, fitted)
    return detections(outputs, fitted, runtime.info.mask_threshold)


def detections(outputs: Mapping[str, np.ndarray], fitted: FittedImage, mask_threshold: float = 0.5) -> Detections:
    """A detector's outputs for one image in the pixels of the original."""
    count = int(outputs['count'])
    boxes, scores, labels = (outputs[name][:count] for name in ('boxes', 'scores', 'labels'))
    height, width = fitted.content
    # Boxes that begin in the padding are dropped.
    kept = (boxes[:, 0] < width) & (boxes[:, 1] < height)
    edges = np.array([width, height, width, height], np.float32)
    boxes = boxes[kept].clip(0, edges) / np.array(fitted.scale * 2, np.float32)
    masks = outputs.get('masks')
    if masks is not None:
        masks = paste_masks(masks[:count][kept], boxes, fitted.original, mask_threshold)
    return Detections(boxes, scores[kept], labels[kept], masks)


def label_map(outputs: Mapping[str, np.ndarray], fitted: FittedImage) -> LabelMap:
    """A segmentor's outputs for one image at the size of the original.

    Logits are interpolated before their largest is taken, as MMSegmentation does. Labels can only be repeated.
    """
    height, width = fitted.content
    size = fitted.original[::-1]
    if 'labels' in outputs:
        labels = np.asarray(outputs['labels'][:height, :width], np.int32)
        return LabelMap(cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT))
    # One class at a time: all of them at the size of a large image would fill the memory.
    labels, best = np.zeros(fitted.original, np.int32), np.full(fitted.original, -np.inf, np.float32)
    for label, logits in enumerate(outputs['logits'][:, :height, :width]):
        logits = cv2.resize(np.asarray(logits, np.float32), size, interpolation=cv2.INTER_LINEAR)
        better = logits > best
        labels[better], best[better] = label, logits[better]
    return LabelMap(labels)
