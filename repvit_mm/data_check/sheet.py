"""A contact sheet: images with their ground truth as the model will see them, after augmentation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.registry import DATASETS, init_default_scope

from ..deploy.picture import Painter
from ..deploy.prediction import Detections, LabelMap
from .check import spread_over

COLUMNS = 4
CELL = 480
"""Width and height in pixels of the place that a picture has."""

CAPTION = 26
"""Height in pixels of the line below it."""


def contact_sheet(cfg: Mapping[str, Any], split: str = 'train', images: int = 16) -> np.ndarray:
    """Draw images of a data set with their ground truth, as they come out of its pipeline.

    Args:
        cfg: A detector's or segmentor's config.
        split: Whose data loader.
        images: How many, evenly spread over the data set.

    Returns:
        ``(H, W, 3)`` uint8, BGR. Below each picture are the file's name and the size that the model is fed.

    Raises:
        Exception: whatever the pipeline raises.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    dataset = DATASETS.build(cfg[f'{split}_dataloader']['dataset'])
    meta = dataset.metainfo
    painter = Painter(meta.get('classes') or (), colours(meta.get('palette')), scores=False)
    ignored = cfg['model'].get('decode_head') or {}
    ignored = ignored.get('ignore_index', 255) if isinstance(ignored, Mapping) else 255
    cells = []
    for index in spread_over(len(dataset), images):
        packed = dataset[index]
        image = to_image(packed['inputs'])
        sample = packed['data_samples']
        picture = painter(image, ground_truth(sample, ignored))
        name = Path(str(sample.metainfo.get('img_path', index))).name
        cells.append(cell(picture, f'{name}  {image.shape[1]}x{image.shape[0]}'))
    return grid(cells)


def colours(palette: Any) -> Sequence[Sequence[int]]:
    """A palette as a sequence of colours; MMDetection writes a single one without a sequence around it."""
    if not isinstance(palette, Sequence) or isinstance(palette, str):
        return ()
    return [palette] if palette and isinstance(palette[0], int) else palette


def to_image(inputs: torch.Tensor) -> np.ndarray:
    """``(3, H, W)``, BGR from 0 to 255, as ``(H, W, 3)`` uint8."""
    return np.ascontiguousarray(inputs.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


def ground_truth(sample: Any, ignored: int) -> Detections | LabelMap:
    """What a packed sample says is in its image; pixels that are ignored stay as they are."""
    if 'gt_sem_seg' in sample:
        labels = sample.gt_sem_seg.data[0].numpy().astype(np.int32)
        return LabelMap(np.where(labels == ignored, -1, labels))
    truth = sample.gt_instances
    boxes = getattr(truth.bboxes, 'tensor', truth.bboxes).numpy()
    masks = truth.masks.to_ndarray().astype(bool) if 'masks' in truth and len(boxes) else None
    return Detections(boxes, np.ones(len(boxes), np.float32), truth.labels.numpy(), masks)


def cell(picture: np.ndarray, caption: str) -> np.ndarray:
    """A picture in its place, with a line below."""
    factor = CELL / max(picture.shape[:2])
    way = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    width, height = (max(1, round(side * factor)) for side in picture.shape[1::-1])
    place = np.full((CELL + CAPTION, CELL, 3), 255, np.uint8)
    top, left = (CELL - height) // 2, (CELL - width) // 2
    place[top : top + height, left : left + width] = cv2.resize(picture, (width, height), interpolation=way)
    cv2.putText(place, caption, (4, CELL + CAPTION - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (40, 40, 40), 1, cv2.LINE_AA)
    return cv2.copyMakeBorder(place, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def grid(cells: Sequence[np.ndarray]) -> np.ndarray:
    """Cells in rows, the last one filled up with white."""
    columns = min(COLUMNS, len(cells))
    blank = np.full_like(cells[0], 255)
    filled = [*cells, *[blank] * (-len(cells) % columns)]
    return cv2.vconcat([cv2.hconcat(filled[start : start + columns]) for start in range(0, len(filled), columns)])
