"""Ground truth of one image for each task."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

if TYPE_CHECKING:
    from mmdet.structures import DetDataSample
    from mmseg.structures import SegDataSample


def detection_sample(size: tuple[int, int], classes: int) -> 'DetDataSample':
    """Two objects with boxes and masks, of the first and the last class, and the same as a panoptic map.

    Args:
        size: Height and width in pixels, at least 64 and 96.
        classes: Number of classes.
    """
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    height, width = size
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 80.0, 60.0]])
    labels = torch.tensor([0, classes - 1])
    masks = np.zeros((2, height, width), np.uint8)
    panoptic = torch.full((1, height, width), 80)  # COCO's first class without instances
    for mask, label, (x1, y1, x2, y2) in zip(masks, labels, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
        panoptic[:, y1:y2, x1:x2] = label
    sample = DetDataSample(
        metainfo=dict(
            img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0), img_id=0
        )
    )
    sample.gt_instances = InstanceData(bboxes=boxes, labels=labels, masks=BitmapMasks(masks, height, width))
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    sample.gt_sem_seg = PixelData(sem_seg=panoptic)
    return sample


def segmentation_sample(size: tuple[int, int], classes: int) -> 'SegDataSample':
    """A random class at each place.

    Args:
        size: Height and width in pixels.
        classes: Number of classes.
    """
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size))
    sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, *size)))
    return sample


def training_batch(cfg: Config, images: Sequence[Tensor], samples: Sequence[Any]) -> dict[str, Any]:
    """Images and their ground truth as a config's data loader hands them to the model."""
    if cfg.train_dataloader.get('collate_fn', {}).get('type') != 'yolov5_collate':
        return dict(inputs=list(images), data_samples=list(samples))
    from mmdet.structures.bbox import HorizontalBoxes
    from mmyolo.datasets.utils import yolov5_collate

    for sample in samples:
        truth = InstanceData(bboxes=HorizontalBoxes(sample.gt_instances.bboxes), labels=sample.gt_instances.labels)
        sample.gt_instances = truth
    return yolov5_collate([dict(inputs=i, data_samples=sample) for i, sample in zip(images, samples, strict=True)])
