"""Images reach a file as the config's pipeline makes them; its outputs return as the frameworks would return them."""

import numpy as np
import pytest
import torch
from files import red_detector, strongest_channel
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from mmseg.models.segmentors import BaseSegmentor
from mmseg.structures import SegDataSample

from repvit_mm.deploy.metadata import FileInfo
from repvit_mm.deploy.prediction import (
    Detections,
    FittedImage,
    content_size,
    detections,
    fit_image,
    label_map,
    predict,
)
from repvit_mm.deploy.runtimes import open_file


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pipeline_of(info: FileInfo) -> Compose:
    """The steps between loading and packing of the test pipeline that a file's description speaks of."""
    steps = [dict(type='Resize', scale=info.scale, keep_ratio=info.keep_ratio)]
    if info.canvas:
        steps.append(dict(type='Pad', size=info.canvas, pad_val=dict(img=(info.canvas_value,) * 3)))
    if info.scale_divisor > 1:
        steps.append(dict(type='ResizeToMultiple', size_divisor=info.scale_divisor))
    with DefaultScope.overwrite_default_scope('mmseg' if info.task == 'segmentation' else 'mmdet'):
        return Compose(steps)


DETECTOR = FileInfo('detection', ('boxes', 'scores', 'labels', 'count'), scale=(1333, 800), keep_ratio=True)
SEGMENTOR = FileInfo('segmentation', ('labels',), scale=(2048, 512), keep_ratio=True, scale_divisor=32)
ON_CANVAS = FileInfo(
    'detection', DETECTOR.outputs, scale=(320, 320), keep_ratio=True, canvas=(320, 256), canvas_value=114.0
)
STRETCHED = FileInfo('detection', ('boxes', 'scores', 'labels', 'count'), scale=(320, 200))


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([DETECTOR, SEGMENTOR, ON_CANVAS, STRETCHED]),
    st.integers(1, 700),
    st.integers(1, 700),
)
def test_file_of_any_size_gets_what_the_pipeline_makes(info, height, width):
    assume(max(height, width) <= 20 * min(height, width))  # the pipeline would leave nothing of a thin strip
    image = random_image(height, width)
    expected = pipeline_of(info)({'img': image, 'img_shape': image.shape[:2]})
    fitted = fit_image(image, info)
    assert np.array_equal(fitted.pixels, expected['img'][..., ::-1].transpose(2, 0, 1))
    assert fitted.pixels.dtype == np.float32 and fitted.content == expected['img_shape']
    assert fitted.original == (height, width)
    if info.scale_divisor == 1:
        assert fitted.scale == pytest.approx(expected['scale_factor'], rel=1e-6)


def test_file_without_a_scale_gets_the_image_itself():
    image = random_image(37, 53)
    fitted = fit_image(image, FileInfo('segmentation', ('labels',)))
    assert np.array_equal(fitted.pixels, image[..., ::-1].transpose(2, 0, 1))


@pytest.mark.parametrize('shape', [(360, 640), (640, 360), (100, 100), (800, 1344), (1344, 800), (3000, 20)])
@pytest.mark.parametrize('info', [DETECTOR, SEGMENTOR], ids=['detector', 'segmentor'])
def test_file_of_fixed_size_gets_the_image_whole(info, shape):
    """It keeps its aspect ratio within a pixel, fills one side unless the config's scale forbids it, and is padded."""
    size = (480, 800)
    info = FileInfo(**{**info.__dict__, 'sizes': (size,), 'mean': (1.5, 20.0, 255.0)})
    image = random_image(*shape)
    fitted = fit_image(image, info)
    (height, width), divisor = fitted.content, info.scale_divisor
    assert fitted.pixels.shape == (3, *size) and height <= size[0] and width <= size[1]
    free = content_size(shape, FileInfo(**{**info.__dict__, 'sizes': ()}))
    factor = min(size[0] / shape[0], size[1] / shape[1], free[0] / shape[0], free[1] / shape[1])
    for side, original in zip((height, width), shape, strict=True):
        assert abs(side - original * factor) <= divisor
    padding = np.concatenate([fitted.pixels[:, height:].reshape(3, -1), fitted.pixels[:, :, width:].reshape(3, -1)], 1)
    assert padding.size > 0 or fitted.content == size
    assert np.array_equal(padding, np.broadcast_to(np.float32([[1.5], [20], [255]]), padding.shape))
    assert fitted.scale == (width / shape[1], height / shape[0])


def test_file_of_the_canvas_s_size_gets_what_the_pipeline_makes():
    info = FileInfo(**{**ON_CANVAS.__dict__, 'sizes': ((256, 320),)})
    image = random_image(120, 300)
    expected = pipeline_of(info)({'img': image, 'img_shape': image.shape[:2]})
    fitted = fit_image(image, info)
    assert np.array_equal(fitted.pixels, expected['img'][..., ::-1].transpose(2, 0, 1))
    assert fitted.content == expected['img_shape'] and fitted.scale == pytest.approx(expected['scale_factor'])


def test_image_that_fits_a_fixed_size_is_what_the_pipeline_makes():
    info = FileInfo('detection', DETECTOR.outputs, scale=(192, 192), keep_ratio=True, sizes=((256, 256),))
    image = random_image(123, 321)
    expected = pipeline_of(info)({'img': image, 'img_shape': image.shape[:2]})['img']
    fitted = fit_image(image, info)
    height, width = fitted.content
    assert np.array_equal(fitted.pixels[:, :height, :width], expected[..., ::-1].transpose(2, 0, 1))


def test_of_several_sizes_the_one_is_taken_that_shrinks_the_image_least():
    info = FileInfo('detection', DETECTOR.outputs, scale=(1333, 800), keep_ratio=True, sizes=((480, 800), (800, 480)))
    assert fit_image(random_image(300, 600), info).pixels.shape[1:] == (480, 800)
    assert fit_image(random_image(600, 300), info).pixels.shape[1:] == (800, 480)
    assert fit_image(random_image(300, 300), info).pixels.shape[1:] == (480, 800)  # the default


@pytest.mark.parametrize('fields', [{}, {'sizes': ((96, 96),)}, {'sizes': ((160, 96),)}, {'batch': 3}], ids=str)
@pytest.mark.parametrize('scale', [None, (64, 48), (192, 128)])
def test_detections_are_in_the_pixels_of_the_image(tmp_path, scale, fields):
    """The box and the mask of a red patch come back wherever the image was resized, padded and cut."""
    path = red_detector(tmp_path / 'red.onnx', masks=True, scale=scale, keep_ratio=True, **fields)
    image = np.zeros((120, 160, 3), np.uint8)
    image[40:80, 60:140] = (0, 0, 255)  # BGR
    runtime = open_file(path, threads=1)
    fitted = fit_image(image, runtime.info)
    found = predict(runtime, fitted)
    assert len(found) == 1 and found.labels.tolist() == [1] and found.scores.tolist() == [0.75]
    pixel = 1 / min(fitted.scale)
    assert np.abs(found.boxes - [60, 40, 140, 80]).max() <= pixel
    expected = image[..., 2] > 0
    assert found.masks.shape == (1, 120, 160) and found.masks.dtype == bool
    # Masks are rounded off at the corners, as MMDetection's are.
    assert (found.masks[0] & expected).sum() / (found.masks[0] | expected).sum() > 0.9


def test_nothing_is_found_where_nothing_is(tmp_path):
    runtime = open_file(red_detector(tmp_path / 'red.onnx', masks=True), threads=1)
    found = predict(runtime, fit_image(np.zeros((20, 30, 3), np.uint8), runtime.info))
    assert len(found) == 0 and found.boxes.shape == (0, 4) and found.masks.shape == (0, 20, 30)


def test_boxes_end_where_the_image_ends():
    """What lies in the padding is cut off, and what begins there is nothing."""
    fitted = FittedImage(np.zeros((3, 64, 64), np.float32), (20, 40), (30, 60), (1.5, 1.5))
    boxes = np.float32([[30, 15, 64, 64], [3, 31, 50, 60], [61, 3, 63, 20], [0, 0, 9, 9]])
    scores = np.float32([0.9, 0.8, 0.7, 0.6])
    found = detections({'boxes': boxes, 'scores': scores, 'labels': np.arange(4), 'count': np.array(3)}, fitted)
    assert found.boxes.tolist() == [[20, 10, 40, 20]]
    assert found.labels.tolist() == [0] and found.masks is None


def test_above_keeps_what_is_at_least_as_sure():
    masks = np.zeros((3, 2, 2), bool)
    masks[1] = True
    found = Detections(np.zeros((3, 4), np.float32), np.float32([0.9, 0.5, 0.1]), np.array([0, 1, 2]), masks)
    assert found.above(0.5).labels.tolist() == [0, 1]
    assert np.array_equal(found.above(0.5).masks, masks[:2])


def test_masks_are_pasted_into_the_image():
    fitted = FittedImage(np.zeros((3, 64, 64), np.float32), (32, 32), (64, 64), (2.0, 2.0))
    outputs = {
        'boxes': np.float32([[8, 16, 40, 48]]),
        'scores': np.float32([0.9]),
        'labels': np.array([0]),
        'count': np.array(1),
        'masks': np.full((1, 28, 28), 0.6, np.float32),
    }
    expected = np.zeros((32, 32), bool)
    expected[8:24, 4:20] = True
    assert np.array_equal(detections(outputs, fitted, mask_threshold=0.55).masks[0], expected)
    assert not detections(outputs, fitted, mask_threshold=0.65).masks.any()


class Postprocess:
    """What of a segmentor ``postprocess_result`` asks for."""

    align_corners = False


@pytest.mark.parametrize('original', [(64, 96), (123, 45), (30, 200)])
@pytest.mark.parametrize('content', [(64, 96), (50, 80)])
def test_logits_become_labels_as_in_mmsegmentation(original, content):
    logits = np.random.default_rng(0).normal(size=(5, 64, 96)).astype(np.float32)
    padding = (0, 96 - content[1], 0, 64 - content[0])
    sample = SegDataSample(metainfo=dict(ori_shape=original, img_shape=content, padding_size=padding))
    (expected,) = BaseSegmentor.postprocess_result(Postprocess(), torch.from_numpy(logits)[None], [sample])
    ours = label_map({'logits': logits}, FittedImage(np.zeros((3, 64, 96), np.float32), original, content, (1, 1)))
    assert ours.labels.shape == original
    assert (ours.labels == expected.pred_sem_seg.data[0].numpy()).mean() > 0.9999


@pytest.mark.parametrize('logits', [False, True])
@pytest.mark.parametrize('fields', [{}, {'scale': (96, 96), 'sizes': ((96, 96),)}], ids=['any size', 'fixed size'])
def test_label_map_has_the_size_of_the_image(tmp_path, logits, fields):
    path = strongest_channel(tmp_path / 'rgb.onnx', logits, keep_ratio=True, **fields)
    image = np.zeros((60, 120, 3), np.uint8)
    image[:, :40, 2] = image[:, 40:80, 1] = image[:, 80:, 0] = 200  # BGR: red, green, blue from left to right
    runtime = open_file(path, threads=1)
    labels = predict(runtime, fit_image(image, runtime.info)).labels
    assert labels.shape == (60, 120)
    assert (labels == np.repeat([0, 1, 2], 40)).mean() > 0.97
