"""The graphs that are exported, against what the frameworks compute themselves."""

import numpy as np
import pytest
import torch
from mmengine.model import BaseDataPreprocessor, ImgDataPreprocessor
from small_models import MODELS, small_model

from repvit_mm.deploy.graph import ExportError, Preprocess, backbone_graph, graph_of
from repvit_mm.deploy.load import fuse_model
from repvit_mm.deploy.verify import Tolerance, compare, framework_outputs

pytest.importorskip('mmcv.ops')
from mmdet.models import DetDataPreprocessor
from mmseg.models import SegDataPreProcessor
from mmseg.structures import SegDataSample

IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
EXACT = Tolerance(maps=1e-5, pixels=0.0, boxes=0.01, scores=1e-5)


def images(count: int = 2, height: int = 64, width: int = 96) -> np.ndarray:
    """RGB images with something in them: blots of colour under noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    fine = torch.rand(count, 3, height, width, generator=generator)
    x = torch.nn.functional.interpolate(coarse, size=(height, width), mode='bilinear') * 0.7 + fine * 0.3
    return (x * 255).round().numpy()


def run(graph, x: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        outputs = graph(torch.from_numpy(x))
    return dict(zip(graph.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))


def arrays(outputs):
    return {name: output.numpy() for name, output in outputs.items()}


@pytest.mark.parametrize(
    'preprocessor',
    [
        DetDataPreprocessor(**IMAGENET, bgr_to_rgb=True, pad_size_divisor=32),
        DetDataPreprocessor(mean=IMAGENET['mean'][::-1], std=IMAGENET['std'][::-1], pad_size_divisor=32, pad_value=7),
        DetDataPreprocessor(pad_size_divisor=32),
        DetDataPreprocessor(mean=[128.0], std=[64.0]),
        ImgDataPreprocessor(**IMAGENET, rgb_to_bgr=True),
        SegDataPreProcessor(**IMAGENET, bgr_to_rgb=True, size=(48, 48)),
        SegDataPreProcessor(**IMAGENET, bgr_to_rgb=True, pad_val=5, test_cfg=dict(size_divisor=32)),
        SegDataPreProcessor(**IMAGENET, bgr_to_rgb=False, test_cfg=dict(size=(80, 40))),
    ],
    ids=[
        'rgb',
        'bgr',
        'as_it_is',
        'one_value',
        'mmengine',
        'segmentation',
        'segmentation_padded',
        'segmentation_least',
    ],
)
def test_preprocessing_is_the_frameworks(preprocessor):
    x = torch.from_numpy(images(2, 50, 61))
    data = {'inputs': list(x.flip(1)), 'data_samples': None}
    if isinstance(preprocessor, SegDataPreProcessor):
        data['data_samples'] = [SegDataSample(metainfo=dict(img_shape=(50, 61))) for _ in x]
    expected = preprocessor(data, False)['inputs']
    assert torch.equal(Preprocess.of(preprocessor)(x, (50, 61)), expected)


def test_preprocessing_of_nothing_but_stacking():
    x = torch.from_numpy(images())
    assert torch.equal(Preprocess.of(BaseDataPreprocessor())(x, (64, 96)), x.flip(1))


def test_preprocessing_of_another_kind_is_refused():
    class Mine(DetDataPreprocessor):
        pass

    with pytest.raises(ExportError, match='data preprocessor Mine cannot be exported'):
        Preprocess.of(Mine())


@pytest.mark.parametrize('family', ['repvit', 'fastvit'])
@pytest.mark.parametrize('name', MODELS)
def test_graph_is_the_frameworks_model(name, family):
    """Unfused and by the framework against fused and as a graph."""
    model = small_model(name, family)
    # A multiple of 32 only where the detector itself takes no other.
    x = images(2, 64, 96) if name == 'rtmdet' else images(2, 75, 94)
    task = 'segmentation' if name == 'semantic_fpn' else 'detection'
    expected = framework_outputs(model, task, x)
    graph = graph_of(fuse_model(model)).eval()
    found = arrays(run(graph, x))
    difference = compare(task, expected, found, EXACT if task == 'detection' else Tolerance(), graph.limit)
    assert difference.tolerated, difference.text
    if task == 'detection':
        assert (expected['scores'] > 0.05).sum() > 4, 'there is something to compare'
        assert len(set(expected['labels'].flatten()) - {-1}) > 1
        np.testing.assert_array_equal(found['count'], (found['labels'] >= 0).sum(axis=1))
        assert (found['labels'][:, :1] >= 0).all()
    else:
        assert len(np.unique(expected['labels'])) > 1


@pytest.mark.parametrize('name', ['retinanet', 'rtmdet'])
def test_number_of_detections_is_the_frameworks(name):
    """From none to more than there is room for, by the bias of the classes; all below the threshold of comparisons."""
    model = small_model(name)
    predictors = [module for path, module in model.named_modules() if 'retina_cls' in path or 'rtm_cls.' in path]
    counts = set()
    for step in (-20.0, 20.0, 5.0):
        for predictor in predictors:
            predictor.bias.data += step
        expected = framework_outputs(model, 'detection', images())['count']
        found = arrays(run(graph_of(model).eval(), images()))['count']
        np.testing.assert_array_equal(found, expected)
        counts |= set(expected.tolist())
    assert 0 in counts and 20 in counts


def test_logits_are_the_frameworks():
    model = small_model('semantic_fpn')
    x = images(2, 75, 94)
    expected = framework_outputs(model, 'segmentation', x, logits=True)
    graph = graph_of(fuse_model(model), logits=True).eval()
    assert compare('segmentation', expected, arrays(run(graph, x)), EXACT).tolerated


def test_binary_segmentor():
    """One output channel, a sigmoid and a threshold."""
    model = small_model('semantic_fpn')
    head = model.decode_head
    head.conv_seg = torch.nn.Conv2d(head.channels, 1, 1)
    head.num_classes, head.out_channels, head.threshold = 2, 1, 0.5
    x = images()
    expected = framework_outputs(model, 'segmentation', x)
    assert set(np.unique(expected['labels'])) == {0, 1}
    assert compare('segmentation', expected, arrays(run(graph_of(fuse_model(model)).eval(), x)), Tolerance()).tolerated


def test_padding_of_a_segmentor_is_taken_off_again():
    model = small_model('semantic_fpn')
    model.data_preprocessor.test_cfg = dict(size_divisor=32)
    x = images(1, 50, 61)
    expected = framework_outputs(model, 'segmentation', x, logits=True)
    assert expected['logits'].shape == (1, 7, 50, 61)
    graph = graph_of(fuse_model(model), logits=True).eval()
    assert compare('segmentation', expected, arrays(run(graph, x)), EXACT).tolerated


def test_backbone():
    model = small_model('retinanet')
    x = images(2, 75, 94)
    expected = framework_outputs(model, 'backbone', x)
    graph = backbone_graph(fuse_model(model)).eval()
    assert graph.outputs == ('map0', 'map1', 'map2', 'map3')
    assert compare('backbone', expected, arrays(run(graph, x)), EXACT).tolerated


@pytest.mark.parametrize('name', ['retinanet', 'semantic_fpn'])
def test_half_precision_stays_inside(name):
    model = fuse_model(small_model(name))
    task = 'segmentation' if name == 'semantic_fpn' else 'detection'
    expected = run(graph_of(model).eval(), images())
    found = run(graph_of(model.bfloat16()).eval(), images())
    assert [x.dtype for x in found.values()] == [x.dtype for x in expected.values()]
    loose = Tolerance(pixels=0.2, boxes=10, scores=0.1, detections=0.5)
    assert compare(task, arrays(expected), arrays(found), loose).tolerated


def test_broken_branch_shows():
    """The twin of the comparison above."""
    model = small_model('retinanet')
    expected = framework_outputs(model, 'detection', images())
    fuse_model(model)
    next(m for m in model.backbone.modules() if isinstance(m, torch.nn.Conv2d)).bias.data += 0.5
    assert not compare('detection', expected, arrays(run(graph_of(model).eval(), images())), EXACT).tolerated


def test_what_is_not_known_is_refused():
    model = small_model('retinanet')
    model.bbox_head.test_cfg.nms.type = 'soft_nms'
    with pytest.raises(ExportError, match='only plain non-maximum suppression'):
        graph_of(model)

    model = small_model('retinanet')
    head = type(model.bbox_head)
    model.bbox_head.__class__ = type('Mine', (head,), {'_predict_by_feat_single': lambda self: None})
    with pytest.raises(ExportError, match='Mine cannot be exported: it has its own _predict_by_feat_single'):
        graph_of(model)

    model = small_model('semantic_fpn')
    model.test_cfg.mode = 'slide'
    with pytest.raises(ExportError, match='slides over the image'):
        graph_of(model)
