"""The classification heads of the backbones, for MMPretrain. This module needs MMPretrain to be imported.

``custom_imports = dict(imports=['repvit_mm', 'repvit_mm.pretrain'])`` registers them for configs.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

from mmengine.registry import MODELS
from mmpretrain.models import ClsHead
from torch import Tensor, nn

from .checkpoint import CheckpointError, source_of, tensors_of
from .compat.pytorch import before_loading
from .layers import GELU, ChannelLinear, MobileOneBlock, NormLinear, SqueezeExcite
from .loading import misfit, shapes_of
from .names import FASTVIT_NAMES, MOBILEONE_NAMES, REPVIT_NAMES, Naming
from .reparam import KernelSum, ReparamBlock, add_kernels, scale_kernel


class ReleasedHead(ClsHead):
    """A head whose tensors stand beside the backbone's in the ImageNet files of the authors and of timm.

    Name a file in the ``init_cfg`` of the backbone and in that of the head. The head takes the backbone's last map and
    pools by itself, so the classifier has no neck.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the backbone's last map.
        loss: Config of the loss; MMPretrain's cross entropy unless given.
        topk: Ranks of the accuracies.
        cal_acc: Whether to compute accuracies during training.
        init_cfg: Initialization, e.g. ``dict(type='Pretrained', checkpoint=...)``; truncated normal weights of 0.02
            otherwise, as the authors have it.
    """

    naming: ClassVar[Naming]

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
        self.expand = self._make_expand()
        self.classifier = self._make_classifier()
        for linear in (module for module in self.classifier.modules() if isinstance(module, nn.Linear)):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        before_loading(self, ReleasedHead.take_released_file)

    def _make_expand(self) -> nn.Module:
        """What stands before the pooling, ``(N, C, H, W)`` to ``(N, C', H, W)``."""
        return nn.Identity()

    def _make_classifier(self) -> nn.Module:
        """What gives the scores ``(N, num_classes, 1, 1)`` of the pooled features ``(N, C', 1, 1)``."""
        return ChannelLinear(self.in_channels, self.num_classes)

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        """The pooled features of the last map, ``(N, C, H, W)`` to ``(N, C')``.

        Raises:
            ValueError: if the map is pooled already.
        """
        if feats[-1].ndim != 4:
            raise ValueError(f'{type(self).__name__} pools the maps of the backbone itself: set neck=None')
        return self.expand(feats[-1]).mean((2, 3))

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """The scores ``(N, num_classes)`` of the last map, ``(N, C, H, W)``."""
        return self.classifier(self.pre_logits(feats)[..., None, None]).flatten(1)

    def take_released_file(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Keep the head's tensors of a released file, by our names, if one is loaded into the head.

        Raises:
            CheckpointError: if one is missing, left over or of another shape.
        """
        tensors = tensors_of(state_dict)
        names = None if prefix else self.naming.head_names(tensors)
        if names is None:
            return
        head = {ours: tensors[name] for name, ours in names.items()}
        if reason := misfit(shapes_of(head), shapes_of(self.state_dict())):
            file = source_of(tensors.values()).file
            raise CheckpointError(f'{file} does not fit {type(self).__name__} of {self.num_classes} classes: {reason}')
        state_dict.clear()
        state_dict.update(head)


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

    def folded_branches(self) -> KernelSum:
        return scale_kernel(add_kernels(self.labels.folded_branches(), self.teacher.folded_branches()), 0.5)


@MODELS.register_module()
class RepViTHead(ReleasedHead):
    """RepViT's head: pooling and the mean of two classifiers.

    Source: https://github.com/THU-MIG/RepViT, model/repvit.py. Arguments as in :class:`ReleasedHead`.
    """

    naming = REPVIT_NAMES

    def _make_classifier(self) -> nn.Module:
        return MeanClassifier(self.in_channels, self.num_classes)


@MODELS.register_module()
class FastViTHead(ReleasedHead):
    """FastViT's head: a 3x3 depthwise block that doubles the channels, squeeze-and-excitation, pooling, a classifier.

    Source: https://github.com/apple/ml-fastvit, models/fastvit.py. Arguments as in :class:`ReleasedHead`.
    """

    naming = FASTVIT_NAMES

    def _make_expand(self) -> nn.Module:
        channels = 2 * self.in_channels
        conv = MobileOneBlock(self.in_channels, channels, 3, groups=self.in_channels)
        return nn.Sequential(OrderedDict(conv=conv, se=SqueezeExcite(channels, channels // 16), act=GELU()))

    def _make_classifier(self) -> nn.Module:
        return ChannelLinear(2 * self.in_channels, self.num_classes)


@MODELS.register_module()
class MobileOneHead(ReleasedHead):
    """MobileOne's head: pooling and a classifier.

    Source: https://github.com/apple/ml-mobileone, mobileone.py. Arguments as in :class:`ReleasedHead`.
    """

    naming = MOBILEONE_NAMES
