"""Graphs of two-stage detectors: Faster R-CNN, Mask R-CNN and their cascades."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .graph import ExportError, Graph, Preprocess, require, rows_of
from .operators import (
    Size,
    clip_boxes,
    decode_deltas,
    non_maximum_suppression,
    pyramid_roi_align,
    smaller,
    suppress_by_onnx,
    take,
)


class TwoStageGraph(Graph):
    """A two-stage detector of MMDetection: from an image to its detections, with masks if it predicts any.

    It computes what the framework does in a test with ``RPNHead``, ``StandardRoIHead`` or ``CascadeRoIHead``,
    ``BBoxHead`` and ``FCNMaskHead``. Proposals are suppressed within their level, and every class has its own box. In a
    batch all lists of detections are as long as the longest.

    A mask covers only its box: ``masks`` are probabilities ``(N, K, h, w)``. As in the framework they are stretched
    over the original image afterwards, by :func:`~repvit_mm.deploy.masks.paste_masks`.

    Args:
        model: A ``TwoStageDetector`` with a ``StandardRoIHead`` or a ``CascadeRoIHead``.
        preprocess: Prepares the images for the model.

    Raises:
        ExportError: if the detector does anything that is not known here.
    """

    task = 'detection'

    def __init__(self, model: nn.Module, preprocess: Preprocess) -> None:
        super().__init__(model, preprocess)
        _check(model)
        head = model.roi_head
        self.limit = head.test_cfg.max_per_img
        self.outputs = ('boxes', 'scores', 'labels', 'count') + ('masks',) * head.with_mask
        self.box_stages = list(zip(_stages(head.bbox_roi_extractor), _stages(head.bbox_head), strict=True))
        self.mask_stages = []
        if head.with_mask:
            self.mask_threshold = head.test_cfg.mask_thr_binary
            self.mask_stages = list(zip(_stages(head.mask_roi_extractor), _stages(head.mask_head), strict=True))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        size = self.sides(images)
        maps = self.model.extract_feat(self.network_input(images))
        proposals, is_proposal = self.proposals(maps, size)
        maps = [map_.float() for map_ in maps]
        boxes, scores, labels = self.detections(maps, proposals, is_proposal, size)
        count = (scores > 0).sum(dim=1)
        outputs = [boxes, scores, labels]
        if self.mask_stages:
            outputs.append(self.masks(maps, boxes, labels, scores > 0))
        # Only now may a list become empty: some operators of some runtimes take no empty list.
        boxes, scores, labels, *masks = (output[:, : count.max()] for output in outputs)
        return boxes, scores, labels, count, *masks

    def proposals(self, maps: Sequence[Tensor], size: tuple[Size, Size]) -> tuple[Tensor, Tensor]:
        """The region proposal network.

        Args:
            maps: The neck's maps, ``(N, C, H_i, W_i)``.
            size: Height and width of the image.

        Returns:
            Boxes ``(N, P, 4)`` by falling score, and which of them are proposals ``(N, P)``: the places after an
            image's last proposal are empty.
        """
        head, cfg = self.model.rpn_head, self.model.rpn_head.test_cfg
        outputs = [[map_.float() for map_ in maps] for maps in head(maps)]
        anchors = head.prior_generator.grid_priors([self.sides(map_) for map_ in outputs[0]], device=maps[0].device)
        boxes, scores, levels = [], [], []
        for level, (anchor, classes, deltas) in enumerate(zip(anchors, *outputs, strict=True)):
            score = rows_of(classes, head.cls_out_channels)
            score = (score.sigmoid() if head.use_sigmoid_cls else score.softmax(dim=-1))[..., 0]
            deltas = rows_of(deltas, 4)
            if (most := cfg.get('nms_pre', -1)) > 0:
                score, index = score.topk(smaller(most, self.fixed(score.shape[1])), dim=1)
                deltas, anchor = take(deltas, index), anchor[index]
            boxes.append(_decode(head.bbox_coder, anchor, deltas, size))
            scores.append(score)
            levels.append(torch.full_like(score, level, dtype=torch.int64))
        boxes, scores, levels = (torch.cat(parts, dim=1) for parts in (boxes, scores, levels))
        # A proposal counts even if its score is too small for a float32.
        scores = scores.clamp(min=torch.finfo(scores.dtype).tiny)
        if (least := cfg.get('min_bbox_size', -1)) >= 0:
            large = (boxes[..., 2:] - boxes[..., :2] > least).all(dim=-1)
            scores = torch.where(large, scores, torch.zeros_like(scores))
        boxes, scores, _ = self._suppressed(boxes, scores, levels, cfg.nms, cfg.max_per_img)
        return boxes, scores > 0

    def detections(
        self, maps: Sequence[Tensor], proposals: Tensor, is_proposal: Tensor, size: tuple[Size, Size]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The second stage, or the stages of a cascade.

        Args:
            maps: The neck's maps, ``(N, C, H_i, W_i)``.
            proposals: ``(N, P, 4)``.
            is_proposal: Which of them are proposals, ``(N, P)``.
            size: Height and width of the image.

        Returns:
            Boxes ``(N, K, 4)``, scores ``(N, K)`` in falling order and labels ``(N, K)``.
        """
        count = proposals.shape[0]
        images = _image_of_each(proposals)
        boxes = proposals.reshape(-1, 4)
        logits = []
        for stage, (extractor, head) in enumerate(self.box_stages):
            classes, deltas = self._head(head, extractor, maps, boxes, images)
            logits.append(classes)
            deltas = deltas.unflatten(1, (-1, 4))
            if stage < len(self.box_stages) - 1:
                if not head.reg_class_agnostic:
                    deltas = take(deltas, classes[:, :-1].argmax(dim=1, keepdim=True))
                boxes = _decode(head.bbox_coder, boxes[:, None], deltas, size)[:, 0]
        boxes = _decode(head.bbox_coder, boxes[:, None], deltas, size)
        scores = (sum(logits) / len(logits)).softmax(dim=-1)[:, :-1]
        cfg = self.model.roi_head.test_cfg
        kept = (scores > cfg.score_thr) & is_proposal.flatten()[:, None]
        scores = torch.where(kept, scores, torch.zeros_like(scores))
        # Pairs of a box and a class, each with its own box.
        boxes = boxes.expand(-1, scores.shape[1], -1).reshape(count, -1, 4)
        labels = torch.arange(scores.shape[1], device=scores.device).expand_as(scores).reshape(count, -1)
        return self._suppressed(boxes, scores.reshape(count, -1), labels, cfg.nms, cfg.max_per_img)

    def masks(self, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor, is_detection: Tensor) -> Tensor:
        """The mask of each detection over its box.

        Args:
            maps: The neck's maps, ``(N, C, H_i, W_i)``.
            boxes: ``(N, K, 4)``.
            labels: ``(N, K)``.
            is_detection: Which of them are detections, ``(N, K)``.

        Returns:
            Probabilities ``(N, K, h, w)``, 0 where there is no detection.
        """
        images = _image_of_each(boxes)
        masks = []
        for extractor, head in self.mask_stages:
            mask = self._head(head, extractor, maps, boxes.reshape(-1, 4), images)
            if head.class_agnostic:
                mask = mask[:, 0]
            else:
                place = torch.arange(mask.shape[0], device=mask.device) * mask.shape[1] + labels.flatten().clamp(min=0)
                mask = mask.flatten(0, 1)[place]
            masks.append(mask.sigmoid())
        mask = sum(masks) / len(masks)
        mask = mask.reshape(*boxes.shape[:2], *mask.shape[-2:])
        return torch.where(is_detection[..., None, None], mask, torch.zeros_like(mask))

    def _head(
        self, head: nn.Module, extractor: nn.Module, maps: Sequence[Tensor], boxes: Tensor, images: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """A head's outputs for boxes ``(R, 4)`` in images ``(R,)``, in float32."""
        layer = extractor.roi_layers[0]
        features = pyramid_roi_align(
            maps[: extractor.num_inputs],
            boxes,
            images,
            layer.output_size,
            [layer.spatial_scale for layer in extractor.roi_layers],
            extractor.finest_scale,
            layer.sampling_ratio,
            layer.aligned,
        )
        outputs = head(features.to(next(head.parameters()).dtype))
        return tuple(map(Tensor.float, outputs)) if isinstance(outputs, tuple) else outputs.float()

    def _suppressed(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, nms: dict, limit: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What non-maximum suppression leaves of candidates ``(N, M)``: as long as the longest list, at least one."""
        agnostic = nms.get('class_agnostic', False)
        boxes, scores, labels = non_maximum_suppression(
            boxes, scores, labels, nms.iou_threshold, limit, suppress_by_onnx, agnostic
        )
        longest = (scores > 0).sum(dim=1).max().clamp(min=1)
        return boxes[:, :longest], scores[:, :longest], labels[:, :longest]


def _decode(coder: object, anchors: Tensor, deltas: Tensor, size: tuple[Size, Size]) -> Tensor:
    """Boxes from anchors and deltas by a ``DeltaXYWHBBoxCoder``, moved into the image if it does so."""
    centre_clip = coder.ctr_clamp if coder.add_ctr_clamp else None
    boxes = decode_deltas(anchors, deltas, coder.means, coder.stds, centre_clip=centre_clip)
    return clip_boxes(boxes, *size) if coder.clip_border else boxes


def _image_of_each(boxes: Tensor) -> Tensor:
    """For boxes ``(N, P, 4)``, one after another, the image of each ``(N * P,)``."""
    count, length = boxes.shape[:2]
    return torch.arange(count, device=boxes.device)[:, None].expand(count, length).flatten()


def _stages(part: nn.Module) -> Sequence[nn.Module]:
    """A part of a RoI head as a list with one entry for each stage."""
    return part if isinstance(part, nn.ModuleList) else [part]


def _check(model: nn.Module) -> None:
    """Refuse a detector that does something that :class:`TwoStageGraph` does not.

    Raises:
        ExportError: says what.
    """
    from mmdet.models.dense_heads import RPNHead
    from mmdet.models.detectors import TwoStageDetector
    from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
    from mmdet.models.roi_heads.bbox_heads import BBoxHead
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
    from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder

    require(model, TwoStageDetector, 'predict', 'extract_feat')
    if not model.with_rpn:
        raise ExportError(f'{type(model).__name__} has no region proposal network of its own')
    require(model.rpn_head, RPNHead, 'predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')
    head = model.roi_head
    if isinstance(head, CascadeRoIHead):
        require(head, CascadeRoIHead, 'predict', 'predict_bbox', '_refine_roi', '_bbox_forward')
        require(head, CascadeRoIHead, 'predict_mask', '_mask_forward')
    else:
        require(head, StandardRoIHead, 'predict', 'predict_bbox', '_bbox_forward', 'predict_mask', '_mask_forward')
    if head.with_shared_head:
        raise ExportError(f'the shared head {type(head.shared_head).__name__} cannot be exported')
    extractors, heads = list(_stages(head.bbox_roi_extractor)), list(_stages(head.bbox_head))
    for box_head in heads:
        require(box_head, BBoxHead, 'predict_by_feat', '_predict_by_feat_single', 'regress_by_class')
        if not (box_head.with_cls and box_head.with_reg):
            raise ExportError(f'{type(box_head).__name__} cannot be exported without classes or without boxes')
    if head.with_mask:
        extractors += _stages(head.mask_roi_extractor)
        for mask_head in _stages(head.mask_head):
            require(mask_head, FCNMaskHead, 'predict_by_feat', '_predict_by_feat_single')
        if head.test_cfg.mask_thr_binary < 0:
            raise ExportError('masks without a threshold cannot be exported: set model.test_cfg.rcnn.mask_thr_binary')
    for extractor in extractors:
        require(extractor, SingleRoIExtractor, 'forward', 'map_roi_levels')
        for layer in extractor.roi_layers:
            if type(layer).__name__ != 'RoIAlign' or layer.pool_mode != 'avg' or layer.use_torchvision:
                raise ExportError(f'the RoI layer {layer} cannot be exported: only RoIAlign with averages can')
    for part in (model.rpn_head, *heads):
        require(part.bbox_coder, DeltaXYWHBBoxCoder, 'decode')
        if getattr(part.loss_cls, 'custom_cls_channels', False):
            raise ExportError(f'the classes of {type(part.loss_cls).__name__} cannot be exported')
    for cfg in (model.rpn_head.test_cfg, head.test_cfg):
        known = {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}
        if cfg.nms.get('type', 'nms') != 'nms' or set(cfg.nms) - known:
            raise ExportError(f'only plain non-maximum suppression can be exported, not {dict(cfg.nms)}')
        if cfg.max_per_img <= 0:
            raise ExportError('the number of boxes of an image has no limit: set max_per_img in model.test_cfg')
