"""RepViT's classification head for MMPretrain. This module needs MMPretrain to be imported.

``custom_imports = dict(imports=['repvit_mm', 'repvit_mm.pretrain'])`` registers it for configs.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from mmpretrain.models import ClsHead
from torch import Tensor, nn

from .checkpoint import tensors_of
from .layers import NormLinear
from .reparam import Kernel, ReparamBlock

CLASSIFIERS = {
    'classifier.classifier.': 'classifiers.labels.',
    'classifier.classifier_dist.': 'classifiers.teacher.',
    'head.head.': 'classifiers.labels.',
    'head.head_dist.': 'classifiers.teacher.',
}
"""The authors' and timm's names of the two classifiers -> ours."""
LAYERS = {'bn': 'norm', 'l': 'linear'}


class MeanClassifier(ReparamBlock):
    """The mean of two classifiers, one that learned from the labels and one that learned from a teacher.

    Together they equal a single linear layer, and fusing makes them one.

    Args:
        in_channels: Channels of the features.
        num_classes: Number of classes.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(stride=1, padding=0, groups=1)
        self.labels = NormLinear(in_channels, num_classes, bias=True)
        self.teacher = NormLinear(in_channels, num_classes, bias=True)

    def branches(self, x: Tensor) -> Tensor:
        return (self.labels(x) + self.teacher(x)) / 2

    def equivalent_kernel(self) -> Kernel:
        kernels = self.labels.equivalent_kernel(), self.teacher.equivalent_kernel()
        return Kernel(*(torch.stack(pair).mean(0) for pair in zip(*kernels, strict=True)))


@MODELS.register_module()
class RepViTHead(ClsHead):
    """RepViT's head: the mean of its two classifiers, behind MMPretrain's ``GlobalAveragePooling``.

    The released ImageNet files of the authors and of timm load whole: name one in the ``init_cfg`` of the backbone and
    in the ``init_cfg`` of the head. Source: https://github.com/THU-MIG/RepViT, model/repvit.py.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the backbone's last map.
        loss: Config of the loss; MMPretrain's cross entropy unless given.
        topk: Ranks of the accuracies.
        cal_acc: Whether to compute accuracies during training.
        init_cfg: Initialization, e.g. ``dict(type='Pretrained', checkpoint=...)``; truncated normal weights of 0.02
            otherwise, as the authors have it.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        loss: dict | None = None,
        topk: int | Sequence[int] = (1,),
        cal_acc: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        loss = {'type': 'CrossEntropyLoss', 'loss_weight': 1.0} if loss is None else loss
        super().__init__(loss, tuple(topk) if isinstance(topk, Sequence) else topk, cal_acc, init_cfg)
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.classifiers = MeanClassifier(in_channels, num_classes)
        for classifier in (self.classifiers.labels, self.classifiers.teacher):
            nn.init.trunc_normal_(classifier.linear.weight, std=0.02)
            nn.init.zeros_(classifier.linear.bias)
        self.register_load_state_dict_pre_hook(RepViTHead.take_released_names)

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """The scores ``(N, num_classes)`` of the last pooled features, ``(N, C)``."""
        return self.classifiers(self.pre_logits(feats)[..., None, None]).flatten(1)

    def take_released_names(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Rename the classifiers of a released file, and drop the rest of the file if it is loaded into the head."""
        tensors = state_dict if prefix else dict(tensors_of(state_dict))
        renamed = {}
        for name in [name for name in tensors if name.startswith(tuple(prefix + theirs for theirs in CLASSIFIERS))]:
            theirs, layer, tensor = re.fullmatch(r'(.*\.)(\w+)\.(\w+)', name.removeprefix(prefix)).groups()
            renamed[f'{prefix}{CLASSIFIERS[theirs]}{LAYERS[layer]}.{tensor}'] = tensors.pop(name)
        if renamed and not prefix:
            state_dict.clear()
        state_dict.update(renamed)
