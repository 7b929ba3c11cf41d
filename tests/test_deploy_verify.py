"""Comparing the outputs of two runs: what is the same passes, and every way to differ is noticed."""

import numpy as np
import pytest

from repvit_mm.deploy.verify import Tolerance, compare, largest, relative_error

TOLERANCE = Tolerance()


def detections(*rows: tuple[float, int, float], room: int = 6) -> dict[str, np.ndarray]:
    """One image's detections as (score, label, left side), 10 pixels wide and high."""
    outputs = {
        'boxes': np.zeros((1, room, 4), np.float32),
        'scores': np.zeros((1, room), np.float32),
        'labels': np.full((1, room), -1),
    }
    for index, (score, label, left) in enumerate(rows):
        outputs['scores'][0, index], outputs['labels'][0, index] = score, label
        outputs['boxes'][0, index] = left, 0, left + 10, 10
    return outputs


FEW = [(0.9, 0, 5.0), (0.5, 1, 40.0), (0.5, 1, 80.0)]


@pytest.mark.parametrize(
    'other',
    [
        FEW,
        [FEW[0], FEW[2], FEW[1]],  # which of two equal scores comes first nobody promises
        [(0.9005, 0, 5.2), (0.5, 1, 39.8), (0.4995, 1, 80.0)],
        [*FEW, (0.04, 2, 3.0)],  # too low to count
        [*FEW, (0.0504, 2, 3.0)],  # at the limit
    ],
)
def test_same_detections(other):
    difference = compare('detection', detections(*FEW), detections(*other, room=9), TOLERANCE)
    assert difference.tolerated, difference.text
    assert '3 detections differ by at most' in difference.text


@pytest.mark.parametrize(
    'other',
    [
        FEW[:2],
        [*FEW, (0.2, 2, 3.0)],
        [*FEW, FEW[0]],
        [(0.9, 1, 5.0), *FEW[1:]],
        [(0.9, 0, 5.6), *FEW[1:]],
        [(0.9, 0, float('nan')), *FEW[1:]],
        [(0.898, 0, 5.0), *FEW[1:]],
        [],
    ],
)
def test_other_detections(other):
    for pair in ((FEW, other), (other, FEW)):
        difference = compare('detection', *(detections(*rows) for rows in pair), TOLERANCE)
        assert not difference.tolerated
        assert 'no counterpart' in difference.text


@pytest.mark.parametrize(('rows', 'other'), [([], []), ([(0.04, 2, 3.0)], []), ([], [(0.0504, 2, 3.0)])])
def test_nothing_to_compare_is_told(rows, other):
    nothing = compare('detection', detections(*rows), detections(*other), TOLERANCE)
    assert nothing.tolerated and nothing.text.startswith('nothing was compared, neither detects anything above')
    something = compare('detection', detections(*FEW), detections(*FEW), TOLERANCE)
    assert largest([nothing, something]) is largest([something, nothing]) is something


def test_last_place_of_a_full_list_may_go_to_another():
    full = [*FEW, (0.3, 0, 100.0)]
    other = [*FEW, (0.3, 2, 200.0)]
    assert compare('detection', detections(*full), detections(*other), TOLERANCE, limit=4).tolerated
    assert not compare('detection', detections(*full), detections(*other), TOLERANCE, limit=5).tolerated


def test_share_of_detections():
    loose = Tolerance(detections=0.5)
    assert compare('detection', detections(*FEW), detections(*FEW[:2]), loose).tolerated
    assert not compare('detection', detections(*FEW), detections(*FEW[:1]), loose).tolerated


def test_few_detections_do_not_decide():
    for few in (0, 1):
        one_of_three = compare('detection', detections(*FEW), detections(*FEW[:2]), Tolerance(detections=0.3, few=few))
        assert one_of_three.tolerated == bool(few) and '1 have no counterpart' in one_of_three.text
    exact = compare('detection', detections(*FEW), detections(*FEW[:2]), Tolerance(few=1))
    assert exact.tolerated
    assert not compare('detection', detections(*FEW), detections(*FEW[:1]), Tolerance(few=1)).tolerated


def test_labels():
    right = np.zeros((1, 50, 50), np.int64)
    other = right.copy()
    other[0, 0, :2] = 1
    assert compare('segmentation', {'labels': right}, {'labels': other}, TOLERANCE).tolerated
    other[0, 0, :3] = 1
    difference = compare('segmentation', {'labels': right}, {'labels': other}, TOLERANCE)
    assert not difference.tolerated and '0.1200% of pixels' in difference.text
    assert not compare('segmentation', {'labels': right}, {'labels': right[:, :49]}, TOLERANCE).tolerated


@pytest.mark.parametrize('task', ['backbone', 'segmentation'])
def test_maps(task):
    name = 'map0' if task == 'backbone' else 'logits'
    right = np.random.default_rng(0).normal(size=(2, 3, 4))
    assert compare(task, {name: right}, {name: right * (1 + 5e-5)}, TOLERANCE).tolerated
    for other in (right * (1 + 2e-4), right[:, :2], right * np.nan):
        assert not compare(task, {name: right}, {name: other}, TOLERANCE).tolerated


def test_one_broken_map_of_several_is_noticed():
    right = {f'map{index}': np.ones((2, 2)) for index in range(3)}
    for index in range(3):
        for value in (np.nan, 2.0):
            found = right | {f'map{index}': np.full((2, 2), value)}
            assert not compare('backbone', right, found, TOLERANCE).tolerated


def test_relative_error_of_nothing():
    assert relative_error(np.zeros(3), np.zeros(3)) == 0
    assert relative_error(np.ones(3), np.zeros(3)) > 1
