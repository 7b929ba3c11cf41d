"""The operators of two-stage detectors, run by ONNX Runtime, against MMDetection's and mmcv's own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from onnx_files import Operator, assert_same
from torch import Tensor

pytest.importorskip('mmcv.ops')
pytest.importorskip('mmdet')

from mmcv.ops import RoIAlign, batched_nms
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.models.task_modules.prior_generators import AnchorGenerator

from repvit_mm.compat.mmcv import ties_in_order
from repvit_mm.deploy.masks import paste_masks
from repvit_mm.deploy.operators import (
    clip_boxes,
    decode_deltas,
    non_maximum_suppression,
    pyramid_levels,
    pyramid_roi_align,
    roi_align,
    smaller,
    suppress_by_onnx,
)

quick = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SIDE = 64.0
"""Of the images that boxes lie in."""


@st.composite
def box_lists(draw: st.DrawFn, largest: int = 12, outside: float = 0.0, least: float = 0.0) -> Tensor:
    """Boxes ``(R, 4)``, R from 0 on: of any size, some of them alike, some without width or height."""
    side = st.floats(least, SIDE, width=32) | st.just(least) | st.just(SIDE)
    corner = st.floats(-outside, SIDE + outside, width=32) | st.just(0.0)
    drawn = draw(st.lists(st.tuples(corner, corner, side, side), max_size=largest))
    boxes = torch.tensor(drawn, dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes if outside else boxes.clamp(max=SIDE)


def images_of(boxes: Tensor, count: int) -> Tensor:
    """An image for each box."""
    return torch.arange(len(boxes)) * 7 % count


def regions(boxes: Tensor, images: Tensor) -> Tensor:
    """Boxes and their images as the frameworks have them, ``(R, 5)``."""
    return torch.cat([images[:, None].to(boxes), boxes], dim=1)


@pytest.fixture(scope='module', params=[(True, 0), (True, 2), (False, 0), (False, 2)], ids=lambda p: f'{p[0]}-{p[1]}')
def aligned_regions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """RoIAlign of one kind: mmcv's own layer, and ours in a file."""
    aligned, ratio = request.param
    layer = RoIAlign((3, 5), spatial_scale=0.25, sampling_ratio=ratio, aligned=aligned)
    example = torch.rand(2, 4, 16, 16), torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([1])
    operator = Operator(
        lambda maps, boxes, images: roi_align(maps, boxes, images, (3, 5), 0.25, ratio, aligned),
        example,
        tmp_path_factory.mktemp('roi_align') / 'file.onnx',
        [(0, 2, 3), (0,), (0,)],
    )
    return layer, operator


@quick
@given(boxes=box_lists(outside=20.0))
def test_roi_align(aligned_regions: tuple, boxes: Tensor) -> None:
    layer, operator = aligned_regions
    maps, images = torch.randn(3, 4, 16, 16), images_of(boxes, 3)
    assert_same(operator(maps, boxes, images), layer(maps, regions(boxes, images)))


def test_roi_align_of_regions_smaller_than_a_cell(aligned_regions: tuple) -> None:
    layer, operator = aligned_regions
    maps = torch.randn(1, 4, 16, 16)
    for side in (0.0, 1e-3, 1.0, 3.9, 4.0):
        boxes = torch.tensor([[10.2, 30.7, 10.2 + side, 30.7 + side]])
        assert_same(operator(maps, boxes, torch.tensor([0])), layer(maps, regions(boxes, torch.tensor([0]))))


def test_roi_align_of_none_then_of_many(aligned_regions: tuple) -> None:
    layer, operator = aligned_regions
    maps = torch.randn(2, 4, 16, 16)
    for count in (0, 1, 300, 0):
        boxes = torch.rand(count, 2).repeat(1, 2) * 40 + torch.tensor([0.0, 0, 17, 9])
        images = images_of(boxes, 2)
        assert_same(operator(maps, boxes, images), layer(maps, regions(boxes, images)))


def extractor(levels: int = 4) -> SingleRoIExtractor:
    """MMDetection's, as its configs have it, but for small images."""
    layer = dict(type='RoIAlign', output_size=3, sampling_ratio=0)
    strides = [2, 4, 8, 16][:levels]
    return SingleRoIExtractor(layer, out_channels=4, featmap_strides=strides, finest_scale=5)


@quick
@given(boxes=box_lists())
def test_pyramid_levels(boxes: Tensor) -> None:
    expected = extractor().map_roi_levels(regions(boxes, images_of(boxes, 1)), 4)
    assert pyramid_levels(boxes, 4, 5).tolist() == expected.tolist()


def test_pyramid_levels_on_their_bounds(tmp_path: Path) -> None:
    """Squares of 112, 224 and 448 pixels, and those whose sides are the next numbers of float32 on both sides."""
    reference = SingleRoIExtractor(dict(type='RoIAlign', output_size=3), 4, [4, 8, 16, 32])
    sides = []
    for bound in (112.0, 224.0, 448.0):
        below = above = np.float32(bound)
        for _ in range(40):
            sides += [below, above]
            below, above = np.nextafter(below, np.float32(0)), np.nextafter(above, np.float32(1e9))
    boxes = torch.zeros(len(sides), 4)
    boxes[:, 2:] = torch.tensor(np.array(sides))[:, None]
    operator = Operator(lambda boxes: pyramid_levels(boxes, 4, 56), [boxes], tmp_path / 'levels.onnx', [(0,)])
    expected = reference.map_roi_levels(regions(boxes, images_of(boxes, 1)), 4)
    assert set(expected.tolist()) == {0, 1, 2, 3}
    differ = operator(boxes) != expected
    # The one number below 8 has a logarithm that torch rounds up to 3.
    quotient = boxes[:, 2] / 56 + 1e-6
    assert (quotient[differ] == np.nextafter(np.float32(8), np.float32(0)).item()).all()


@pytest.fixture(scope='module', params=[1, 4], ids=['one_level', 'four_levels'])
def pooled_regions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """RoIAlign over a pyramid: MMDetection's own, and ours in a file."""
    reference = extractor(request.param)
    maps = pyramid(request.param)
    layers = reference.roi_layers

    def pool(boxes: Tensor, images: Tensor, *maps: Tensor) -> Tensor:
        return pyramid_roi_align(maps, boxes, images, (3, 3), [layer.spatial_scale for layer in layers], 5)

    example = torch.tensor([[0.0, 0, 5, 5], [0, 0, 40, 40]]), torch.tensor([0, 1]), *maps
    path = tmp_path_factory.mktemp('pyramid') / 'file.onnx'
    return reference, Operator(pool, example, path, [(0,), (0,), *[(0, 2, 3)] * len(maps)])


def pyramid(levels: int) -> list[Tensor]:
    """Maps of two images."""
    return [torch.randn(2, 4, 32 >> level, 32 >> level) for level in range(levels)]


@quick
@given(boxes=box_lists())
def test_regions_come_from_their_level_in_their_order(pooled_regions: tuple, boxes: Tensor) -> None:
    reference, operator = pooled_regions
    maps, images = pyramid(reference.num_inputs), images_of(boxes, 2)
    assert_same(operator(boxes, images, *maps), reference(maps, regions(boxes, images)))


@pytest.mark.parametrize('side', [3.0, 12.0, 25.0, 60.0])
def test_all_regions_of_one_level(pooled_regions: tuple, side: float) -> None:
    reference, operator = pooled_regions
    maps = pyramid(reference.num_inputs)
    boxes = torch.tensor([[0.0, 0, side, side], [1, 2, side + 1, side + 2]])
    images = torch.tensor([1, 0])
    assert_same(operator(boxes, images, *maps), reference(maps, regions(boxes, images)))


@pytest.fixture(scope='module', params=[5, 1000], ids=['few', 'all'])
def suppression(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Non-maximum suppression in a file, and how many boxes it leaves."""
    limit = request.param
    example = torch.rand(1, 9, 2).repeat(1, 1, 2), torch.rand(1, 9), torch.zeros(1, 9, dtype=torch.int64)
    operator = Operator(
        lambda boxes, scores, labels: non_maximum_suppression(boxes, scores, labels, 0.5, limit, suppress_by_onnx),
        example,
        tmp_path_factory.mktemp('nms') / 'file.onnx',
        [(0, 1)] * 3,
    )
    return operator, limit


def assert_suppresses(suppression: tuple, boxes: Tensor, scores: Tensor, labels: Tensor) -> None:
    """Compare with mmcv, whose candidates are those with a score."""
    operator, limit = suppression
    found_boxes, found_scores, found_labels = operator(boxes[None], scores[None], labels[None])
    candidates = (scores > 0).nonzero()[:, 0]
    kept = torch.zeros(0, dtype=torch.int64)
    for split in (10000, 1):  # mmcv goes through the classes one by one if there are very many boxes
        if len(candidates):
            config = dict(type='nms', iou_threshold=0.5, split_thr=split)
            with ties_in_order():
                _, kept = batched_nms(boxes[candidates], scores[candidates], labels[candidates], config)
        kept = kept[:limit]
        count = int((found_scores > 0).sum())
        assert count == len(kept)
        assert_same(found_boxes[0, :count], boxes[candidates][kept], 0)
        assert_same(found_scores[0, :count], scores[candidates][kept], 0)
        assert found_labels[0, :count].tolist() == labels[candidates][kept].tolist()
        assert (found_labels[0, count:] == -1).all()
        assert not found_boxes[0, count:].any()


@quick
@given(boxes=box_lists(30), classes=st.sampled_from([1, 2, 80]), steps=st.sampled_from([1, 3, 1000]), data=st.data())
def test_suppression(suppression: tuple, boxes: Tensor, classes: int, steps: int, data: st.DataObject) -> None:
    """No box and many, one class and many; few different scores make ties; a score of 0 is no candidate."""
    if not len(boxes):
        boxes = torch.zeros(1, 4)  # a place without a candidate: networks have a place for each anchor
        assert_suppresses(suppression, boxes, torch.zeros(1), torch.zeros(1, dtype=torch.int64))
        return
    whole = st.integers(0, 10**6)
    scores = torch.tensor(data.draw(st.lists(whole, min_size=len(boxes), max_size=len(boxes)))) % (steps + 1) / steps
    labels = torch.tensor(data.draw(st.lists(whole, min_size=len(boxes), max_size=len(boxes)))) % classes
    assert_suppresses(suppression, boxes, scores, labels)


def test_suppression_of_none_then_of_many(suppression: tuple) -> None:
    for count in (0, 1, 500, 0):
        boxes = torch.rand(500, 2).repeat(1, 2) * 60 + torch.tensor([0.0, 0, 9, 7])
        scores = torch.where(torch.arange(500) < count, torch.rand(500), torch.zeros(500))
        assert_suppresses(suppression, boxes, scores, torch.arange(500) % 3)


def test_suppression_of_several_images(suppression: tuple) -> None:
    """Images of a batch do not suppress each other, and a far box in one does not move another one's classes."""
    operator, _ = suppression
    boxes = torch.rand(3, 40, 2).repeat(1, 1, 2) * 50 + torch.tensor([0.0, 0, 9, 7])
    boxes[1] *= 1000
    scores, labels = torch.rand(3, 40), torch.randint(0, 4, (3, 40))
    together = operator(boxes, scores, labels)
    for image in range(3):
        alone = operator(*(x[image : image + 1] for x in (boxes, scores, labels)))
        for a, b in zip(together, alone, strict=True):
            assert_same(a[image], b[0], 0)


@pytest.mark.parametrize('clip', [True, False])
@quick
@given(boxes=box_lists(), scale=st.sampled_from([0.1, 2.0, 100.0]))
def test_deltas(tmp_path_factory: pytest.TempPathFactory, clip: bool, boxes: Tensor, scale: float) -> None:
    """Deltas beyond every limit; an image that is no square, whose size the file learns as it runs."""
    stds = (0.1, 0.1, 0.2, 0.2)
    coder = DeltaXYWHBBoxCoder(target_stds=stds, clip_border=clip)
    operator = decoder(tmp_path_factory, clip, stds)
    deltas = torch.randn(len(boxes), 3 * 4) * scale
    for height, width in ((40, 60), (61, 33)):
        found = operator(boxes[:, None], deltas.view(-1, 3, 4), torch.zeros(height, width))
        expected = coder.decode(boxes, deltas, max_shape=(height, width)).view(-1, 3, 4)
        assert_same(found, expected)


_decoders: dict[bool, Operator] = {}


def decoder(tmp_path_factory: pytest.TempPathFactory, clip: bool, stds: tuple[float, ...]) -> Operator:
    """Decoding in a file, exported once."""
    if clip not in _decoders:

        def decode(anchors: Tensor, deltas: Tensor, image: Tensor) -> Tensor:
            boxes = decode_deltas(anchors, deltas, (0.0,) * 4, stds)
            # Without clipping the image would be no input.
            return clip_boxes(boxes, *image.shape) if clip else boxes + image.sum()

        example = torch.rand(2, 1, 4), torch.rand(2, 3, 4), torch.zeros(30, 20)
        path = tmp_path_factory.mktemp('deltas') / 'file.onnx'
        _decoders[clip] = Operator(decode, example, path, [(0,), (0,), (0, 1)])
    return _decoders[clip]


def test_anchors_of_a_size_that_the_file_learns_as_it_runs(tmp_path: Path) -> None:
    generator = AnchorGenerator([4, 8], ratios=[0.5, 1.0, 2.0], scales=[8])
    operator = Operator(
        lambda *maps: tuple(generator.grid_priors([map_.shape[-2:] for map_ in maps], device='cpu')),
        [torch.zeros(1, 1, 5, 7), torch.zeros(1, 1, 3, 4)],
        tmp_path / 'anchors.onnx',
        [(2, 3), (2, 3)],
    )
    for sizes in ([(5, 7), (3, 4)], [(9, 2), (1, 1)]):
        found = operator(*(torch.zeros(1, 1, *size) for size in sizes))
        for a, b in zip(found, generator.grid_priors(sizes, device='cpu'), strict=True):
            assert_same(a, b, 0)


def test_the_best_of_fewer_than_wanted(tmp_path: Path) -> None:
    operator = Operator(
        lambda x: x.topk(smaller(10, x.shape[1]), dim=1), [torch.rand(2, 20)], tmp_path / 'top.onnx', [(0, 1)]
    )
    for count in (20, 10, 9, 1):
        scores = torch.rand(2, count)
        found, index = operator(scores)
        assert_same(found, scores.sort(dim=1, descending=True)[0][:, :10], 0)
        assert_same(scores.gather(1, index), found, 0)


@pytest.fixture(scope='module')
def pasted() -> Callable[..., np.ndarray]:
    """Masks in an image by MMDetection's own head."""
    with DefaultScope.overwrite_default_scope('mmdet'):  # another test may have left another one
        head = FCNMaskHead(num_convs=0, in_channels=1, conv_out_channels=1, num_classes=1, class_agnostic=True)

    def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float) -> np.ndarray:
        meta = dict(ori_shape=size, scale_factor=(1.0, 1.0))
        config = ConfigDict(mask_thr_binary=threshold)
        labels = torch.zeros(len(boxes), dtype=torch.int64)
        # The head takes logits, unless it is told that they are probabilities, which it takes as an array.
        result = head._predict_by_feat_single(
            masks[:, None].numpy(), boxes.clone(), labels, meta, config, rescale=True, activate_map=True
        )
        return result.numpy()

    return paste


@quick
@given(boxes=box_lists(6, outside=10.0), threshold=st.sampled_from([0.5, 0.3, 0.9]), side=st.sampled_from([7, 28]))
def test_masks_in_an_image(pasted: Callable, boxes: Tensor, threshold: float, side: int) -> None:
    """Boxes of no width, smaller than a pixel, and beyond the image."""
    size = (50, 71)
    boxes = clip_boxes(boxes, *size)  # as every detection is
    masks = torch.nn.functional.interpolate(torch.rand(1, max(len(boxes), 1), 4, 4), size=side, mode='bilinear')
    masks = masks[0, : len(boxes)]
    found = paste_masks(masks.numpy(), boxes.numpy(), size, threshold)
    assert found.shape == (len(boxes), *size)
    assert found.dtype == bool
    if len(boxes):
        expected = pasted(masks, boxes, size, threshold)
        # A pixel on the threshold itself falls on either side.
        assert (found != expected).sum(axis=(1, 2)).max() <= 1
        assert (found != expected).sum() <= len(boxes) // 3


def test_masks_cover_their_boxes() -> None:
    """Said in another way: full masks are their boxes, pixel for pixel where boxes lie on pixels."""
    boxes = np.array([[3, 4, 20, 9], [0, 0, 71, 50], [10, 10, 11, 11]], np.float32)
    found = paste_masks(np.ones((3, 28, 28), np.float32), boxes, (50, 71))
    for mask, (left, top, right, bottom) in zip(found, boxes.astype(int), strict=True):
        expected = np.zeros((50, 71), bool)
        expected[top:bottom, left:right] = True
        assert (mask == expected).all()


def test_pasting_takes_the_memory_of_one_box() -> None:
    import tracemalloc

    size, count = (600, 900), 40
    boxes = np.tile(np.array([10, 10, 60, 60], np.float32), (count, 1))
    masks = np.ones((count, 28, 28), np.float32)
    tracemalloc.start()
    found = paste_masks(masks, boxes, size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < found.nbytes + 2**20
