"""Predicting with a PyTorch model of MMDetection or MMSegmentation."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.registry import DefaultScope

from ..messages import one_line
from .load import class_names, fuse_model, load_model, read_checkpoint, test_dataset
from .metadata import TASKS
from .prediction import Detections, LabelMap, Prediction
from .sources import UnreadableError


class ModelPredictor:
    """A :class:`~repvit_mm.deploy.predict.Predictor` that runs a model through its config's own test pipeline.

    Args:
        cfg: A detector's or a segmentor's config.
        checkpoint: Path or address of the checkpoint.
        fuse: Whether to fuse the model for deployment.
        device: Where it runs; ``None`` for a GPU if there is one.

    Raises:
        ExportError: if the config's model cannot be built.
        CheckpointError: if the checkpoint cannot be read, or is not of this config.
    """

    score_threshold = 0.3

    def __init__(self, cfg: Config, checkpoint: str, fuse: bool = False, device: str | None = None) -> None:
        read = read_checkpoint(checkpoint)
        model = load_model(cfg, read)
        self.model = (fuse_model(model) if fuse else model).to(device or get_device())
        self.task = TASKS[cfg.default_scope]
        self.classes, self.palette = class_names(cfg, read)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            self.pipeline = image_pipeline(test_dataset(cfg).pipeline, cfg.default_scope)

    def __call__(self, image: np.ndarray) -> Prediction:
        """What is seen in an image ``(H, W, 3)``, uint8, BGR, in its own pixels.

        Raises:
            UnreadableError: if the config's test pipeline cannot prepare it.
        """
        try:
            data = self.pipeline({'img': image, 'img_id': 0})
        except Exception as error:  # a pipeline may raise anything
            size = f'{image.shape[1]}x{image.shape[0]}'
            raise UnreadableError(f'of {size} pixels cannot be prepared for the model: {one_line(error)}') from error
        with torch.no_grad():
            (sample,) = self.model.test_step({key: [value] for key, value in data.items()})
        if self.task == 'segmentation':
            return LabelMap(sample.pred_sem_seg.data[0].cpu().numpy())
        found = sample.pred_instances.cpu().numpy()
        return Detections(found.bboxes, found.scores, found.labels, found.get('masks'))


def image_pipeline(pipeline: Sequence[dict], scope: str) -> Compose:
    """A test pipeline for an image that is in memory and has no annotations.

    Args:
        pipeline: The pipeline of a data set.
        scope: The config's. MMYOLO takes the step for images in memory from MMDetection.
    """
    steps = [copy.deepcopy(step) for step in pipeline if 'Annotations' not in step['type']]
    loader = steps[0]['type'].replace('LoadImageFromFile', 'LoadImageFromNDArray')
    steps[0]['type'] = f'mmdet.{loader}' if scope == 'mmyolo' and '.' not in loader else loader
    return Compose(steps)
