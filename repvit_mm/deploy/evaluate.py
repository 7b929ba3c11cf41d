"""Tests an exported file by its config: same data set, same metric, same table."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, TRANSFORMS
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import Tensor

from .load import class_names, plain_datasets
from .metadata import TASKS, FileInfo
from .prediction import FittedImage, LabelMap, fit_image, predict
from .runtimes import open_file

GEOMETRY = ('Resize', 'FixScaleResize', 'ResizeToMultiple', 'Pad')
"""Steps of a test pipeline that :class:`FitToFile` replaces."""

OF_THE_NETWORK = ('EMAHook', 'FuseOnDeployHook')
"""Hooks that need the network itself."""


class MismatchError(ValueError):
    """A file cannot stand in for a config's network; the message is one line that says why."""


@MODELS.register_module()
class ExportedModel(BaseModel):
    """Runs an exported file where MMEngine's Runner expects a model, one image at a time.

    Args:
        file: The file.
        threads: How many threads it computes in; ``None`` leaves that to the library.

    Raises:
        RuntimeFileError: if it cannot be opened.
    """

    def __init__(self, file: str, threads: int | None = None) -> None:
        super().__init__()
        self.runtime = open_file(file, threads)

    def test_step(self, data: dict[str, Any]) -> list[BaseDataElement]:
        """Predict on a batch of the pipeline's; the file itself normalizes and pads."""
        return self(data['inputs'], data['data_samples'])

    def forward(self, inputs: Sequence[Tensor], data_samples: Sequence[BaseDataElement]) -> list[BaseDataElement]:
        """Add the file's predictions, in the pixels of the original images, to the data samples.

        Args:
            inputs: Images as the pipelines of MMDetection and MMSegmentation pack them: ``(3, H, W)``, BGR.
            data_samples: Their data samples.
        """
        return [self._predict(image, sample) for image, sample in zip(inputs, data_samples, strict=True)]

    def _predict(self, image: Tensor, sample: BaseDataElement) -> BaseDataElement:
        pixels = np.ascontiguousarray(image.cpu().numpy()[::-1], np.float32)
        content = tuple(sample.get('img_shape', pixels.shape[1:]))
        scale = tuple(sample.get('scale_factor', (1.0, 1.0)))
        seen = predict(self.runtime, FittedImage(pixels, tuple(sample.ori_shape), content, scale))
        if isinstance(seen, LabelMap):
            sample.pred_sem_seg = PixelData(data=torch.from_numpy(seen.labels)[None].long())
            return sample
        found = dict(bboxes=seen.boxes, scores=seen.scores, labels=seen.labels)
        if seen.masks is not None:
            found['masks'] = seen.masks
        sample.pred_instances = InstanceData(**{name: torch.from_numpy(array) for name, array in found.items()})
        return sample


@TRANSFORMS.register_module()
class FitToFile(BaseTransform):
    """Resizes and pads an image as a file of fixed size takes it, and as ``tools/predict.py`` does.

    Args:
        info: The file's description as a dictionary.
    """

    def __init__(self, info: dict[str, Any]) -> None:
        self.info = FileInfo.from_dict(info)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Change ``img``; ``img_shape`` becomes the size without padding."""
        fitted = fit_image(results['img'], self.info)
        # The packing step expects an image as it is loaded: (H, W, 3), BGR.
        results['img'] = np.ascontiguousarray(fitted.pixels[::-1].transpose(1, 2, 0))
        return dict(results, img_shape=fitted.content, scale_factor=fitted.scale, keep_ratio=self.info.keep_ratio)


def put_file(cfg: Config, path: str) -> str:
    """Let an exported file replace the network of a config, for a test run.

    A file of any size gets the images as the config's pipeline makes them. A file of fixed size gets them resized to
    fit it, within the config's own scale and with their aspect ratio if the config keeps it, and padded at the right
    and the bottom: with what the config's ``Pad`` fills in if it has one, or else with the mean colour.

    Args:
        cfg: A detector's or a segmentor's config, which changes.
        path: The file.

    Returns:
        One line that says how images reach the file.

    Raises:
        RuntimeFileError: if the file cannot be opened.
        MismatchError: if it is of another task, has other classes, or gives no masks where masks are evaluated.
    """
    info = open_file(path).info
    check(info, cfg, path)
    cfg.model = dict(type='ExportedModel', file=str(path))
    cfg.pop('data_preprocessor', None)  # MMSegmentation's configs have one beside the model, which MMEngine hands over
    cfg.load_from = None
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or [] if bare_type(hook) not in OF_THE_NETWORK]
    if not info.sizes:
        return f"{path} takes images of any size: as the config's pipeline makes them"
    fit = dict(type='FitToFile', info=replace(info, classes=(), palette=(), versions={}).to_dict())
    for _, dataset in plain_datasets(cfg.test_dataloader.dataset):
        load, *steps = (step for step in dataset.pipeline if bare_type(step) not in GEOMETRY)
        dataset.pipeline = [load, fit, *steps]
    sizes = ' or '.join(f'{height}x{width}' for height, width in info.sizes)
    return f'{path} takes images of {sizes} pixels: resized to fit, and padded'


def check(info: FileInfo, cfg: Config, path: str) -> None:
    """Raise a :class:`MismatchError` unless a file may stand in for a config's network."""
    task = TASKS[cfg.default_scope]
    if info.task != task:
        raise MismatchError(f'{path} is a file for {info.task}, the config is for {task}')
    classes, _ = class_names(cfg, None)
    if info.classes != classes:
        pairs = zip_longest(info.classes, classes, fillvalue='nothing')
        in_file, in_config = next(pair for pair in pairs if pair[0] != pair[1])
        raise MismatchError(
            f"{path} has other classes than the config's data set: {len(info.classes)} for {len(classes)}, "
            f'{in_file} in place of {in_config} first'
        )
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if 'masks' not in info.outputs and any('segm' in (evaluator.get('metric') or ()) for evaluator in evaluators):
        raise MismatchError(f'{path} predicts boxes only and the config evaluates masks: take --eval bbox')


def bare_type(node: dict[str, Any]) -> str:
    """The type that a step or a hook names, without its scope."""
    return str(node['type']).rpartition('.')[2]
