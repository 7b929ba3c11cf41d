"""A warning where pretrained weights get other images than those that they were trained on.

A backbone does not know what feeds it: its detector's data preprocessor does. The two meet as the backbone becomes a
part of the detector, which is when torch calls :func:`check_normalization`. So the warning comes with every launcher,
and no config has to ask for it. Nothing is said where images are normalized in a pipeline, which a model does not see.
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
"""Of ImageNet's RGB images, from 0 to 255: what the released weights of all families were trained with."""


def fed(preprocessor: nn.Module) -> str | None:
    """What a data preprocessor makes of BGR images; ``None`` if that is what the pretrained weights expect."""
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
    return f'{order} normalized with mean={rounded(mean)}, std={rounded(std)}'


def rounded(values: torch.Tensor) -> list[float]:
    """As they are written in a config."""
    return [round(float(value), 3) for value in values.tolist()]


def check_normalization(model: nn.Module, name: str, backbone: nn.Module | None) -> None:
    """Warn if a backbone with pretrained weights becomes a part of a model that feeds it other images than ImageNet's.

    Args:
        model: Anything that a module becomes a part of.
        name: The part's name.
        backbone: The part.
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
