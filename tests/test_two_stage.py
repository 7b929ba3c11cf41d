"""Two-stage detectors: files in ONNX Runtime, and OpenVINO, against MMDetection's own predictions."""

import copy
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import slow_but
from mmengine.config import Config
from small_models import ROOT, TWO_STAGES, like_trained, small_config
from torch import Tensor, nn

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('mmcv.ops')
pytest.importorskip('mmdet')

import onnx
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from repvit_mm.compat.mmcv import ties_in_order
from repvit_mm.compat.openvino import openvino_core
from repvit_mm.deploy.export import EXPORTERS, Options, build_graph, quiet, write_onnx
from repvit_mm.deploy.graph import ExportError, Graph
from repvit_mm.deploy.load import build_model, fuse_model
from repvit_mm.deploy.masks import pasted
from repvit_mm.deploy.metadata import FileInfo
from repvit_mm.deploy.runtimes import OnnxRuntime, Runtime
from repvit_mm.deploy.verify import Tolerance, compare, framework_outputs

STRICT = Tolerance(boxes=0.1, scores=1e-4, masks=0.02)
"""The masks of random networks have many pixels on the threshold."""

SEESAW = dict(type='SeesawLoss', num_classes=5)
POINTS = dict(type='MaskPointHead', num_classes=5, in_channels=16)
GENERIC = dict(
    _delete_=True,
    type='GenericRoIExtractor',
    roi_layer=dict(type='RoIAlign', output_size=7),
    out_channels=16,
    featmap_strides=[4, 8, 16, 32],
)


def config(kind: str, **settings: object) -> Config:
    """The config of a small detector of a kind, with some settings of its own."""
    cfg = small_config(kind)
    cfg.merge_from_dict(settings)
    return cfg


@cache
def detector(kind: str, **settings: object) -> nn.Module:
    """A small detector, not fused."""
    torch.manual_seed(0)
    model = build_model(config(kind, **settings))
    return like_trained(model, torch.from_numpy(noise(2) / 255 - 0.5))


def noise(count: int, height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    """Images ``(N, 3, H, W)`` with something of every size in them."""
    generator = torch.Generator().manual_seed(seed)
    image = sum(
        nn.functional.interpolate(torch.rand(count, 3, side, side, generator=generator), (height, width))
        for side in (3, 9, 40)
    )
    return (image / 3 * 255).round().numpy()


def write(model: nn.Module, path: Path, *, dynamic: bool = True, size: tuple[int, int] = (96, 128)) -> OnnxRuntime:
    """A model's file, opened."""
    options = Options(sizes=(size,), dynamic=dynamic)
    graph = build_graph(fuse_model(copy.deepcopy(model)), 'onnx', options)
    info = FileInfo('detection', graph.outputs, sizes=() if dynamic else (size,), batch=None if dynamic else 1)
    with torch.no_grad(), quiet():
        write_onnx(graph, torch.from_numpy(noise(1, *size)), info, path, options)
    return OnnxRuntime(path, 1)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('two_stage')


@cache
def exported(kind: str, folder: Path) -> tuple[nn.Module, OnnxRuntime]:
    """A detector and its file, which takes images of any size."""
    return detector(kind), write(detector(kind), folder / f'{kind}.onnx')


def assert_same_detections(model: nn.Module, runtime: Runtime, images: np.ndarray) -> int:
    """Compare a file with the framework.

    Returns:
        How many detections there are.
    """
    expected = framework_outputs(model, 'detection', images)
    found = pasted(runtime.run(images), images.shape[-2:], 0.5)
    assert found.keys() == expected.keys()
    assert {name: output.shape for name, output in found.items()} == {n: output.shape for n, output in expected.items()}
    assert found['count'].tolist() == expected['count'].tolist()
    difference = compare('detection', expected, found, STRICT)
    assert difference.tolerated, difference.text
    # What compare leaves out: pairs in falling order, and nothing beyond the last.
    np.testing.assert_allclose(found['scores'], expected['scores'], atol=1e-4)
    assert (found['labels'] == -1).sum() == (expected['labels'] == -1).sum()
    return int(found['count'].sum())


@pytest.mark.slow
@pytest.mark.parametrize('kind', TWO_STAGES)
@pytest.mark.parametrize('shape', [(1, 96, 128), (1, 97, 131), (3, 70, 90), (1, 32, 200), (2, 160, 160)])
def test_file_is_the_frameworks_model(kind: str, folder: Path, shape: tuple[int, int, int]) -> None:
    assert assert_same_detections(*exported(kind, folder), noise(*shape, seed=shape[2])) > 0


@pytest.mark.slow
def test_difference_shows(folder: Path) -> None:
    """The comparison fails for a model whose boxes are other ones, or whose masks are."""
    model, runtime = exported('mask_rcnn', folder)
    images = noise(1)
    for name in ('fc_reg', 'conv_logits'):
        other = copy.deepcopy(model)
        with torch.no_grad():
            next(m for n, m in other.named_modules() if n.endswith(name)).bias += 1.0
        with pytest.raises(AssertionError, match=r'IoU|counterpart'):
            assert_same_detections(other, runtime, images)


def write_proposals(model: nn.Module, path: Path) -> OnnxRuntime:
    """A file of what a detector's region proposal network finds, opened."""
    graph = build_graph(fuse_model(copy.deepcopy(model)), 'onnx', Options(dynamic=True))

    class Proposals(Graph):
        outputs = ('boxes', 'found')

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            maps = self.model.extract_feat(self.network_input(images))
            return graph.proposals(maps, self.sides(images))

    info = FileInfo('detection', Proposals.outputs, batch=None)
    with torch.no_grad(), quiet():
        proposals = Proposals(graph.model, graph.preprocess).eval()
        write_onnx(proposals, torch.from_numpy(noise(1)), info, path, Options(dynamic=True))
    return OnnxRuntime(path, 1)


def assert_same_proposals(model: nn.Module, runtime: OnnxRuntime, images: np.ndarray) -> int:
    """Compare one by one, in their order, up to those whose scores differ by rounding.

    Returns:
        How many proposals there are.
    """
    found = runtime.run(images)
    assert found['found'].all()
    expected = framework_proposals(model, images)
    assert found['boxes'].shape[1] == len(expected)
    boxes, scores = expected.bboxes.numpy(), expected.scores.numpy()
    moved = np.abs(found['boxes'][0] - boxes).max(axis=1) > 0.01
    places = [int(np.abs(found['boxes'][0] - boxes[index]).max(axis=1).argmin()) for index in np.flatnonzero(moved)]
    assert sorted(places) == np.flatnonzero(moved).tolist()
    assert (np.abs(found['boxes'][0, places] - boxes[moved]) <= 0.01).all()
    assert (np.abs(scores[places] - scores[moved]) < 1e-6).all()
    return len(expected)


@pytest.mark.slow
def test_proposals_are_the_frameworks(tmp_path: Path) -> None:
    model = detector('mask_rcnn')
    runtime = write_proposals(model, tmp_path / 'proposals.onnx')
    for size in ((96, 128), (97, 131), (64, 64)):
        assert assert_same_proposals(model, runtime, noise(1, *size)) == 60


def photos(side: int) -> list[np.ndarray]:
    """The first images of COCO and ADE20K that are at hand, ``(1, 3, H, W)`` RGB, their longer side of a length."""
    found = []
    for pattern in ('coco/val2017/*.jpg', 'ade/ADEChallengeData2016/images/validation/*.jpg'):
        for path in sorted((ROOT / 'data').glob(pattern))[:2]:
            image = cv2.imread(str(path))
            scale = side / max(image.shape[:2])
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            found.append(image[None, ..., ::-1].transpose(0, 3, 1, 2).astype(np.float32))
    return found


@pytest.mark.slow
def test_proposals_in_photos(tmp_path: Path) -> None:
    """A shipped config with random weights, its thousand proposals and all."""
    images = photos(384)
    if not images:
        pytest.skip('data/coco and data/ade hold no images')
    cfg = Config.fromfile(ROOT / 'configs/det/mask_rcnn_repvit_m0_6_fpn_1x_coco.py')
    # What follows the proposals is not compared, so it gets few of them.
    cfg.merge_from_dict({'model.test_cfg.rpn.max_per_img': 10, 'model.test_cfg.rcnn.max_per_img': 1})
    torch.manual_seed(0)
    model = like_trained(build_model(cfg), torch.from_numpy(images[0][..., :128, :128] / 127 - 1))
    model.rpn_head.test_cfg.max_per_img = 1000
    runtime = write_proposals(model, tmp_path / 'proposals.onnx')
    for image in images:
        assert assert_same_proposals(model, runtime, image) > 500


@pytest.mark.slow
def test_ties_go_in_the_order_of_indices(tmp_path: Path) -> None:
    """Every anchor has the same score, as all do whose logits are large."""
    model = copy.deepcopy(detector('mask_rcnn'))
    with torch.no_grad():
        model.rpn_head.rpn_cls.bias += 200
    images = noise(1)
    assert (framework_proposals(model, images).scores == 1).all()
    assert assert_same_detections(model, write(model, tmp_path / 'file.onnx'), images) > 0
    in_order, as_it_is = framework_proposals(model, images), framework_proposals(model, images, nullcontext())
    assert not torch.equal(in_order.bboxes, as_it_is.bboxes), 'torch.sort is stable: ties_in_order can go'


def framework_proposals(
    model: nn.Module, images: np.ndarray, ties: AbstractContextManager | None = None
) -> InstanceData:
    """What MMDetection's region proposal network finds in an image; with ties in order unless said otherwise."""
    sample = DetDataSample(metainfo=dict(img_shape=images.shape[-2:], scale_factor=(1.0, 1.0)))
    inputs = {'inputs': list(torch.from_numpy(images).flip(1)), 'data_samples': [sample]}
    with torch.inference_mode(), ties or ties_in_order():
        data = model.data_preprocessor(inputs, False)
        (found,) = model.rpn_head.predict(model.extract_feat(data['inputs']), data['data_samples'])
    return found


@pytest.fixture(scope='module')
def sparse(folder: Path) -> tuple[nn.Module, OnnxRuntime, dict[int, np.ndarray]]:
    """Mask R-CNN with a high threshold, its file, and an image in which it finds none, one and as many as it may."""
    model = copy.deepcopy(detector('mask_rcnn'))
    candidates = [noise(1, seed=seed) for seed in range(24)]
    scores = np.stack([framework_outputs(model, 'detection', image)['scores'][0] for image in candidates])
    # Half of the images have fewer than two detections above it.
    second = np.sort(scores[:, 1])
    cfg = model.roi_head.test_cfg
    cfg.score_thr, cfg.max_per_img = float(second[11:13].mean()), 3
    counts = np.minimum((scores > cfg.score_thr).sum(axis=1), 3)
    images = {count: candidates[int(np.flatnonzero(counts == count)[0])] for count in (0, 1, 3)}
    return model, write(model, folder / 'sparse.onnx'), images


@pytest.mark.slow
def test_none_then_one_then_as_many_as_can_be(sparse: tuple) -> None:
    model, runtime, images = sparse
    for count in (0, 1, 3, 0, 3, 1, 0):
        assert assert_same_detections(model, runtime, images[count]) == count


@pytest.mark.slow
def test_images_of_a_batch_have_their_own_numbers(sparse: tuple) -> None:
    """Beyond an image's last detection there is nothing."""
    model, runtime, images = sparse
    for counts in ((0, 3, 1), (1, 0), (0, 0)):
        batch = np.concatenate([images[count] for count in counts])
        assert_same_detections(model, runtime, batch)
        found = runtime.run(batch)
        assert found['count'].tolist() == list(counts)
        for index, count in enumerate(counts):
            assert (found['labels'][index, count:] == -1).all()
            assert not any(found[name][index, count:].any() for name in ('boxes', 'scores', 'masks'))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['mask_rcnn', 'cascade_rcnn'])
def test_no_proposal_at_all(tmp_path: Path, kind: str) -> None:
    """Boxes are all smaller than what a proposal has to be."""
    model = copy.deepcopy(detector(kind))
    model.rpn_head.test_cfg.min_bbox_size = 1000
    assert not len(framework_proposals(model, noise(1)))
    runtime = write(model, tmp_path / 'file.onnx')
    found = runtime.run(noise(2))
    assert found['count'].tolist() == [0, 0]
    assert found['boxes'].shape == (2, 0, 4)
    if kind == 'mask_rcnn':
        assert found['masks'].shape == (2, 0, 28, 28)


@pytest.mark.slow
def test_proposals_whose_score_is_zero_stay_proposals(tmp_path: Path) -> None:
    model = copy.deepcopy(detector('mask_rcnn'))
    with torch.no_grad():
        model.rpn_head.rpn_cls.bias -= 200
    images = noise(1)
    assert not framework_proposals(model, images).scores.any()
    assert assert_same_detections(model, write(model, tmp_path / 'file.onnx'), images) > 0


@pytest.mark.slow
@pytest.mark.parametrize('size', [(96, 128), (75, 101)])
def test_file_of_a_fixed_size(tmp_path: Path, size: tuple[int, int]) -> None:
    """It computes no anchors, and takes several images one after another."""
    model = detector('mask_rcnn')
    runtime = write(model, tmp_path / 'file.onnx', dynamic=False, size=size)
    assert assert_same_detections(model, runtime, noise(3, *size)) > 0
    assert 'Tile' not in {node.op_type for node in onnx.load(runtime.path).graph.node}


@pytest.mark.slow
@pytest.mark.parametrize('kind', TWO_STAGES)
def test_operators_are_standard_and_written_out(kind: str, folder: Path) -> None:
    _, runtime = exported(kind, folder)
    model = onnx.load(runtime.path)
    assert {node.domain for node in model.graph.node} == {''}
    assert {opset.domain for opset in model.opset_import} == {''}
    layers = [node for node in model.graph.node if node.op_type == 'RoiAlign']
    assert layers
    for layer in layers:
        assert {attribute.name for attribute in layer.attribute} == {
            'coordinate_transformation_mode',
            'mode',
            'output_height',
            'output_width',
            'sampling_ratio',
            'spatial_scale',
        }
    for node in (node for node in model.graph.node if node.op_type == 'NonMaxSuppression'):
        assert len([name for name in node.input if name]) == 5


@pytest.mark.slow
def test_openvino_reads_the_same_file(sparse: tuple) -> None:
    pytest.importorskip('openvino')
    _, runtime, images = sparse
    options = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': 1}
    network = openvino_core().compile_model(str(runtime.path), 'CPU', options)
    batches = [images[count] for count in (0, 3, 1, 0)]
    batches.append(np.concatenate(batches))
    for batch in batches:
        expected = pasted(runtime.run(batch), batch.shape[-2:], 0.5)
        outputs = network(batch)
        found = {name: outputs[port] for name, port in zip(runtime.info.outputs, network.outputs, strict=True)}
        found = pasted(found, batch.shape[-2:], 0.5)
        assert found['count'].tolist() == expected['count'].tolist()
        difference = compare('detection', expected, found, STRICT)
        assert difference.tolerated, difference.text


REFUSED = {
    'soft_nms': ('mask_rcnn', {'model.test_cfg.rcnn.nms.type': 'soft_nms'}, 'only plain non-maximum suppression'),
    'no_limit': ('mask_rcnn', {'model.test_cfg.rcnn.max_per_img': -1}, 'set max_per_img'),
    'no_threshold': ('mask_rcnn', {'model.test_cfg.rcnn.mask_thr_binary': -1}, 'set model.test_cfg.rcnn.mask_thr'),
    'several_levels': (
        'faster_rcnn',
        {'model.roi_head.bbox_roi_extractor': GENERIC},
        'only what is built on SingleRoIExtractor',
    ),
    'pooling': ('faster_rcnn', {'model.roi_head.bbox_roi_extractor.roi_layer.pool_mode': 'max'}, 'only RoIAlign with'),
    'classes': ('faster_rcnn', {'model.roi_head.bbox_head.loss_cls': SEESAW}, 'the classes of SeesawLoss'),
    'coder': ('faster_rcnn', {'model.rpn_head.bbox_coder.type': 'LegacyDeltaXYWHBBoxCoder'}, 'LegacyDelta'),
    'points': (
        'mask_rcnn',
        {'model.roi_head.type': 'PointRendRoIHead', 'model.roi_head.point_head': POINTS},
        'PointRend',
    ),
}


@pytest.mark.parametrize('case', slow_but(['classes', 'soft_nms'], REFUSED))
def test_what_is_not_known_is_refused(case: str) -> None:
    kind, settings, message = REFUSED[case]
    model = build_model(config(kind, **settings))
    with pytest.raises(ExportError, match=message) as error:
        build_graph(model, 'onnx', Options())
    assert '\n' not in str(error.value)


def test_heads_that_only_train_otherwise_are_taken() -> None:
    settings = {'model.roi_head.type': 'DynamicRoIHead', 'model.roi_head.bbox_head.loss_bbox.type': 'SmoothL1Loss'}
    model = build_model(config('faster_rcnn', **settings))
    assert build_graph(model, 'onnx', Options()).outputs == ('boxes', 'scores', 'labels', 'count')


@pytest.mark.parametrize('target', sorted(set(EXPORTERS) - {'onnx', 'openvino'}))
def test_other_targets_are_refused(target: str) -> None:
    with pytest.raises(ExportError, match='only onnx and openvino'):
        build_graph(detector('faster_rcnn'), target, Options())
