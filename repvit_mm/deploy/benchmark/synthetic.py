"""What stands in for trained weights and for a data set where there are none."""

from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from ...compat.pytorch import BatchNorm
from ..metadata import TASKS

OBJECTS = 7
"""Annotated objects in each synthetic image of a detector, about COCO's mean."""


@torch.no_grad()
def make_trained_like(network: nn.Module, images: Tensor) -> None:
    """Give a network that was just built weights under which each of its branches counts.

    A norm or a layer scale starts as a constant, often as nothing, and would hide an error behind it. Constants are
    drawn anew, and the norms take their statistics from a batch, so that the maps keep their size through all blocks.
    Kernels of a single number are drawn away from zero: the norm behind one would divide by as little, and that
    number's gradient outweigh all others.

    Args:
        network: The network; it is left in ``eval`` mode.
        images: A batch ``(N, 3, H, W)``.
    """
    for parameter in network.parameters():
        constant = parameter.numel() > 1 and parameter.min() == parameter.max()
        if constant or (parameter.dim() == 4 and parameter[0].numel() == 1):
            nn.init.uniform_(parameter, 0.5, 1.5)
    norms = [module for module in network.eval().modules() if isinstance(module, BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # this batch's statistics alone
    network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


def synthetic_samples(cfg: Config, model: nn.Module, batch: int, size: tuple[int, int]) -> dict[str, Any]:
    """Noise with random annotations of the config's task, as a data loader would give it."""
    classes = max((head.num_classes for head in model.modules() if hasattr(head, 'num_classes')), default=2)
    if TASKS[cfg.default_scope] == 'detection':
        from mmdet.testing import demo_mm_inputs

        with_mask = getattr(model, 'with_mask', False)
        return demo_mm_inputs(
            batch, [(3, *size)] * batch, num_items=[OBJECTS] * batch, num_classes=classes, with_mask=with_mask
        )
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = [SegDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size)) for _ in range(batch)]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, *size)))
    return {'inputs': list(torch.randint(256, (batch, 3, *size), dtype=torch.uint8)), 'data_samples': samples}
