"""Warns if pretrained weights are fed images that are normalized in another way than in pretraining.

A backbone does not know how its images are normalized: the data preprocessor of its detector does. Both are known when
the backbone becomes a part of the detector, and that is when torch calls :func:`check_normalization`. So the warning
works with every launcher, and no config has to ask for it. Images that are normalized in a pipeline are not checked,
because the model does not see the pipeline.
"""

import logging
from collections.abc import Mapping

import torch
from mmengine.logging import print_log
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .backbone import ReparamBackbone
from .compat.openmmlab import may_normalize, normalizes, reverses_channels

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
"""Mean and standard deviation of ImageNet's RGB images, from 0 to 255, which all released weights were trained with."""


def fed(preprocessor: nn.Module) -> str | None:
    """How a data preprocessor changes BGR images, in words; ``None`` if that is what the pretrained weights expect."""
    order = 'RGB' if reverses_channels(preprocessor) else 'BGR'
    if not normalizes(preprocessor):
        return f'{order} from 0 to 255'
    mean, std = preprocessor.mean.flatten().cpu(), preprocessor.std.flatten().cpu()
    close = [
        torch.allclose(ours.float(), torch.tensor(theirs), rtol=0, atol=1.0)
        for ours, theirs in ((mean, MEAN), (std, STD))
    ]
    if order == 'RGB' and all(close):
        return None
    if not mean.any() and (std == std[0]).all():  # MMYOLO divides by 255
        return f'{order} from 0 to {255 / float(std[0]):.4g}'
    return f'{order} normalized with mean={rounded(mean)}, std={rounded(std)}'


def rounded(values: torch.Tensor) -> list[float]:
    """As they are written in a config."""
    return [round(float(value), 3) for value in values.tolist()]


def check_normalization(model: nn.Module, name: str, backbone: nn.Module | None) -> None:
    """Warn if a backbone with pretrained weights joins a model that does not normalize its images as ImageNet's.

    Args:
        model: The module that gets a new part; any module.
        name: The part's name.
        backbone: The part; any module.
    """
    if not isinstance(backbone, ReparamBackbone) or not is_pretrained(backbone):
        return
    preprocessor = getattr(model, 'data_preprocessor', None)
    if not may_normalize(preprocessor):
        return
    if what := fed(preprocessor):
        print_log(
            f'{type(model).__name__} feeds {type(backbone).__name__} {what}, but its pretrained weights expect '
            f"ImageNet's RGB: set model.data_preprocessor to mean={list(MEAN)}, std={list(STD)}, bgr_to_rgb=True",
            'current',
            logging.WARNING,
        )


def is_pretrained(backbone: ReparamBackbone) -> bool:
    """Whether the backbone's own ``init_cfg`` names a checkpoint."""
    settings = backbone.init_cfg if isinstance(backbone.init_cfg, list) else [backbone.init_cfg]
    return any(isinstance(each, Mapping) and each.get('type') == 'Pretrained' for each in settings)


register_module_module_registration_hook(check_normalization)
