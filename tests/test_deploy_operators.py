"""Each operator against the framework's own, on whatever hypothesis finds."""

import numpy as np
import pytest
import torch
from helpers import since_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repvit_mm.compat.pytorch import export_onnx
from repvit_mm.deploy import operators

onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('mmcv.ops')
from mmcv.ops import batched_nms  # noqa: E402
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder  # noqa: E402
from mmdet.models.utils import filter_scores_and_topk  # noqa: E402

FEW = settings(max_examples=30, deadline=None)
SUPPRESS = {
    'loop': operators.suppress_by_loop,
    'script': torch.jit.script(operators.suppress_by_loop),
    'onnx': operators.suppress_by_onnx,
}
seeds = st.integers(0, 2**32 - 1)


def random_boxes(generator: torch.Generator, *shape: int, grid: float = 0.0) -> Tensor:
    """Boxes within 100 pixels, some of them without an area; on a grid many overlap by exactly the same."""
    corners = torch.rand(*shape, 2, 2, generator=generator) * 100
    if grid:
        corners = (corners / grid).round() * grid
    return torch.cat([corners.amin(dim=-2), corners.amax(dim=-2)], dim=-1)


@FEW
@given(seeds, st.integers(0, 30), st.booleans(), st.booleans())
def test_decode_deltas(seed, count, clip_border, clamp):
    generator = torch.Generator().manual_seed(seed)
    anchors = random_boxes(generator, count)
    deltas = torch.randn(count, 4, generator=generator) * 3
    means, stds = (0.1, -0.1, 0.2, 0.0), (0.1, 0.2, 0.3, 2.0)
    coder = DeltaXYWHBBoxCoder(means, stds, clip_border=clip_border, add_ctr_clamp=clamp, ctr_clamp=32)
    expected = coder.decode(anchors, deltas, max_shape=(60, 80))
    found = operators.decode_deltas(anchors, deltas, means, stds, centre_clip=32 if clamp else None)
    if clip_border:
        found = operators.clip_boxes(found, 60, 80)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


@FEW
@given(seeds, st.integers(0, 30))
def test_decode_distances(seed, count):
    generator = torch.Generator().manual_seed(seed)
    points, distances = torch.rand(count, 2, generator=generator) * 80, torch.randn(count, 4, generator=generator) * 40
    expected = DistancePointBBoxCoder().decode(points, distances, max_shape=(60, 80))
    found = operators.clip_boxes(operators.decode_distances(points, distances), 60, 80)
    assert torch.equal(found, expected)


@FEW
@given(seeds, st.integers(1, 40), st.integers(1, 4), st.integers(1, 200), st.floats(0, 1))
def test_best_candidates(seed, boxes, classes, limit, threshold):
    scores = torch.rand(boxes, classes, generator=torch.Generator().manual_seed(seed))
    expected, labels, index, _ = filter_scores_and_topk(scores, threshold, limit)
    found = operators.best_candidates(scores[None], threshold, operators.smaller(limit, boxes * classes))
    count = int((found[0] > 0).sum())
    assert count == len(expected)
    for actual, right in zip(found, (expected, labels, index), strict=True):
        assert torch.equal(actual[0, :count], right)


def expected_suppression(boxes: Tensor, scores: Tensor, labels: Tensor, options: dict, limit: int) -> list[Tensor]:
    """mmcv's result for one image."""
    kept = scores > 0
    if not kept.any():
        return [torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)]
    boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    _, index = batched_nms(boxes, scores, labels, dict(type='nms', **options))
    return [values[index[:limit]] for values in (boxes, scores, labels)]


@pytest.mark.parametrize('suppress', SUPPRESS.values(), ids=SUPPRESS)
@FEW
@given(
    seeds,
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from([1, 7]),
    st.sampled_from([0.0, 10.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.3, 0.5]),
    st.booleans(),
)
def test_suppression_is_mmcvs(suppress, seed, images, count, classes, grid, share, iou, class_agnostic):
    """Zero, one and many boxes, one and many classes, batches, boxes on each other and without an area."""
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(generator, images, count, grid=grid)
    # Scores all differ: which of two equals comes first nobody promises.
    scores = torch.stack([torch.randperm(count, generator=generator) + 1.0 for _ in range(images)]) / (count + 1)
    scores *= torch.rand(images, count, generator=generator) < share
    labels = torch.randint(classes, (images, count), generator=generator)
    found = operators.non_maximum_suppression(boxes, scores, labels, iou, 10, suppress, class_agnostic)
    options = dict(iou_threshold=iou, class_agnostic=class_agnostic)
    for image in range(images):
        expected = expected_suppression(boxes[image], scores[image], labels[image], options, 10)
        number = len(expected[1])
        for actual, right in zip(found, expected, strict=True):
            assert torch.equal(actual[image][:number], right)
        assert not found[0][image][number:].any() and not found[1][image][number:].any()
        assert (found[2][image][number:] == -1).all()


def test_equal_scores_leave_the_same_places():
    """Of equal boxes with equal scores one remains, whichever it is."""
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30], [20, 20, 30, 30]]])
    scores, labels = torch.full((1, 4), 0.5), torch.zeros(1, 4, dtype=torch.int64)
    for suppress in SUPPRESS.values():
        found, left, _ = operators.non_maximum_suppression(boxes, scores, labels, 0.5, 4, suppress)
        assert (left > 0).sum() == 2
        assert {tuple(box) for box in found[0, :2].tolist()} == {(0, 0, 10, 10), (20, 20, 30, 30)}


class Suppression(nn.Module):
    """Non-maximum suppression behind an input of candidates, as a graph of its own."""

    def __init__(self, suppress: operators.Suppress) -> None:
        super().__init__()
        self.suppress = suppress

    def forward(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return operators.non_maximum_suppression(boxes, scores, labels, 0.5, 10, self.suppress)


def candidates(count: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    boxes = random_boxes(generator, 2, count)
    scores = torch.rand(2, count, generator=generator) * (torch.rand(2, count, generator=generator) < share)
    return boxes, scores, torch.randint(3, (2, count), generator=generator)


# None, one and more than there is room for, one after the other.
CASES = [candidates(30, 0.0), candidates(1, 1.0), candidates(500, 1.0), candidates(30, 0.0), candidates(7, 0.5)]


def assert_same(found, case):
    for actual, right in zip(found, Suppression(operators.suppress_by_loop)(*case), strict=True):
        right = right[:, : actual.shape[1]]  # the loop always gives as many as there is room for
        np.testing.assert_array_equal(np.asarray(actual), right.numpy())


def test_onnx_runtime_suppresses_any_number_in_one_session(tmp_path):
    path = tmp_path / 'nms.onnx'
    names = ['boxes', 'scores', 'labels']
    export_onnx(
        Suppression(operators.suppress_by_onnx),
        CASES[-1],
        str(path),
        input_names=names,
        dynamic_axes={name: {0: 'batch', 1: 'count'} for name in names},
        opset_version=17,
    )
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    for case in CASES:
        assert_same(session.run(None, dict(zip(names, (x.numpy() for x in case), strict=True))), case)


@pytest.mark.slow
@since_torch('2.6', 'an exported loop')
def test_exported_loop_stays_a_loop():
    program = torch.export.export(Suppression(operators.suppress_by_scan), CASES[-1])
    loops = [node for node in program.graph.nodes if node.op == 'call_function' and 'scan' in str(node.target)]
    assert len(loops) == 1
    for case in (candidates(7, 0.0), candidates(7, 0.5), candidates(7, 1.0)):
        assert_same([x.detach() for x in program.module()(*case)], case)


def test_suppression_notices_a_wrong_threshold():
    """The comparison above can fail."""
    case = candidates(500, 1.0)
    found = operators.non_maximum_suppression(*case, 0.01, 10, operators.suppress_by_loop)
    with pytest.raises(AssertionError):
        assert_same(found, case)
