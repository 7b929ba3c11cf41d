"""PyTorch and the exported file see the same: prediction by prediction, picture by picture, and in the table."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from small_models import small_config, small_model

from repvit_mm.datasets.shapes import write_shapes
from repvit_mm.deploy.evaluate import put_file
from repvit_mm.deploy.export import Exportable, Options, export
from repvit_mm.deploy.load import fuse_model, load_model
from repvit_mm.deploy.picture import Painter, enlarge
from repvit_mm.deploy.predict import FilePredictor
from repvit_mm.deploy.prediction import LabelMap
from repvit_mm.deploy.results import coco_annotations
from repvit_mm.deploy.torch_predictor import ModelPredictor

pytestmark = pytest.mark.needs_ops

MODELS = ('retinanet', 'rtmdet', 'mask_rcnn', 'semantic_fpn')
SURE = 0.05


def config(model: str) -> Config:
    """A small model's config that tests at small sizes."""
    cfg = small_config(model)
    for step in cfg.test_dataloader.dataset.pipeline:
        if step.type == 'Resize':
            step.scale = (192, 128)
        if step.type == 'Pad':
            step.size = (192, 192)
    return cfg


@pytest.fixture(scope='module', params=MODELS)
def trained(request, tmp_path_factory):
    """A config, and a checkpoint of its model."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.save({'state_dict': small_model(request.param).state_dict()}, folder / 'model.pth')
    return config(request.param), str(folder / 'model.pth')


def exported(trained, **options):
    """A file of that checkpoint, beside it; two tests ask for the same one."""
    cfg, checkpoint = trained
    chosen = Options(**{'sizes': ((128, 192),), **options})
    path = Path(checkpoint).with_name(f'{hash(chosen)}.onnx')
    if not path.exists():
        model = fuse_model(load_model(cfg, checkpoint))
        export(Exportable.prepare(model, cfg, checkpoint, 'onnx', chosen), path, rounds=0)
    return path


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blurred noise, in which there is something to see."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3)).astype(np.float32)
    noise = sum(cv2.GaussianBlur(noise, (0, 0), sigma) * sigma for sigma in (1, 4, 12))
    return (255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)


def assert_same(found, expected) -> None:
    if isinstance(expected, LabelMap):
        assert len(np.unique(expected.labels)) > 1, 'there is nothing to compare'
        assert (found.labels == expected.labels).mean() > 0.999
        return
    found, expected = found.above(SURE), expected.above(SURE)
    assert len(found) == len(expected) > 0
    assert np.array_equal(found.labels, expected.labels)
    assert np.abs(found.boxes - expected.boxes).max() < 0.5
    assert np.abs(found.scores - expected.scores).max() < 1e-3
    assert (found.masks is None) == (expected.masks is None)
    if expected.masks is not None:
        assert expected.masks.any(axis=(1, 2)).mean() > 0.5, 'there is nothing to compare'
        # The masks of random networks have many pixels on the threshold.
        other, either = (found.masks ^ expected.masks).sum((1, 2)), (found.masks | expected.masks).sum((1, 2))
        assert (other <= np.maximum(0.02 * either, 1)).all()


@pytest.mark.slow
@pytest.mark.parametrize('fixed', [False, True], ids=['any size', 'fixed size'])
def test_file_shows_what_pytorch_shows(trained, fixed):
    size = (192, 192) if 'Pad' in str(trained[0].test_dataloader.dataset.pipeline) else (128, 192)
    # Labels, unlike logits, cannot be interpolated: where an image was resized, they differ along edges.
    logits = trained[0].default_scope == 'mmseg'
    path = exported(trained, logits=logits, **({'sizes': (size,)} if fixed else {'dynamic': True}))
    ours, theirs = FilePredictor(path, threads=1), ModelPredictor(*trained, device='cpu')
    assert (ours.task, tuple(ours.classes)) == (theirs.task, tuple(theirs.classes))
    assert [tuple(color) for color in ours.palette] == [tuple(color) for color in theirs.palette]
    # In a file of fixed size, padding is the same only if the image fills it.
    shapes = [(100, 150), (300, 450)] if fixed else [(100, 150), (300, 450), (97, 211), (211, 97)]
    for number, shape in enumerate(shapes):
        image = photo(*shape, number)
        found, expected = ours(image), theirs(image)
        assert_same(found, expected)
        if not isinstance(found, LabelMap):
            found, expected = found.above(SURE), expected.above(SURE)
        painter = Painter(ours.classes, ours.palette)
        drawn, wanted = painter(image, found).astype(int), painter(image, expected).astype(int)
        assert (np.abs(drawn - wanted).max(2) > 16).mean() < 0.002
        assert (np.abs(wanted - enlarge(image)).max(2) > 16).mean() > 0.01  # there is something to compare


@pytest.mark.slow
def test_fused_model_shows_what_the_unfused_one_shows(trained):
    fused, unfused = (ModelPredictor(*trained, fuse=fuse, device='cpu') for fuse in (True, False))
    image = photo(100, 150)
    assert_same(fused(image), unfused(image))


@pytest.mark.slow
def test_table_is_the_same(trained, tmp_path):
    """The truth of a detector's table is what PyTorch finds: the file has to find all of it to get the full score."""
    cfg, checkpoint = trained
    cfg = cfg.copy()
    write_shapes(tmp_path / 'shapes', train=1, val=6, size=96, seed=0)
    path = exported(trained, dynamic=True)
    dataset = cfg.test_dataloader.dataset
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False, batch_size=2)
    cfg.update(work_dir=str(tmp_path / 'work'), log_level='ERROR', load_from=checkpoint)
    if cfg.default_scope == 'mmseg':
        dataset.data_root = str(tmp_path / 'shapes/ade/ADEChallengeData2016')
    else:
        predictor = ModelPredictor(cfg, checkpoint, device='cpu')
        folder = tmp_path / 'shapes/coco'
        content = json.loads((folder / 'annotations/instances_val2017.json').read_text())
        content['categories'] = [{'id': 1 + i, 'name': name} for i, name in enumerate(predictor.classes)]
        content['annotations'] = []
        for entry in content['images']:
            found = predictor(cv2.imread(str(folder / 'val2017' / entry['file_name']))).above(SURE)
            for annotation in coco_annotations(found):
                number = 1 + len(content['annotations'])
                content['annotations'].append({'id': number, 'image_id': entry['id'], **annotation})
        assert len(content['annotations']) > len(content['images'])
        (tmp_path / 'truth.json').write_text(json.dumps(content))
        dataset.update(data_root='', ann_file=str(tmp_path / 'truth.json'), data_prefix=dict(img=f'{folder}/val2017/'))
        cfg.test_evaluator.ann_file = str(tmp_path / 'truth.json')
    expected = Runner.from_cfg(cfg.copy()).test()
    put_file(cfg, str(path))
    metrics = Runner.from_cfg(cfg).test()
    assert metrics.keys() == expected.keys()
    name = 'mIoU' if cfg.default_scope == 'mmseg' else 'coco/bbox_mAP'
    assert expected[name] > (1 if name == 'mIoU' else 0.95)
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, abs=0.1 if name == 'mIoU' else 0.001, nan_ok=True)
