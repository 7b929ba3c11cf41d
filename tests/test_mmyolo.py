"""YOLOv5 with RepViT beside MMYOLO: it learns, fuses, resumes, is tested. Elsewhere one line says what is missing."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from helpers import randomize
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from programs import launch
from samples import detection_sample, training_batch

from repvit_mm import _versions, switch_to_deploy
from repvit_mm._versions import mmyolo_problem
from repvit_mm.backbone import check_channels
from repvit_mm.datasets.shapes import write_shapes
from repvit_mm.normalization import fed

CONFIGS = Path(__file__).parents[1] / 'configs/det'
COCO, SHAPES = (CONFIGS / f'yolov5_repvit_{name}.py' for name in ('m0_9_8xb16-300e_coco', 'm0_6_shapes'))

pytestmark = pytest.mark.needs_ops
with_mmyolo = pytest.mark.skipif(
    importlib.util.find_spec('mmyolo') is None, reason='MMYOLO, which needs mmcv below 2.1, is not installed'
)


def load(path: Path) -> Config:
    cfg = Config.fromfile(path)
    cfg.model.backbone.init_cfg = None
    return cfg


def build(cfg: Config) -> torch.nn.Module:
    from mmyolo.registry import MODELS

    importlib.import_module('mmyolo.models')
    with DefaultScope.overwrite_default_scope('mmyolo'):
        return revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg.model)))


@pytest.mark.slow
@with_mmyolo
def test_it_learns_and_fuses():
    """As many parameters as the metafile says, a gradient for each, and the same detections when it is fused."""
    cfg = load(COCO)
    cfg.model.test_cfg.score_thr = 0.0
    model = build(cfg)
    entries = yaml.safe_load((CONFIGS / 'metafile.yml').read_text())['Models']
    (entry,) = (entry for entry in entries if entry['Name'] == COCO.stem)
    assert sum(parameter.numel() for parameter in model.parameters()) == entry['Metadata']['Parameters']
    assert fed(model.data_preprocessor) is None
    check_channels(model, cfg.model)

    size = (96, 128)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for _ in range(2)]
    batch = training_batch(cfg, images, [detection_sample(size, 80) for _ in images])
    batch = model.data_preprocessor(batch, training=True)
    loss, logged = model.train().parse_losses(model(**batch, mode='loss'))
    assert torch.isfinite(loss) and loss > 0, logged
    loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]

    randomize(model.backbone)
    sample = detection_sample(size, 80)
    sample.set_metainfo({'pad_param': None})
    found = []
    model.eval()
    for _ in range(2):
        with torch.no_grad(), DefaultScope.overwrite_default_scope('mmyolo'):
            data = model.data_preprocessor(dict(inputs=[images[0]], data_samples=[copy.deepcopy(sample)]))
            found.append(model(**data, mode='predict')[0].pred_instances)
        switch_to_deploy(model.backbone)
    assert len(found[0]) == len(found[1]) > 0
    torch.testing.assert_close(found[1].scores, found[0].scores, rtol=0, atol=1e-4)


@with_mmyolo
@pytest.mark.parametrize(
    ('part', 'options'),
    [
        ('neck', dict(in_channels=[96, 192, 320])),
        ('neck', dict(widen_factor=0.5)),
        ('bbox_head.head_module', dict(in_channels=[96, 192, 320])),
    ],
)
def test_widths_that_do_not_fit_are_refused(part, options):
    cfg = load(COCO)
    settings = cfg.model
    for key in part.split('.'):
        settings = settings[key]
    settings.update(options)
    with pytest.raises(ValueError, match=rf'model\.{part} with in_channels=.* does not take the .* maps of \['):
        check_channels(build(cfg), cfg.model)


@pytest.mark.slow
@with_mmyolo
def test_launchers_train_resume_test_and_fuse(tmp_path):
    write_shapes(tmp_path / 'data/shapes', train=8, val=2, size=96, seed=0)
    short = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'train_dataloader.batch_size=4']
    workers = [
        f'{split}_dataloader.{key}'
        for split in ('train', 'val', 'test')
        for key in ('num_workers=0', 'persistent_workers=False')
    ]
    options = ['--cfg-options', *short, 'default_hooks.checkpoint.interval=1', *workers]
    for more in ([], ['--resume', '--work-dir', 'run', '--cfg-options', 'train_cfg.max_epochs=2', *options[2:]]):
        done = launch(tmp_path, 'train.py', SHAPES, *(more or ['--work-dir', 'run', *options]))
        assert done.returncode == 0, done.stderr
    assert (tmp_path / 'run/epoch_2.pth').is_file()
    done = launch(tmp_path, 'test.py', SHAPES, 'run/epoch_2.pth', '--fuse', '--eval', 'bbox', '--cfg-options', *workers)
    assert done.returncode == 0 and 'bbox_mAP' in done.stdout + done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('mmyolo') is not None, reason='MMYOLO is installed')
def test_without_mmyolo_one_line_says_so(tmp_path):
    done = launch(tmp_path, 'train.py', COCO)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert f'config {COCO} is made for MMYOLO: MMYOLO is not installed: pip install mmyolo==0.6.0' in done.stderr


@pytest.mark.parametrize(
    ('mmyolo', 'mmcv', 'problem'),
    [
        ('0.6.0', '2.0.1', ''),
        ('0.6.0', '2.1.0', 'MMYOLO 0.6.0 refuses mmcv 2.1.0: install mmcv 2.0.1'),
        (None, '2.0.1', 'MMYOLO is not installed: pip install mmyolo==0.6.0;'),
        (None, '2.1.0', 'and an mmcv from 2.0 and below 2.1, which it needs: this is mmcv 2.1.0'),
    ],
)
def test_what_does_not_fit_is_told(mmyolo, mmcv, problem, monkeypatch):
    versions = {'mmyolo': mmyolo, 'mmcv': mmcv}
    monkeypatch.setattr(_versions, 'installed_version', lambda module, names: versions[module])
    assert problem in mmyolo_problem() and bool(mmyolo_problem()) == bool(problem)
