"""The post-processing of detectors, in operators that every exporter and runtime supports.

Each function computes what the framework's own function does, on batches, without a branch that depends on values, and
with sizes that may be unknown until the file runs. All boxes are ``(x1, y1, x2, y2)`` in pixels.

A candidate is a box with a score and a label. A score of 0 marks an empty place, so a list of fixed length can hold
fewer candidates.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..compat.pytorch import scan

Size = int | Tensor
"""A side in pixels: a number, or a tensor of no dimensions while a network is traced."""

Suppress = Callable[[Tensor, Tensor, float, int], tuple[Tensor, Tensor]]
"""One of this module's implementations of non-maximum suppression, see :func:`suppress_by_loop`."""


def decode_deltas(
    anchors: Tensor,
    deltas: Tensor,
    means: Sequence[float],
    stds: Sequence[float],
    ratio_clip: float = 16 / 1000,
    centre_clip: float | None = None,
) -> Tensor:
    """Boxes from anchors and shifts of their centre and size (MMDetection's ``DeltaXYWHBBoxCoder``), not clipped.

    Args:
        anchors: ``(..., 4)``.
        deltas: ``(..., 4)``: shifts of the centre in terms of the anchor's size, logarithms of the growth of its sides.
        means: Four means, which are added to the deltas after these were multiplied by ``stds``.
        stds: Four standard deviations.
        ratio_clip: Sides grow by at most its inverse and, unless the centre is clipped, shrink to at least it.
        centre_clip: Largest shift of a centre in pixels, if there is a limit.

    Returns:
        ``(..., 4)``.
    """
    deltas = deltas * deltas.new_tensor(stds) + deltas.new_tensor(means)
    size = anchors[..., 2:] - anchors[..., :2]
    shift = size * deltas[..., :2]
    limit = abs(math.log(ratio_clip))
    growth = deltas[..., 2:].clamp(max=limit)
    if centre_clip is None:
        growth = growth.clamp(min=-limit)
    else:
        shift = shift.clamp(-centre_clip, centre_clip)
    centre = (anchors[..., :2] + anchors[..., 2:]) * 0.5 + shift
    half = size * growth.exp() * 0.5
    return torch.cat([centre - half, centre + half], dim=-1)


def decode_distances(points: Tensor, distances: Tensor) -> Tensor:
    """Boxes from points and the distances to their four sides (``DistancePointBBoxCoder``), not clipped.

    Args:
        points: ``(..., 2)`` as x, y.
        distances: ``(..., 4)`` to the left, the top, the right and the bottom.

    Returns:
        ``(..., 4)``.
    """
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def clip_boxes(boxes: Tensor, height: Size, width: Size) -> Tensor:
    """Boxes ``(..., 4)`` with their corners moved into an image."""
    x = at_most(boxes[..., 0::2].clamp(min=0), width)
    y = at_most(boxes[..., 1::2].clamp(min=0), height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def at_most(x: Tensor, limit: Size) -> Tensor:
    """Each element, but at most the limit."""
    return torch.minimum(x, limit.to(x)) if isinstance(limit, Tensor) else x.clamp(max=limit)


def smaller(k: int, count: Size) -> Size:
    """The smaller one of a number and a size: runtimes fail if more elements are asked for than there are."""
    if isinstance(count, Tensor):
        return torch.minimum(count, count.new_tensor(k))
    return torch.sym_min(k, count)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows: from ``(N, M, D)`` those with the indices ``(N, K)``, as ``(N, K, D)``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def best_candidates(scores: Tensor, threshold: float, k: Size) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of a box and a class of one feature level (MMDetection's ``filter_scores_and_topk``).

    Args:
        scores: ``(N, P, C)`` of P boxes and C classes.
        threshold: Scores must be larger.
        k: How many to take, at most P * C.

    Returns:
        Scores, labels and indices of boxes, each ``(N, k)`` in falling order of the scores.
    """
    classes = scores.shape[-1]
    flat = scores.flatten(1)
    flat, index = torch.where(flat > threshold, flat, torch.zeros_like(flat)).topk(k, dim=-1)
    box = index // classes
    return flat, index - box * classes, box


def non_maximum_suppression(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    iou_threshold: float,
    limit: int,
    suppress: Suppress,
    class_agnostic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy non-maximum suppression within each class, as mmcv's ``batched_nms`` does it: classes are moved apart.

    Args:
        boxes: ``(N, M, 4)``.
        scores: ``(N, M)``, 0 where there is no candidate.
        labels: ``(N, M)``, classes from 0 on.
        iou_threshold: A box that overlaps a better one by more is dropped.
        limit: How many boxes of an image remain at most.
        suppress: Which implementation to use.
        class_agnostic: Whether boxes of other classes are dropped, too.

    Returns:
        Boxes ``(N, K, 4)``, scores ``(N, K)`` in falling order and labels ``(N, K)``; beyond the last detection
        of an image boxes and scores are 0 and labels -1.
    """
    is_box = scores > 0
    # Empty places must not change the distance between classes, which depends on the farthest corner.
    boxes = torch.where(is_box[..., None], boxes, torch.zeros_like(boxes))
    if class_agnostic:
        apart = boxes
    else:
        step = boxes.flatten(1).amax(dim=1)[:, None] + 1
        apart = boxes + (labels.to(boxes) * step)[..., None]
    scores, index = suppress(apart, scores, iou_threshold, limit)
    is_box = scores > 0
    labels = labels.gather(1, index)
    boxes = take(boxes, index)
    return (
        torch.where(is_box[..., None], boxes, torch.zeros_like(boxes)),
        scores,
        torch.where(is_box, labels, torch.full_like(labels, -1)),
    )


def pick_best(boxes: Tensor, scores: Tensor, areas: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """One step of greedy suppression: take each image's best box and drop what overlaps it.

    Args:
        boxes: ``(N, M, 4)``.
        scores: ``(N, M)``, 0 where there is no candidate any more.
        areas: Of the boxes, ``(N, M)``.
        iou_threshold: What overlaps the best box by more is dropped.

    Returns:
        Its score and index, each ``(N, 1)``, and the scores that remain ``(N, M)``.
    """
    score, index = scores.max(dim=1, keepdim=True)
    box = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    x = torch.minimum(boxes[..., 2], box[..., 2]) - torch.maximum(boxes[..., 0], box[..., 0])
    y = torch.minimum(boxes[..., 3], box[..., 3]) - torch.maximum(boxes[..., 1], box[..., 1])
    common = x.clamp(min=0) * y.clamp(min=0)
    overlap = common / (areas.gather(1, index) + areas - common)
    # Two boxes without an area have an IoU of 0 / 0, which exceeds no threshold; the box itself is dropped anyway.
    left = torch.where(overlap > iou_threshold, torch.zeros_like(scores), scores)
    return score, index, left.scatter(1, index, torch.zeros_like(score))


def suppress_by_loop(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int) -> tuple[Tensor, Tensor]:
    """Greedy suppression as a loop, which ``torch.jit.script`` keeps as a loop.

    Args:
        boxes: ``(N, M, 4)``.
        scores: ``(N, M)``, 0 where there is no candidate.
        iou_threshold: A box that overlaps a better one by more is dropped.
        limit: How many boxes of an image are taken at most.

    Returns:
        Scores of the boxes taken, in falling order and 0 behind the last one, and their indices: ``(N, K)`` each.
    """
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    taken: list[Tensor] = []
    indices: list[Tensor] = []
    for _ in range(limit):
        score, index, scores = pick_best(boxes, scores, areas, iou_threshold)
        taken.append(score)
        indices.append(index)
    return torch.cat(taken, dim=1), torch.cat(indices, dim=1)


def suppress_by_scan(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int) -> tuple[Tensor, Tensor]:
    """As :func:`suppress_by_loop`, written so that ``torch.export`` keeps one loop."""
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])

    def step(scores: Tensor, _: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        score, index, left = pick_best(boxes, scores, areas, iou_threshold)
        return left, (score[:, 0], index[:, 0])

    _, (taken, indices) = scan(step, scores.clone(), torch.zeros(limit))
    return taken.transpose(0, 1), indices.transpose(0, 1)


def suppress_by_onnx(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int) -> tuple[Tensor, Tensor]:
    """As :func:`suppress_by_loop`, by ONNX's NonMaxSuppression, which promises no order of its results."""
    selected = _NonMaxSuppression.apply(boxes, scores[:, None], limit, iou_threshold)
    flat = scores.flatten()
    place = selected[:, 0] * scores.shape[1] + selected[:, 2]
    kept = torch.zeros_like(flat).scatter(0, place, flat[place])
    return kept.reshape(scores.shape).topk(smaller(limit, scores.shape[1]), dim=1)


class _NonMaxSuppression(torch.autograd.Function):
    """ONNX's operator: boxes ``(N, M, 4)`` and scores ``(N, 1, M)`` to rows of image, class 0 and box."""

    @staticmethod
    def forward(ctx: object, boxes: Tensor, scores: Tensor, limit: int, iou_threshold: float) -> Tensor:
        from mmcv.ops import nms

        # By one operator of mmcv's: tracing would unroll a loop.
        rows = []
        for image, (candidates, score) in enumerate(zip(boxes, scores[:, 0], strict=True)):
            found = score.nonzero()[:, 0]
            kept = found[nms(candidates[found], score[found], iou_threshold)[1][:limit]]
            rows.append(torch.stack([torch.full_like(kept, image), torch.zeros_like(kept), kept], dim=1))
        return torch.cat(rows)

    @staticmethod
    def symbolic(g: object, boxes: object, scores: object, limit: int, iou_threshold: float) -> object:
        constants = (
            torch.tensor([limit], dtype=torch.int64),
            torch.tensor([iou_threshold], dtype=torch.float32),
            torch.zeros(1),  # only what is better than no candidate
        )
        return g.op('NonMaxSuppression', boxes, scores, *(g.op('Constant', value_t=value) for value in constants))


def roi_align(
    features: Tensor,
    boxes: Tensor,
    images: Tensor,
    size: tuple[int, int],
    scale: float,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Features of regions by averaging over bilinear samples (mmcv's ``roi_align``; ONNX's RoiAlign of opset 16).

    Args:
        features: ``(N, C, H, W)``.
        boxes: ``(R, 4)`` in pixels of the image.
        images: ``(R,)`` int64: which of the N each box lies in.
        size: Height and width of the result.
        scale: Cells of the map in a pixel of the image.
        sampling_ratio: Samples along each side of a cell of the result; 0 takes as many as the cell is wide.
        aligned: Whether a cell's centre lies at half a cell. If not, regions have sides of at least one cell.

    Returns:
        ``(R, C, *size)``.
    """
    return _RoiAlign.apply(features, boxes, images, size, scale, sampling_ratio, aligned)


class _RoiAlign(torch.autograd.Function):
    """mmcv's operator, exported as ONNX's. mmcv's own export shifts boxes that the operator then shifts again."""

    @staticmethod
    def forward(
        ctx: object,
        features: Tensor,
        boxes: Tensor,
        images: Tensor,
        size: tuple[int, int],
        scale: float,
        sampling_ratio: int,
        aligned: bool,
    ) -> Tensor:
        from mmcv.ops import roi_align

        regions = torch.cat([images[:, None].to(boxes), boxes], dim=1)
        return roi_align(features, regions, size, scale, sampling_ratio, 'avg', aligned)

    @staticmethod
    def symbolic(
        g: object,
        features: object,
        boxes: object,
        images: object,
        size: tuple[int, int],
        scale: float,
        sampling_ratio: int,
        aligned: bool,
    ) -> object:
        # Every attribute is written out: runtimes do not agree on the defaults.
        return g.op(
            'RoiAlign',
            features,
            boxes,
            images,
            coordinate_transformation_mode_s='half_pixel' if aligned else 'output_half_pixel',
            mode_s='avg',
            output_height_i=size[0],
            output_width_i=size[1],
            sampling_ratio_i=sampling_ratio,
            spatial_scale_f=scale,
        )


def pyramid_levels(boxes: Tensor, levels: int, finest_scale: float) -> Tensor:
    """The feature level of each box by the root of its area (MMDetection's ``SingleRoIExtractor.map_roi_levels``).

    Levels are found by comparisons with powers of two. ONNX has no logarithm to base 2. A quotient of logarithms is
    rounded, and that moves boxes on the bound between two levels, for example one of 448 x 448 pixels.

    Args:
        boxes: ``(R, 4)``.
        levels: How many there are.
        finest_scale: Boxes of twice this side and more leave level 0, of four times level 1, and so on.

    Returns:
        ``(R,)`` int64, from 0 to ``levels - 1``.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    scale = (sides[:, 0] * sides[:, 1]).sqrt() / finest_scale + 1e-6
    return (scale[:, None] >= scale.new_tensor([2.0**level for level in range(1, levels)])).sum(dim=1)


def pyramid_roi_align(
    maps: Sequence[Tensor],
    boxes: Tensor,
    images: Tensor,
    size: tuple[int, int],
    scales: Sequence[float],
    finest_scale: float,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Features of regions, each from its own level of a feature pyramid (MMDetection's ``SingleRoIExtractor``).

    Args:
        maps: ``(N, C, H_i, W_i)``, the finest first.
        boxes: ``(R, 4)`` in pixels of the image.
        images: ``(R,)`` int64: which of the N each box lies in.
        size: Height and width of the result.
        scales: Of each map, its cells in a pixel of the image.
        finest_scale: See :func:`pyramid_levels`.
        sampling_ratio: See :func:`roi_align`.
        aligned: See :func:`roi_align`.

    Returns:
        ``(R, C, *size)``.
    """
    if len(maps) == 1:
        return roi_align(maps[0], boxes, images, size, scales[0], sampling_ratio, aligned)
    levels = pyramid_levels(boxes, len(maps), finest_scale)
    order = [(levels == level).nonzero()[:, 0] for level in range(len(maps))]
    pooled = [
        roi_align(features, boxes[index], images[index], size, scale, sampling_ratio, aligned)
        for features, scale, index in zip(maps, scales, order, strict=True)
    ]
    # Level by level, then back into the order of the boxes. A level may have none.
    return torch.cat(pooled)[torch.cat(order).argsort()]
