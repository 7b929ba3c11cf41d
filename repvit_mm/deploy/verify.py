"""Compares two runs of one model: what the framework predicts, and how much a file's outputs differ from it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..compat.mmcv import ties_in_order
from ..compat.openmmlab import normalizes, reverses_channels
from .metadata import Task

Outputs = Mapping[str, np.ndarray]
"""Name -> array, as :class:`~repvit_mm.deploy.metadata.FileInfo` describes them."""

SCORE = 0.05
"""Detections with a lower score are not compared."""


@dataclass(frozen=True)
class Tolerance:
    """How much outputs may differ.

    Args:
        maps: Relative L2 error of a map or of logits.
        pixels: Share of pixels with another label.
        boxes: Pixels by which a corner's coordinate differs.
        scores: Difference of a score.
        masks: One minus the IoU of a mask with the framework's, a single pixel aside.
        detections: Share of detections without a counterpart.
        few: This many without a counterpart are not too many, whatever their share.
    """

    maps: float = 1e-4
    pixels: float = 1e-3
    boxes: float = 0.5
    scores: float = 1e-3
    masks: float = 5e-3
    detections: float = 0.0
    few: int = 0


TOLERANCES = {
    'float32': Tolerance(),
    'float16': Tolerance(maps=2e-2, pixels=2e-2, boxes=2.0, scores=2e-2, masks=0.05, detections=0.05),
    # Only the metric tells whether a file of so few bits detects well; these limits find broken ones. A region that
    # moves a little may get quite another score and mask, and where an image has three detections, that is a third.
    'bfloat16': Tolerance(maps=5e-2, pixels=3e-2, boxes=4.0, scores=0.2, masks=0.5, detections=0.3, few=1),
    'int8': Tolerance(maps=0.3, pixels=0.5, boxes=8.0, scores=0.3, masks=1.0, detections=0.7, few=3),
}
"""Precision of a file's weights -> how much it may differ from the float32 model."""


@dataclass(frozen=True)
class Difference:
    """How much outputs differ.

    Args:
        text: In words and numbers.
        excess: The largest difference divided by the tolerance: above 1, or not a number, is too much. It is negative
            if there was nothing to compare.
    """

    text: str
    excess: float

    @property
    def tolerated(self) -> bool:
        """Whether it is within the tolerance."""
        return self.excess <= 1  # not a number is not


def largest(differences: Iterable[Difference]) -> Difference:
    """The largest of some differences; not-a-number counts as the largest."""
    return max(differences, key=lambda difference: (not difference.tolerated, difference.excess))


@torch.inference_mode()
def framework_outputs(model: nn.Module, task: Task, images: np.ndarray, logits: bool = False) -> dict[str, np.ndarray]:
    """What MMDetection or MMSegmentation itself predicts, in the form of a file's outputs.

    Args:
        model: The built model in ``eval`` mode.
        task: What it predicts, or ``'backbone'`` for the maps of its backbone.
        images: ``(N, 3, H, W)``, RGB, values from 0 to 255.
        logits: Whether a segmentor's logits are wanted instead of labels.
    """
    if task == 'backbone':
        normalized = [normalize(model, image) for image in torch.from_numpy(images).flip(1)]
        maps = model.backbone(torch.stack(normalized))
        return {f'map{index}': map_.float().numpy() for index, map_ in enumerate(maps)}
    if task == 'detection':
        with ties_in_order():
            results = framework_results(model, task, images)
        return _padded([result.pred_instances for result in results])
    results = framework_results(model, task, images)
    if logits:
        return {'logits': np.stack([result.seg_logits.data.numpy() for result in results])}
    return {'labels': np.stack([result.pred_sem_seg.data[0].numpy().astype(np.int64) for result in results])}


@torch.inference_mode()
def framework_results(model: nn.Module, task: Task, images: np.ndarray) -> list:
    """What MMDetection or MMSegmentation itself predicts, in its own form: a data sample for each image.

    Args:
        model: The built model in ``eval`` mode.
        task: ``'detection'`` or ``'segmentation'``.
        images: ``(N, 3, H, W)``, RGB, values from 0 to 255.
    """
    inputs = list(torch.from_numpy(images).flip(1))  # the frameworks load BGR
    samples = [_sample(task, images.shape[-2:]) for _ in inputs]
    data = model.data_preprocessor({'inputs': inputs, 'data_samples': samples}, False)
    options = {'rescale': False} if task == 'detection' else {}
    return model.predict(data['inputs'], data['data_samples'], **options)


def normalize(model: nn.Module, image: Tensor) -> Tensor:
    """One BGR image ``(3, H, W)`` as a model's data preprocessor normalizes it, without padding."""
    preprocessor = model.data_preprocessor
    if reverses_channels(preprocessor):
        image = image.flip(0)
    if normalizes(preprocessor):
        image = (image - preprocessor.mean) / preprocessor.std
    return image


def _sample(task: Task, shape: tuple[int, int]) -> object:
    """The metadata of an image that is fed in its own size."""
    meta = dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0))
    if task == 'segmentation':
        from mmseg.structures import SegDataSample

        return SegDataSample(metainfo=meta)
    from mmdet.structures import DetDataSample

    return DetDataSample(metainfo=meta)


def _padded(results: list) -> dict[str, np.ndarray]:
    """Detections of several images in one array for each field: no score and no class where one has fewer."""
    most = max(len(result) for result in results)
    outputs = {
        'boxes': np.zeros((len(results), most, 4), np.float32),
        'scores': np.zeros((len(results), most), np.float32),
        'labels': np.full((len(results), most), -1, np.int64),
        'count': np.array([len(result) for result in results], np.int64),
    }
    for index, result in enumerate(results):
        count = len(result)
        outputs['boxes'][index, :count] = result.bboxes.numpy()
        outputs['scores'][index, :count] = result.scores.numpy()
        outputs['labels'][index, :count] = result.labels.numpy()
    if 'masks' in results[0]:
        masks = [result.masks.numpy() for result in results]
        outputs['masks'] = np.stack([np.pad(mask, ((0, most - len(mask)), (0, 0), (0, 0))) for mask in masks])
    return outputs


def compare(
    task: Task, expected: Outputs, found: Outputs, tolerance: Tolerance, limit: int | None = None
) -> Difference:
    """How much a file's outputs differ from the expected ones.

    Args:
        task: What the outputs are.
        expected: The framework's outputs.
        found: The file's outputs.
        tolerance: What may differ.
        limit: How many detections of an image there can be. Where there are so many, the last ones may differ.
    """
    if task == 'detection':
        return _compare_detections(expected, found, tolerance, limit)
    if task == 'segmentation' and 'labels' in expected:
        right, actual = expected['labels'], found['labels']
        if right.shape != actual.shape:
            return Difference(f'labels of shape {actual.shape} instead of {right.shape}', float('inf'))
        share = float((right != actual).mean())
        return Difference(f'{share:.4%} of pixels have another label', share / tolerance.pixels)
    errors = {name: relative_error(found[name], right) for name, right in expected.items()}
    # Unlike Python's max, NumPy's keeps a NaN.
    worst = float(np.max(list(errors.values())))
    return Difference(f'relative L2 error {worst:.1e}', worst / tolerance.maps)


def relative_error(actual: np.ndarray | Tensor, expected: np.ndarray | Tensor) -> float:
    """L2 norm of the difference over that of ``expected``, in float64; infinite if the shapes differ."""
    actual, expected = (torch.as_tensor(values).detach().cpu().double() for values in (actual, expected))
    if actual.shape != expected.shape:
        return float('inf')
    scale = expected.norm()
    return ((actual - expected).norm() / scale if scale > 0 else actual.norm()).item()


def _compare_detections(expected: Outputs, found: Outputs, tolerance: Tolerance, limit: int | None) -> Difference:
    """Pair the detections of two runs by label, score and place, and measure boxes and scores within the pairs."""
    pairs, alone, boxes, scores, masks = 0, 0, 0.0, 0.0, 0.0
    for index in range(len(expected['scores'])):
        right, actual = _detections(expected, index), _detections(found, index)
        # A detection whose score lies at the limit, or that competes for the last place, may be in one run only.
        certain = max(SCORE, *(_last_place(run, index, limit) for run in (expected, found))) + tolerance.scores
        matches = _match(right, actual, tolerance)
        for a, b in matches.items():
            boxes = max(boxes, float(np.abs(right['boxes'][a] - actual['boxes'][b]).max()))
            scores = max(scores, float(abs(right['scores'][a] - actual['scores'][b])))
            if 'masks' in right:
                masks = max(masks, _mask_error(right['masks'][a], actual['masks'][b]))
        pairs += len(matches)
        alone += sum(right['scores'][a] > certain for a in range(len(right['scores'])) if a not in matches)
        taken = set(matches.values())
        alone += sum(actual['scores'][b] > certain for b in range(len(actual['scores'])) if b not in taken)
    if not pairs + alone:
        return Difference(f'nothing was compared, neither detects anything above a score of {SCORE}', -1.0)
    share = alone / (pairs + alone) if alone > tolerance.few else 0.0
    text = f'{pairs} detections differ by at most {boxes:.1e} pixels and {scores:.1e} in score'
    if 'masks' in expected:
        text += f', their masks have an IoU of at least {1 - masks:.4f}'
    if alone:
        text += f', {alone} have no counterpart within {tolerance.boxes} pixels and {tolerance.scores} in score'
    # The boxes and scores of pairs lie within the tolerance, or they were none.
    missing = share / tolerance.detections if tolerance.detections else (np.inf if share else 0.0)
    return Difference(text, max(missing, masks / tolerance.masks))


def _mask_error(right: np.ndarray, actual: np.ndarray) -> float:
    """One minus the IoU of two masks ``(H, W)``, a single pixel aside, which may lie on the threshold."""
    return max(int((right ^ actual).sum()) - 1, 0) / max(int((right | actual).sum()), 1)


def _detections(outputs: Outputs, index: int) -> dict[str, np.ndarray]:
    """The detections of one image whose score counts."""
    kept = (outputs['scores'][index] > SCORE) & (outputs['labels'][index] >= 0)
    return {name: outputs[name][index][kept] for name in ('boxes', 'scores', 'labels', 'masks') if name in outputs}


def _last_place(outputs: Outputs, index: int, limit: int | None) -> float:
    """The lowest score of an image that has the largest possible number of detections, else 0."""
    scores = outputs['scores'][index][outputs['labels'][index] >= 0]
    return float(scores.min()) if len(scores) == limit else 0.0


def _match(right: Outputs, actual: Outputs, tolerance: Tolerance) -> dict[int, int]:
    """For each detection the nearest one of the other run that has its label and about its score and box."""
    free = np.ones(len(actual['scores']), bool)
    matches = {}
    for a in range(len(right['scores'])):
        distance = np.abs(actual['boxes'] - right['boxes'][a]).max(axis=1, initial=0)
        alike = (
            free
            & (actual['labels'] == right['labels'][a])
            & (np.abs(actual['scores'] - right['scores'][a]) <= tolerance.scores)
            & (distance <= tolerance.boxes)
        )
        if alike.any():
            b = int(np.argmin(np.where(alike, distance, np.inf)))
            matches[a], free[b] = b, False
    return matches
