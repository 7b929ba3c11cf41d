"""YOLOv5 with RepViT beside MMYOLO: it learns, fuses, resumes, is tested. Elsewhere one line says what is missing."""

import copy
import importlib.util
import json
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import torch
import yaml
from helpers import SMALL, largest_error, settle
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from programs import launch
from samples import detection_sample, training_batch
from torch import Tensor, nn

from repvit_mm import _versions
from repvit_mm._versions import mmyolo_problem
from repvit_mm.backbone import check_channels
from repvit_mm.datasets.shapes import write_shapes
from repvit_mm.deploy.load import build_model
from repvit_mm.hooks import images_of
from repvit_mm.normalization import MEAN, STD, fed
from repvit_mm.reparam import plain_formulation, switch_to_deploy

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs/det'
COCO, SHAPES = (CONFIGS / f'yolov5_repvit_{name}.py' for name in ('m0_9_8xb16-300e_coco', 'm0_6_shapes'))

sys.path.append(str(ROOT / 'tools'))

pytestmark = pytest.mark.needs_ops
with_mmyolo = pytest.mark.skipif(
    importlib.util.find_spec('mmyolo') is None, reason='MMYOLO, which needs mmcv below 2.1, is not installed'
)
beside_another_mmcv = pytest.mark.skipif(
    importlib.util.find_spec('mmyolo') is not None, reason='MMYOLO is installed, and so mmcv fits it'
)


def load(path: Path) -> Config:
    cfg = Config.fromfile(path)
    cfg.model.backbone.init_cfg = None
    return cfg


@with_mmyolo
def test_recipe_is_the_bases_but_for_backbone_widths_and_normalization():
    cfg = Config.fromfile(COCO)
    (base,) = re.findall('_base_ = .+', COCO.read_text())
    theirs = Config.fromstring(base, '.py')
    preprocessor = cfg.model.data_preprocessor
    assert (preprocessor.mean, preprocessor.std, preprocessor.bgr_to_rgb) == (list(MEAN), list(STD), True)
    for model in (cfg.model, theirs.model):
        head = model.bbox_head.head_module
        for part, keys in (
            (model, ('backbone',)),
            (model.data_preprocessor, ('mean', 'std')),
            (model.neck, ('in_channels', 'out_channels', 'widen_factor')),
            (head, ('in_channels', 'widen_factor')),
        ):
            for key in keys:
                del part[key]
    assert {key for key in {*cfg, *theirs} if cfg.get(key) != theirs.get(key)} == {
        'channels',
        'checkpoint',
        'custom_imports',
    }


@pytest.mark.slow
@with_mmyolo
def test_it_learns_and_fuses():
    """As many parameters as the metafile says, each with a gradient and a step, and the same detections when fused."""
    cfg = load(COCO)
    cfg.model.test_cfg.score_thr = 0.0
    model = build_model(cfg)
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
    parameters = dict(model.named_parameters())
    assert len(parameters) == 459
    assert [name for name, each in parameters.items() if each.grad is None or not each.grad.isfinite().all()] == []
    with DefaultScope.overwrite_default_scope('mmyolo'):
        optimizer = Runner.build_optim_wrapper(SimpleNamespace(model=model), copy.deepcopy(cfg.optim_wrapper))
    assert {id(each) for group in optimizer.param_groups for each in group['params']} == set(
        map(id, model.parameters())
    )

    settle(model, batch['inputs'])
    model.eval()
    exact, inputs = copy.deepcopy(model).double(), batch['inputs'].double()

    @torch.no_grad()
    def maps() -> tuple[Tensor, ...]:
        return tuple(map_ for maps in exact(inputs) for map_ in maps)

    @torch.no_grad()
    def detections() -> tuple[Tensor, Tensor]:
        (found,) = model.test_step(dict(inputs=images[:1], data_samples=[detection_sample(size, 80)]))
        return found.pred_instances.scores, found.pred_instances.bboxes

    with plain_formulation(model), plain_formulation(exact):
        expected, (scores, boxes) = maps(), detections()
    assert scores.shape == (300,) and 0.1 < scores.min() < scores.max() < 1
    switch_to_deploy(model)
    switch_to_deploy(exact)
    assert model.backbone.deployed and largest_error(maps(), expected) < 1e-10
    fused, fused_boxes = detections()
    torch.testing.assert_close(fused, scores, rtol=0, atol=3e-4)
    assert fused_boxes.shape == boxes.shape
    # Twin: the comparison notices a backbone that is a little off.
    with torch.no_grad():
        next(exact.backbone.stem.parameters()).mul_(1.001)
    assert largest_error(maps(), expected) > 1e-6


@with_mmyolo
@pytest.mark.parametrize(
    ('part', 'options'),
    [
        ('neck', dict(in_channels=[96, 192, 320])),
        ('neck', dict(widen_factor=0.5)),
        ('bbox_head.head_module', dict(in_channels=[96, 192, 320])),
        ('bbox_head.head_module', dict(widen_factor=0.5)),
    ],
)
def test_widths_that_do_not_fit_are_refused(part, options):
    cfg = load(COCO)
    settings = cfg.model
    for key in part.split('.'):
        settings = settings[key]
    settings.update(options)
    model = build_model(cfg)
    with pytest.raises(
        ValueError, match=rf'model\.{part} with in_channels=.* does not take the .* maps of \['
    ) as error:
        check_channels(model, cfg.model)
    assert 'set in_channels=[96, 192, 384] and widen_factor=1.0' in str(error.value)


@pytest.mark.slow
@with_mmyolo
def test_launchers_check_train_resume_test_fuse_and_predict(tmp_path):
    write_shapes(tmp_path / 'data/shapes', train=8, val=2, size=96, seed=0)
    short = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'train_dataloader.batch_size=4']
    workers = [
        f'{split}_dataloader.{key}'
        for split in ('train', 'val', 'test')
        for key in ('num_workers=0', 'persistent_workers=False')
    ]

    def run(tool: str, *arguments: object) -> str:
        done = launch(tmp_path, tool, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    sheet = tmp_path / 'sheet.png'
    assert '2 data sets: 0 errors, 0 warnings' in run('check_data.py', SHAPES, '--out', sheet, '--images', 4)
    assert cv2.imread(str(sheet)).std() > 20

    options = ['--cfg-options', *short, 'default_hooks.checkpoint.interval=1', *workers]
    said = run('train.py', SHAPES, '--work-dir', 'run', *options)
    assert 'will not learn' not in said and 'bbox_mAP' in said
    run('train.py', SHAPES, '--work-dir', 'run', '--resume', *options, 'train_cfg.max_epochs=2')
    logs = ''.join(path.read_text() for path in sorted(tmp_path.glob('run/*/*.log')))
    assert 'resumed epoch: 1, iter: 2' in logs
    checkpoint = tmp_path / 'run/epoch_2.pth'

    found = []
    for fuse in ([], ['--fuse']):
        test = ['test.py', SHAPES, checkpoint, *fuse, '--eval', 'bbox', '--out', f'{len(fuse)}.pkl']
        assert 'bbox_mAP' in run(*test, '--cfg-options', 'model.test_cfg.score_thr=0.0', *workers)
        pictured = pickle.loads((tmp_path / f'{len(fuse)}.pkl').read_bytes())
        found.append([sample['pred_instances'] for sample in pictured])
    for plain, fused in zip(*found, strict=True):
        assert len(plain['scores']) == 20
        torch.testing.assert_close(fused['scores'], plain['scores'], rtol=0, atol=1e-4)

    picture = next((tmp_path / 'data/shapes/coco/val2017').glob('*.jpg'))
    run('predict.py', SHAPES, checkpoint, picture, '--fuse', '--score-thr', 0.0, '--out', 'predicted')
    predicted = json.loads((tmp_path / 'predicted/predictions.json').read_text())['annotations']
    (number,) = (index for index, sample in enumerate(pictured) if Path(sample['img_path']).name == picture.name)
    scores = torch.tensor([each['score'] for each in predicted])
    torch.testing.assert_close(scores, found[1][number]['scores'], rtol=0, atol=1e-4)

    for tool, wrong, line in (
        (
            ('train.py', SHAPES),
            'model.neck.widen_factor=0.5',
            'the config cannot be built: model.neck with in_channels=[80, 160, 320] and widen_factor=0.5 does ',
        ),
        (
            ('export.py', SHAPES, checkpoint, '--to', 'onnx'),
            'work_dir=export',
            'YOLOv5Head of MMYOLO cannot be exported; --what backbone exports the backbone',
        ),
    ):
        done = launch(tmp_path, *tool, '--cfg-options', wrong, *workers)
        told = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and line in told and 'Traceback' not in done.stderr, done.stderr
    assert not list(tmp_path.rglob('*.onnx'))


@with_mmyolo
def test_what_their_optimizer_leaves_out_is_told(capsys):
    """It takes weights and biases: a layer scale is neither."""
    cfg = load(COCO)
    cfg.merge_from_dict({'model.backbone': dict(_delete_=True, type='FastViT', arch='t8', out_indices=(1, 2, 3))})
    model = build_model(cfg)
    with DefaultScope.overwrite_default_scope('mmyolo'):
        optimizer = Runner.build_optim_wrapper(SimpleNamespace(model=model), cfg.optim_wrapper)
    importlib.import_module('train').tell_what_is_left_out(SimpleNamespace(model=model, optim_wrapper=optimizer))
    scales = sum('layer_scale' in name or 'gamma' in name for name, _ in model.named_parameters())
    assert f'{scales} of ' in capsys.readouterr().err and scales


def test_batches_without_samples_are_told_of():
    """MMYOLO's batches keep boxes and labels only."""
    batch = dict(inputs=[], data_samples=dict(bboxes_labels=torch.zeros(1, 6), img_metas=[]))
    assert images_of(batch) == 'a batch that does not name its images'
    assert images_of(dict(data_samples=[SimpleNamespace(img_path='a.jpg')])) == 'a.jpg'


class Widened(nn.Module):
    """Convolutions whose widths are multiplied, as MMYOLO's necks and heads have them."""

    def __init__(self, in_channels: list[int], widen_factor: float = 1.0) -> None:
        super().__init__()
        self.widen_factor = widen_factor
        self.convs = nn.ModuleList(nn.Conv2d(int(width * widen_factor), 8, 1) for width in in_channels)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(conv(map_) for conv, map_ in zip(self.convs, maps, strict=True))


@pytest.mark.parametrize(
    ('neck', 'head', 'wrong'),
    [
        (dict(in_channels=[8, 16, 24, 32]), dict(in_channels=[8] * 4), None),
        (dict(in_channels=[16, 32, 48, 64], widen_factor=0.5), dict(in_channels=[8] * 4), None),
        (
            dict(in_channels=[8, 16, 24, 32], widen_factor=0.5),
            dict(in_channels=[8] * 4),
            'model.neck with in_channels=[8, 16, 24, 32] and widen_factor=0.5 does not take the '
            "backbone's maps of [8, 16, 24, 32] channels: set in_channels=[8, 16, 24, 32] and widen_factor=1.0 (",
        ),
        (
            dict(in_channels=[8, 16, 24, 32]),
            dict(in_channels=[16] * 4),
            'model.bbox_head.head_module with in_channels=[16, 16, 16, 16] and widen_factor=1.0 does not take the '
            "neck's maps of [8, 8, 8, 8] channels: set in_channels=[8, 8, 8, 8] and widen_factor=1.0 (",
        ),
        (
            dict(in_channels=[16, 24, 32]),
            dict(in_channels=[8] * 3),
            'model.neck.in_channels is [16, 24, 32], the backbone gives maps of [8, 16, 24, 32] channels',
        ),
    ],
)
def test_widened_parts_are_tried(neck, head, wrong):
    cls, arch = SMALL['repvit']
    model = nn.Module()
    model.backbone, model.neck, model.bbox_head = cls(arch), Widened(**neck), nn.Module()
    model.bbox_head.head_module = Widened(**head)
    config = dict(neck=neck, bbox_head=dict(head_module=head))
    if wrong is None:
        check_channels(model, config)
    else:
        with pytest.raises(ValueError, match=re.escape(wrong)) as error:
            check_channels(model, config)
        assert '\n' not in str(error.value)
    assert all(module.training for module in model.modules())


@beside_another_mmcv
def test_without_mmyolo_one_line_says_so(tmp_path):
    done = launch(tmp_path, 'train.py', COCO)
    assert (done.returncode, done.stdout) == (1, '')
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(f'config {COCO} is made for MMYOLO: MMYOLO is not installed: pip install mmyolo==0.6.0; ')
    )
    assert 'Traceback' not in done.stderr


@beside_another_mmcv
def test_an_mmcv_that_mmyolo_refuses_is_told(tmp_path):
    """MMYOLO itself raises as it is imported."""
    installed = tmp_path / 'mmyolo-0.6.0.dist-info'
    installed.mkdir()
    (installed / 'METADATA').write_text('Metadata-Version: 2.1\nName: mmyolo\nVersion: 0.6.0\n')
    config = tmp_path / 'config.py'
    config.write_text("default_scope = 'mmyolo'\n")
    done = launch(tmp_path, 'train.py', config, PYTHONPATH=str(tmp_path))
    mmcv = _versions.installed_version('mmcv', _versions.FRAMEWORKS['mmcv'][0])
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == (
        f'config {config} is made for MMYOLO: MMYOLO 0.6.0 needs an mmcv from 2.0 and below 2.1, this is mmcv {mmcv}; '
        '`make setup STACK=oldest` makes an environment with both'
    )


@pytest.mark.parametrize(
    ('mmyolo', 'mmcv', 'problem'),
    [
        ('0.6.0', '2.0.1', ''),
        ('0.6.0', '2.1.0', 'MMYOLO 0.6.0 needs an mmcv from 2.0 and below 2.1, this is mmcv 2.1.0; '),
        ('0.6.0', None, 'MMYOLO 0.6.0 needs an mmcv from 2.0 and below 2.1, there is none; '),
        (None, '2.0.1', 'MMYOLO is not installed: pip install mmyolo==0.6.0; '),
        (
            None,
            '2.1.0',
            'MMYOLO is not installed: pip install mmyolo==0.6.0; '
            'MMYOLO 0.6.0 needs an mmcv from 2.0 and below 2.1, this is mmcv 2.1.0; ',
        ),
    ],
)
def test_what_does_not_fit_is_told(mmyolo, mmcv, problem, monkeypatch):
    versions = {'mmyolo': mmyolo, 'mmcv': mmcv}
    monkeypatch.setattr(_versions, 'installed_version', lambda module, names: versions[module])
    cure = '`make setup STACK=oldest` makes an environment with both'
    assert mmyolo_problem() == (problem and problem + cure)
