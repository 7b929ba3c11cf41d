"""Graphs for export: a built model as one function of RGB images, including what the framework does around it.

A graph takes RGB images with values from 0 to 255, whatever the config's channel order is. It contains the work of the
config's data preprocessor, of its heads and of their post-processing.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat.openmmlab import normalizes, reverses_channels
from .metadata import Task
from .operators import (
    Size,
    Suppress,
    best_candidates,
    clip_boxes,
    decode_deltas,
    decode_distances,
    non_maximum_suppression,
    smaller,
    suppress_by_loop,
    suppress_by_onnx,
    take,
)


class ExportError(RuntimeError):
    """A model cannot be exported, or a file is not the model; the message is one line that says why."""


class Preprocess(nn.Module):
    """Prepares RGB images for a network: channel order, normalization, padding at the right and at the bottom.

    Args:
        mean: Mean of each channel, RGB.
        std: Standard deviation of each channel, RGB.
        divisor: Each side is padded to a multiple of it.
        least: Height and width that images are padded to at least.
        value: Value of the padding, in units of the normalized image.
        bgr: Whether the network wants BGR.
    """

    def __init__(
        self,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        divisor: int = 1,
        least: tuple[int, int] = (0, 0),
        value: float = 0.0,
        bgr: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer('mean', torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer('std', torch.tensor(std, dtype=torch.float32).view(3, 1, 1))
        self.normalizes = any(mean) or set(std) != {1}
        self.divisor = divisor
        self.least = least
        self.value = value
        self.bgr = bgr

    @classmethod
    def of(cls, preprocessor: nn.Module) -> 'Preprocess':
        """The preprocessing that a data preprocessor of MMDetection, MMSegmentation or MMEngine does in a test.

        Raises:
            ExportError: if it is of another kind.
        """
        from mmengine.model import BaseDataPreprocessor

        if type(preprocessor) is BaseDataPreprocessor:  # it only moves and stacks
            return cls(bgr=True)
        known = ('DetDataPreprocessor', 'SegDataPreProcessor', 'ImgDataPreprocessor')
        name = type(preprocessor).__name__.removeprefix('YOLOv5')  # MMYOLO's differs in training only
        if name not in known:
            raise ExportError(f'the data preprocessor {name} cannot be exported: expected one of {", ".join(known)}')
        options = {}
        if normalizes(preprocessor):
            options = {'mean': _three(preprocessor.mean), 'std': _three(preprocessor.std)}
        if name == 'SegDataPreProcessor':
            padding = preprocessor.test_cfg or {}
            options |= {'least': tuple(padding.get('size') or (0, 0)), 'value': preprocessor.pad_val}
            options['divisor'] = 1 if padding.get('size') else padding.get('size_divisor') or 1
        else:
            options |= {'divisor': preprocessor.pad_size_divisor, 'value': preprocessor.pad_value}
        rgb = reverses_channels(preprocessor)
        if not rgb:  # mean and deviation are in the network's order of channels
            options |= {key: options[key][::-1] for key in ('mean', 'std') if key in options}
        return cls(**options, bgr=not rgb)

    def forward(self, images: Tensor, sides: tuple[Size, Size]) -> Tensor:
        """``(N, 3, H, W)`` with the sides H and W to ``(N, 3, H', W')``."""
        if self.normalizes:
            images = (images - self.mean) / self.std
        if self.bgr:
            images = images[:, [2, 1, 0]]
        if self.divisor > 1 or any(self.least):
            down, right = (self._missing(side, least) for side, least in zip(sides, self.least, strict=True))
            images = F.pad(images, (0, right, 0, down), value=self.value)
        return images

    def _missing(self, side: Size, least: int) -> Size:
        if not least:
            return (self.divisor - side % self.divisor) % self.divisor
        if isinstance(side, Tensor):
            return (least - side).clamp(min=0)
        return torch.sym_max(least - side, 0)


class Graph(nn.Module):
    """A model as one function of images; see :class:`~repvit_mm.deploy.metadata.FileInfo` for what it takes and gives.

    Args:
        model: The built model in ``eval`` mode, fused. If its weights are in half precision it computes in half
            precision; images and results are float32 all the same.
        preprocess: Prepares the images for the model.
    """

    task: ClassVar[Task]
    outputs: tuple[str, ...]
    size: tuple[int, int] | None = None
    """Height and width of the images if they are fixed. A file of a fixed size computes no sizes."""

    limit: int | None = None
    """How many detections of an image there can be."""

    mask_threshold: float = 0.5
    """The least probability of a pixel that belongs to a mask."""

    def __init__(self, model: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess

    def fixed(self, size: Size) -> Size:
        """A size that was computed from the size of the images: a number if that is fixed."""
        return int(size) if self.size else size

    def sides(self, maps: Tensor) -> tuple[Size, Size]:
        """Height and width of images or maps."""
        height, width = maps.shape[-2:]
        return self.fixed(height), self.fixed(width)

    def network_input(self, images: Tensor) -> Tensor:
        """Images as the model wants them, in the dtype of its weights."""
        return self.preprocess(images, self.sides(images)).to(next(self.model.parameters()).dtype)


class BackboneGraph(Graph):
    """A backbone: an image to its maps, ``map0``, ``map1``, ... ``(N, C_i, H_i, W_i)``."""

    task = 'backbone'

    def __init__(self, model: nn.Module, preprocess: Preprocess) -> None:
        super().__init__(model, preprocess)
        self.outputs = tuple(f'map{index}' for index in range(len(model.out_indices)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(map_.float() for map_ in self.model(self.network_input(images)))


class SegmentorGraph(Graph):
    """A segmentor of MMSegmentation: an image to the class of each of its pixels, or to its logits.

    Args:
        model: An ``EncoderDecoder``.
        preprocess: Prepares the images for the model.
        logits: Whether to give logits ``(N, C, H, W)`` instead of labels ``(N, H, W)``.

    Raises:
        ExportError: if the segmentor does anything that is not known here.
    """

    task = 'segmentation'

    def __init__(self, model: nn.Module, preprocess: Preprocess, logits: bool = False) -> None:
        from mmseg.models import EncoderDecoder
        from mmseg.models.decode_heads.decode_head import BaseDecodeHead

        super().__init__(model, preprocess)
        require(model, EncoderDecoder, 'predict', 'inference', 'whole_inference', 'encode_decode', 'extract_feat')
        require(model.decode_head, BaseDecodeHead, 'predict', 'predict_by_feat')
        if model.test_cfg.get('mode', 'whole') != 'whole':
            raise ExportError(
                'a segmentor that slides over the image cannot be exported: '
                '--cfg-options model.test_cfg.mode=whole takes the image as a whole'
            )
        self.outputs = ('logits',) if logits else ('labels',)
        enlarge_by_factors(model.decode_head)

    def forward(self, images: Tensor) -> Tensor:
        x = self.network_input(images)
        logits = self.model.decode_head(self.model.extract_feat(x)).float()
        align = self.model.decode_head.align_corners
        logits = F.interpolate(logits, size=self.sides(x), mode='bilinear', align_corners=align)
        height, width = self.sides(images)
        logits = logits[..., :height, :width]
        if self.outputs == ('logits',):
            return logits
        if logits.shape[1] == 1:
            return (logits.sigmoid() > self.model.decode_head.threshold)[:, 0].long()
        return logits.argmax(dim=1)


def enlarge_by_factors(module: nn.Module) -> None:
    """Replace MMSegmentation's upsampling by torch's, in place.

    MMSegmentation computes the size as a number, so a traced graph would use that number for images of every size.
    """
    from mmseg.models.utils import Upsample

    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Upsample) and child.scale_factor is not None:
                align = child.align_corners
                setattr(
                    parent, name, nn.Upsample(scale_factor=child.scale_factor, mode=child.mode, align_corners=align)
                )


class DetectorGraph(Graph):
    """A one-stage detector of MMDetection: an image to its detections, decoded and suppressed.

    Any head that leaves its post-processing to MMDetection's ``BaseDenseHead`` will do: RetinaNet, RTMDet, ATSS,
    FCOS, ...

    Args:
        model: A ``SingleStageDetector``.
        preprocess: Prepares the images for the model.
        suppress: The formulation of non-maximum suppression.

    Raises:
        ExportError: if the detector does anything that is not known here.
    """

    task = 'detection'
    outputs = ('boxes', 'scores', 'labels', 'count')

    def __init__(self, model: nn.Module, preprocess: Preprocess, suppress: Suppress = suppress_by_loop) -> None:
        from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
        from mmdet.models.detectors import SingleStageDetector

        super().__init__(model, preprocess)
        self.suppress = suppress
        self.limit = model.bbox_head.test_cfg.max_per_img
        require(model, SingleStageDetector, 'predict', 'extract_feat')
        head = model.bbox_head
        require(head, BaseDenseHead, 'predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')
        if type(head.bbox_coder).__name__ not in ('DeltaXYWHBBoxCoder', 'DistancePointBBoxCoder'):
            raise ExportError(f'the box coder {type(head.bbox_coder).__name__} cannot be exported')
        if getattr(head.loss_cls, 'custom_cls_channels', False):
            raise ExportError(f'the classes of {type(head.loss_cls).__name__} cannot be exported')
        nms = head.test_cfg.nms
        if nms.get('type', 'nms') != 'nms' or set(nms) - {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}:
            raise ExportError(f'only plain non-maximum suppression can be exported, not {dict(nms)}')

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        head, cfg = self.model.bbox_head, self.model.bbox_head.test_cfg
        maps = [[map_.float() for map_ in maps] for maps in head(self.model.extract_feat(self.network_input(images)))]
        priors = head.prior_generator.grid_priors([self.sides(map_) for map_ in maps[0]], device=images.device)
        levels = [self._candidates(*level) for level in zip(priors, *maps, strict=True)]
        boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        if getattr(head.bbox_coder, 'clip_border', True):
            boxes = clip_boxes(boxes, *self.sides(images))
        if (least := cfg.get('min_bbox_size', -1)) >= 0:
            large = (boxes[..., 2:] - boxes[..., :2] > least).all(dim=-1)
            scores = torch.where(large, scores, torch.zeros_like(scores))
        nms = cfg.nms
        boxes, scores, labels = non_maximum_suppression(
            boxes, scores, labels, nms.iou_threshold, cfg.max_per_img, self.suppress, nms.get('class_agnostic', False)
        )
        return boxes, scores, labels, (scores > 0).sum(dim=1)

    def _candidates(
        self, priors: Tensor, classes: Tensor, boxes: Tensor, factors: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best boxes ``(N, K, 4)`` of one feature level, their scores and labels ``(N, K)``.

        Args:
            priors: Anchors ``(P, 4)`` or points ``(P, 2)``.
            classes: The head's map for the classes.
            boxes: Its map for the boxes.
            factors: Its map for factors of the scores, if it has one.
        """
        head, cfg = self.model.bbox_head, self.model.bbox_head.test_cfg
        scores = rows_of(classes, head.cls_out_channels)
        scores = scores.sigmoid() if head.use_sigmoid_cls else scores.softmax(dim=-1)[..., :-1]
        count = self.fixed(scores.shape[1] * scores.shape[2])
        limit = cfg.get('nms_pre', -1)
        scores, labels, index = best_candidates(
            scores, cfg.get('score_thr', 0), smaller(limit, count) if limit > 0 else count
        )
        if factors is not None:
            scores = scores * rows_of(factors, 1)[..., 0].sigmoid().gather(1, index)
        boxes = take(rows_of(boxes, 4), index)
        priors = priors[index]
        coder = head.bbox_coder
        if type(coder).__name__ == 'DistancePointBBoxCoder':
            return decode_distances(priors, boxes), scores, labels
        centre_clip = coder.ctr_clamp if coder.add_ctr_clamp else None
        return decode_deltas(priors, boxes, coder.means, coder.stds, centre_clip=centre_clip), scores, labels


def graph_of(model: nn.Module, logits: bool = False, suppress: Suppress = suppress_by_loop) -> Graph:
    """The graph of a built model.

    Args:
        model: A detector, a segmentor, in ``eval`` mode.
        logits: Whether a segmentor gives logits instead of labels.
        suppress: A detector's formulation of non-maximum suppression.

    Raises:
        ExportError: if it is of a kind that is not known here.
    """
    preprocess = Preprocess.of(model.data_preprocessor)
    if hasattr(model, 'decode_head'):
        return SegmentorGraph(model, preprocess, logits)
    if hasattr(model, 'roi_head'):
        from .two_stage import TwoStageGraph

        if suppress is not suppress_by_onnx:
            raise ExportError(f'{type(model).__name__} has two stages: only onnx and openvino files can hold both')
        return TwoStageGraph(model, preprocess)
    return DetectorGraph(model, preprocess, suppress)


def backbone_graph(model: nn.Module) -> BackboneGraph:
    """The graph of a built model's backbone, with the model's normalization."""
    preprocess = Preprocess.of(model.data_preprocessor)
    preprocess.divisor, preprocess.least = 1, (0, 0)  # a backbone takes any size
    return BackboneGraph(model.backbone, preprocess)


def rows_of(map_: Tensor, width: int) -> Tensor:
    """A head's map ``(N, A * width, H, W)`` as rows ``(N, H * W * A, width)``."""
    return map_.permute(0, 2, 3, 1).reshape(map_.shape[0], -1, width)


def _three(values: Tensor) -> list[float]:
    """One or three values of channels as three."""
    return values.flatten().expand(3).tolist()


def require(module: nn.Module, base: type, *methods: str) -> None:
    """Refuse a module that is no ``base``, or that overrides one of the methods that the graph reimplements."""
    name = type(module).__name__
    if not isinstance(module, base):
        raise ExportError(f'{name} cannot be exported: only what is built on {base.__name__} can')
    for method in methods:
        if getattr(type(module), method) is not getattr(base, method):
            raise ExportError(f'{name} cannot be exported: it has its own {method}')
