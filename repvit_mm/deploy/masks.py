"""Turns the masks of a file, each covering its box, into masks of an image. Needs numpy only."""

from collections.abc import Mapping

import numpy as np


def paste_masks(masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int], threshold: float = 0.5) -> np.ndarray:
    """Stretch each mask over its box by bilinear interpolation, as MMDetection's ``FCNMaskHead`` does.

    One mask is stretched at a time, and only where its box is: beside the result this takes the memory of one box.

    Args:
        masks: Probabilities ``(K, h, w)``.
        boxes: ``(K, 4)`` as x1 y1 x2 y2, in pixels of the image.
        size: The image's height and width in pixels.
        threshold: The least probability of a pixel that belongs to an object.

    Returns:
        ``(K, H, W)`` bool.
    """
    pasted = np.zeros((len(masks), *size), bool)
    for image, mask, box in zip(pasted, masks, boxes, strict=True):
        (top, down), (left, across) = (
            _weights(box[axis], box[axis + 2], cells, pixels)
            for axis, cells, pixels in zip((1, 0), mask.shape, size, strict=True)
        )
        inside = down @ mask @ across.T >= threshold
        image[top : top + len(down), left : left + len(across)] = inside
    return pasted


def pasted(outputs: Mapping[str, np.ndarray], size: tuple[int, int], threshold: float = 0.5) -> dict[str, np.ndarray]:
    """A file's outputs with its masks, if it gives any, pasted into an image: ``(N, K, H, W)`` bool."""
    if 'masks' not in outputs:
        return dict(outputs)
    images = zip(outputs['masks'], outputs['boxes'], strict=True)
    return {**outputs, 'masks': np.stack([paste_masks(masks, boxes, size, threshold) for masks, boxes in images])}


def _weights(low: float, high: float, cells: int, pixels: int) -> tuple[int, np.ndarray]:
    """The weights of a mask's cells in the pixels along one side of its box: the first pixel and the weights."""
    first, last = max(int(np.floor(low)) - 1, 0), min(int(np.ceil(high)) + 1, pixels)
    with np.errstate(divide='ignore', invalid='ignore'):  # a box may have no width
        position = (np.arange(first, last, dtype=np.float32) + 0.5 - low) / (high - low) * cells - 0.5
    position = np.where(np.isinf(position), (cells - 1) / 2, position)
    # The weight of a cell falls from 1 at its centre to 0 at the next one's. Beyond the mask there is nothing.
    return first, np.maximum(1 - np.abs(position[:, None] - np.arange(cells, dtype=np.float32)), 0)
