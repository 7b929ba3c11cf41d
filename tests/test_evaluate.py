"""An exported file in the place of a config's network: the config's own data set and metric judge it."""

import copy
import importlib.util
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from files import red_detector, strongest_channel
from helpers import slow_but
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from PIL import Image
from pycocotools import mask as mask_utils

from repvit_mm.deploy.evaluate import ExportedModel, MismatchError, put_file
from repvit_mm.deploy.load import class_names, read_checkpoint
from repvit_mm.deploy.prediction import fit_image, predict
from repvit_mm.deploy.runtimes import RuntimeFileError

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / 'tools'
DETECTION = ROOT / 'configs/det/mask_rcnn_repvit_m0_6_fpn_shapes.py'
SEGMENTATION = ROOT / 'configs/seg/fpn_repvit_m0_6_shapes.py'

SHAPES = [(60, 80), (80, 60), (80, 80), (40, 80)]
"""Of the images; the config doubles them, within 160x160 pixels."""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Images with a red patch each, in COCO's layout, and images of three coloured stripes, in ADE20K's.

    Edges lie at even pixels: whoever halves or doubles an image finds them where they were.
    """
    root = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for folder in ('coco', 'images', 'labels'):
        (root / folder).mkdir()
    for number, (height, width) in enumerate(SHAPES, 1):
        left, top = 2 * rng.integers(1, 8, 2)
        image = np.zeros((height, width, 3), np.uint8)
        image[top : top + 20, left : left + 30, 0] = 255
        Image.fromarray(image).save(root / f'coco/{number}.png')
        images.append({'id': number, 'file_name': f'{number}.png', 'width': width, 'height': height})
        rle = mask_utils.encode(np.asfortranarray(image[..., 0] > 0, np.uint8))
        annotations.append(
            {
                'id': number,
                'image_id': number,
                'category_id': 7,
                'bbox': [int(left), int(top), 30, 20],
                'area': 600,
                'iscrowd': 0,
                'segmentation': {'size': [height, width], 'counts': rle['counts'].decode()},
            }
        )
        labels = np.broadcast_to(np.arange(width) * 3 // width, (height, width)) // 2 * 2
        labels = np.repeat(labels[:, ::2], 2, axis=1)
        Image.fromarray(255 * np.eye(3, dtype=np.uint8)[labels]).save(root / f'images/{number}.png')
        Image.fromarray((labels + 1).astype(np.uint8)).save(root / f'labels/{number}.png')
    categories = [{'id': 3, 'name': 'green'}, {'id': 7, 'name': 'red'}]
    content = {'images': images, 'annotations': annotations, 'categories': categories}
    (root / 'annotations.json').write_text(json.dumps(content))
    return root


read_config = cache(Config.fromfile)


def config(path: Path, data: Path, work_dir: Path) -> Config:
    """A shapes config that tests on the images above."""
    cfg = copy.deepcopy(read_config(path))
    dataset = cfg.test_dataloader.dataset
    dataset.data_root = str(data)
    if path is DETECTION:
        dataset.ann_file, dataset.data_prefix = 'annotations.json', dict(img='coco/')
        dataset.metainfo = dict(classes=('green', 'red'))
        cfg.test_evaluator.ann_file = str(data / 'annotations.json')
    else:
        dataset.data_prefix, dataset.img_suffix = dict(img_path='images', seg_map_path='labels'), '.png'
        dataset.metainfo = dict(classes=('red', 'green', 'blue'), palette=[(255, 0, 0), (0, 255, 0), (0, 0, 255)])
    dataset.pipeline[1].scale = (160, 160)
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False, batch_size=2)
    cfg.update(work_dir=str(work_dir), log_level='ERROR')
    return cfg


def evaluate(cfg: Config, file: Path) -> dict[str, float]:
    put_file(cfg, str(file))
    return Runner.from_cfg(cfg).test()


SIZES = {
    'any size': {},
    'any number': {'batch': None},
    'several at once': {'batch': 3},
    'padded': {'sizes': ((200, 170),)},
    'halved': {'sizes': ((40, 40),)},
    'two sizes': {'sizes': ((40, 30), (40, 40))},
}


@pytest.mark.parametrize('size', slow_but(['any size', 'padded'], SIZES))
def test_perfect_detector_gets_the_full_score(data, tmp_path, size):
    """Boxes and masks are judged in the pixels of the original images, however these reach the file."""
    path = red_detector(tmp_path / 'red.onnx', masks=True, scale=(160, 160), keep_ratio=True, **SIZES[size])
    metrics = evaluate(config(DETECTION, data, tmp_path), path)
    assert metrics['coco/bbox_mAP'] == metrics['coco/segm_mAP'] == 1


def test_wrong_detector_does_not(data, tmp_path):
    """The same file, fed with images that are flipped on the way."""
    path = red_detector(tmp_path / 'red.onnx', masks=True)
    cfg = config(DETECTION, data, tmp_path)
    cfg.test_dataloader.dataset.pipeline.insert(2, dict(type='RandomFlip', prob=1.0))
    assert evaluate(cfg, path)['coco/bbox_mAP'] < 0.9


@pytest.mark.parametrize('logits', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['labels', 'logits'])
@pytest.mark.parametrize('size', slow_but(['any size'], ['any size', 'padded', 'halved']))
def test_perfect_segmentor_gets_the_full_score(data, tmp_path, logits, size):
    path = strongest_channel(tmp_path / 'rgb.onnx', logits, scale=(160, 160), keep_ratio=True, **SIZES[size])
    cfg = config(SEGMENTATION, data, tmp_path)
    if size == 'any size':
        del cfg.test_dataloader.dataset.pipeline[2]  # stretched to multiples of 32, edges would lie between pixels
    assert evaluate(cfg, path)['mIoU'] == 100


@pytest.mark.parametrize('fields', [{}, {'sizes': ((200, 170),)}, {'sizes': ((100, 100),)}], ids=str)
def test_model_predicts_what_the_predictor_predicts(data, tmp_path, fields):
    """What `tools/test.py` judges is what `tools/predict.py` shows."""
    path = red_detector(tmp_path / 'red.onnx', masks=True, scale=(160, 160), keep_ratio=True, **fields)
    cfg = config(DETECTION, data, tmp_path)
    put_file(cfg, str(path))
    model = ExportedModel(str(path), threads=1)
    with DefaultScope.overwrite_default_scope('mmdet'):
        pipeline = Compose(cfg.test_dataloader.dataset.pipeline)
    for number in range(1, len(SHAPES) + 1):
        packed = pipeline({'img_path': str(data / f'coco/{number}.png'), 'img_id': number, 'instances': []})
        (sample,) = model.test_step({name: [value] for name, value in packed.items()})
        image = np.array(Image.open(data / f'coco/{number}.png'))[..., ::-1]
        found = predict(model.runtime, fit_image(image, model.runtime.info))
        judged = sample.pred_instances.numpy()
        assert len(judged) == len(found) == 1
        assert np.array_equal(judged.bboxes, found.boxes) and np.array_equal(judged.scores, found.scores)
        assert np.array_equal(judged.labels, found.labels) and np.array_equal(judged.masks, found.masks)


def test_file_is_named_and_how_images_reach_it(data, tmp_path):
    path = red_detector(tmp_path / 'red.onnx')
    cfg = config(DETECTION, data, tmp_path)
    cfg.test_evaluator.metric = 'bbox'
    assert put_file(cfg, str(path)) == f"{path} takes images of any size: as the config's pipeline makes them"
    path = red_detector(tmp_path / 'fixed.onnx', sizes=((64, 96),))
    assert put_file(cfg, str(path)) == f'{path} takes images of 64x96 pixels: resized to fit, and padded'
    assert [step.type for step in cfg.test_dataloader.dataset.pipeline][:2] == ['LoadImageFromFile', 'FitToFile']


def test_every_data_set_of_several_is_fitted(data, tmp_path):
    cfg = config(DETECTION, data, tmp_path)
    one = cfg.test_dataloader.dataset
    cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[one, dict(type='RepeatDataset', dataset=one)])
    put_file(cfg, str(red_detector(tmp_path / 'red.onnx', masks=True, sizes=((64, 96),))))
    first, second = cfg.test_dataloader.dataset.datasets
    for dataset in (first, second.dataset):
        assert 'FitToFile' in [step.type for step in dataset.pipeline]


@pytest.mark.slow
def test_hooks_that_need_the_network_are_left_out(data, tmp_path):
    """An EMA hook would copy the runtime."""
    cfg = config(DETECTION, data, tmp_path)
    cfg.custom_hooks = [dict(type='EMAHook'), dict(type='mmdet.FuseOnDeployHook'), dict(type='EmptyCacheHook')]
    path = red_detector(tmp_path / 'red.onnx', masks=True, scale=(160, 160), keep_ratio=True)
    assert evaluate(cfg, path)['coco/bbox_mAP'] == 1
    assert [hook.type for hook in cfg.custom_hooks] == ['EmptyCacheHook']


REFUSED = {
    'another task': (DETECTION, strongest_channel, {}, 'is a file for segmentation, the config is for detection'),
    'another task too': (SEGMENTATION, red_detector, {}, 'is a file for detection, the config is for segmentation'),
    'other classes': (
        SEGMENTATION,
        strongest_channel,
        {'classes': ('red', 'blue', 'green')},
        "other classes than the config's data set: 3 for 3, blue in place of green first",
    ),
    'fewer classes': (SEGMENTATION, strongest_channel, {'classes': ('red',)}, '1 for 3, nothing in place of green'),
    'no masks': (DETECTION, red_detector, {}, 'predicts boxes only and the config evaluates masks: take --eval bbox'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_file_that_cannot_stand_in_is_refused(data, tmp_path, case):
    path, make, fields, message = REFUSED[case]
    file = make(tmp_path / 'file.onnx', **fields)
    with pytest.raises(MismatchError) as error:
        put_file(config(path, data, tmp_path), str(file))
    assert message in str(error.value) and str(file) in str(error.value) and '\n' not in str(error.value)


def test_file_that_is_none_is_refused(data, tmp_path):
    with pytest.raises(RuntimeFileError, match='not found'):
        put_file(config(DETECTION, data, tmp_path), str(tmp_path / 'absent.onnx'))


def test_classes_are_the_checkpoint_s_or_else_the_config_s(tmp_path):
    """The data need not be there."""
    coco = Config.fromfile(ROOT / 'configs/det/mask_rcnn_repvit_m1_1_fpn_1x_coco.py')
    classes, palette = class_names(coco, None)
    assert len(classes) == len(palette) == 80 and classes[0] == 'person' and palette[0] == (220, 20, 60)
    path = tmp_path / 'checkpoint.pth'
    for meta, expected in [
        ({}, (classes, palette)),
        ({'dataset_meta': {'classes': ['cat'], 'palette': [(1, 2, 3)]}}, (('cat',), ((1, 2, 3),))),
        ({'dataset_meta': {'classes': ['cat'], 'palette': (1, 2, 3)}}, (('cat',), ((1, 2, 3),))),
        ({'CLASSES': ('cat', 'dog')}, (('cat', 'dog'), ())),
        ({'CLASSES': classes}, (classes, palette)),
    ]:
        torch.save({'state_dict': {}, 'meta': meta}, path)
        assert class_names(coco, path) == class_names(coco, read_checkpoint(path)) == expected


@pytest.fixture(scope='module')
def tool():
    """``tools/test.py``; its name is taken by the standard library."""
    sys.path.append(str(TOOLS))
    spec = importlib.util.spec_from_file_location('test_tool', TOOLS / 'test.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--fuse'], '--fuse is for a checkpoint: {file} is an exported file'),
        (['--compile'], '--compile is for a checkpoint: {file} is an exported file'),
        (['--tta'], '--tta is for a checkpoint: {file} is an exported file'),
        (['--ties-in-order'], '--ties-in-order is for a checkpoint: {file} is an exported file'),
        (
            ['--launcher', 'pytorch'],
            '--launcher pytorch is for a checkpoint: an exported file is tested in one process',
        ),
        (['--eval', 'mIoU'], '--eval mIoU: detection takes bbox'),
        (['--eval', 'bbox'], "{file} has other classes than the config's data set"),
    ],
    ids=str,
)
def test_tool_refuses_in_one_line(tmp_path, monkeypatch, tool, options, message):
    monkeypatch.setenv('RANK', '0')  # as torchrun sets it
    file = red_detector(tmp_path / 'red.onnx')
    monkeypatch.setattr(sys, 'argv', ['test.py', str(DETECTION), str(file), *options])
    with pytest.raises(SystemExit) as exit_:
        tool.main()
    assert exit_.value.code.startswith(message.format(file=file)) and '\n' not in exit_.value.code
