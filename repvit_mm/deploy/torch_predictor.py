"""Predicting with a PyTorch model of MMDetection or MMSegmentation."""

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from torch import nn

from .prediction import Detections, LabelMap, Prediction


class ModelPredictor:
    """A :class:`~repvit_mm.deploy.predict.Predictor` that runs a model through its config's own test pipeline.

    Args:
        model: The config's model, with its weights, in evaluation mode.
        cfg: A detector's or a segmentor's config.
    """

    score_threshold = 0.3

    def __init__(self, model: nn.Module, cfg: Config) -> None:
        self.model = model
        self.task = 'segmentation' if cfg.default_scope == 'mmseg' else 'detection'
        self.classes, self.palette = classes_of(cfg)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            self.pipeline = image_pipeline(next(test_datasets(cfg)).pipeline)

    def __call__(self, image: np.ndarray) -> Prediction:
        data = self.pipeline({'img': image, 'img_id': 0})
        with torch.no_grad():
            (sample,) = self.model.test_step({key: [value] for key, value in data.items()})
        if self.task == 'segmentation':
            return LabelMap(sample.pred_sem_seg.data[0].cpu().numpy())
        found = sample.pred_instances.cpu().numpy()
        return Detections(found.bboxes, found.scores, found.labels, found.get('masks'))


def test_datasets(cfg: Config) -> Iterator[ConfigDict]:
    """A config's test data sets, without wrappers such as ``ConcatDataset``."""
    waiting = [cfg.test_dataloader.dataset]
    while waiting:
        dataset = waiting.pop(0)
        inner = dataset.get('datasets') or [dataset[key] for key in ('dataset',) if key in dataset]
        waiting += inner
        if not inner:
            yield dataset


def classes_of(cfg: Config) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Class names of a config's test data set, and their colours, if it has any. The data need not be there."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        metainfo = DATASETS.build(dict(next(test_datasets(cfg)), lazy_init=True)).metainfo
    palette = metainfo.get('palette') or ()
    if palette and isinstance(palette[0], int):  # MMDetection's way to write a single one
        palette = [palette]
    return tuple(metainfo['classes']), tuple(map(tuple, palette))


def image_pipeline(pipeline: Sequence[dict]) -> Compose:
    """A test pipeline for an image that is at hand and has no annotations."""
    steps = [copy.deepcopy(step) for step in pipeline if 'Annotations' not in step['type']]
    steps[0]['type'] = steps[0]['type'].replace('LoadImageFromFile', 'LoadImageFromNDArray')
    return Compose(steps)


def load_model(cfg: Config, checkpoint: str, device: str | None = None) -> nn.Module:
    """A config's model with a checkpoint's weights, in evaluation mode.

    Args:
        cfg: A detector's or a segmentor's config.
        checkpoint: Path or address of the checkpoint.
        device: Where the model goes; ``None`` for a GPU if there is one.

    Raises:
        CheckpointError: if the checkpoint cannot be read or is not of this config.
    """
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    load_checkpoint(model, checkpoint, map_location='cpu')
    return model.to(device or get_device()).eval()
