"""The launchers as a user runs them: right use, and each wrong use with its one line and its exit status."""

import copy
import importlib
import inspect
import json
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from programs import TOOLS, launch, launch_anew, run

from repvit_mm import RepViT
from repvit_mm.checkpoint import read_checkpoint
from repvit_mm.datasets.shapes import write_shapes

# The launchers run configs, and these stand on MMDetection or MMSegmentation.
pytestmark = pytest.mark.needs_ops

ROOT = Path(__file__).parents[1]
DETECTION = ROOT / 'configs/det/mask_rcnn_repvit_m0_6_fpn_shapes.py'
SEGMENTATION = ROOT / 'configs/seg/fpn_repvit_m0_6_shapes.py'
COCO = ROOT / 'configs/det/mask_rcnn_repvit_m1_1_fpn_1x_coco.py'
ADE20K = ROOT / 'configs/seg/fpn_repvit_m1_1_ade20k_40k.py'

SHORT = {
    DETECTION: ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'default_hooks.logger.interval=1'],
    SEGMENTATION: [
        'train_cfg.max_iters=3',
        'train_cfg.val_interval=3',
        'default_hooks.checkpoint.interval=3',
        'default_hooks.logger.interval=1',
    ],
}
"""A few iterations of each demo config."""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A working folder with a tiny shapes data set where the configs look for it."""
    path = tmp_path_factory.mktemp('tools')
    write_shapes(path / 'data/shapes', train=8, val=4, size=96, seed=0)
    return path


def succeed(folder, tool, *arguments, launch=launch):
    done = launch(folder, tool, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def scalars(work_dir):
    """The metrics that the newest test run wrote."""
    newest = max(Path(work_dir).glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())


@pytest.fixture(scope='module')
def trained(folder):
    """Checkpoints of one short training run of each task.

    The segmentor's tool imports for itself what it needs; the detector's does so in ``test_distributed_launchers``.
    """
    checkpoints = {}
    for config, options in SHORT.items():
        arguments = [config, '--seed', 1, '--work-dir', config.stem, '--cfg-options', *options]
        succeed(folder, 'train.py', *arguments, launch=launch_anew if config is SEGMENTATION else launch)
        checkpoints[config] = Path((folder / config.stem / 'last_checkpoint').read_text())
        assert checkpoints[config].is_file()
    return checkpoints


@pytest.mark.slow
@pytest.mark.parametrize('config', SHORT, ids=lambda path: path.stem)
def test_test_gives_the_same_metrics_fused(folder, trained, config):
    detection = config is DETECTION
    metrics = ['bbox', 'segm'] if detection else ['mIoU', 'mDice']
    out = 'predictions.pkl' if detection else 'predictions'
    arguments = [config, trained[config], '--eval', *metrics, '--out', out, '--show-dir', 'shown']
    succeed(folder, 'test.py', *arguments, '--work-dir', f'{config.stem}_unfused')
    log = succeed(folder, 'test.py', *arguments, '--work-dir', f'{config.stem}_fused', '--fuse')
    assert 'FuseOnDeployHook: fused 56 blocks' in log

    before, after = scalars(folder / f'{config.stem}_unfused'), scalars(folder / f'{config.stem}_fused')
    names = ['coco/bbox_mAP', 'coco/segm_mAP'] if detection else ['mIoU', 'mDice']
    assert set(names) <= set(before)
    assert [before[name] for name in names] == pytest.approx([after[name] for name in names], abs=0.1)
    if detection:
        predictions = pickle.loads((folder / out).read_bytes())
        assert len(predictions) == 4 and 'masks' in predictions[0]['pred_instances']
    else:
        labels = [np.array(Image.open(path)) for path in (folder / out).glob('*.png')]
        assert len(labels) == 4 and all(label.shape == (96, 96) for label in labels)
    pictures = [path for path in folder.glob('**/shown/**/*') if path.suffix in ('.jpg', '.png')]
    assert len(pictures) >= 4


@pytest.mark.slow
@pytest.mark.parametrize('config', SHORT, ids=lambda path: path.stem)
def test_resume_goes_on_from_the_latest_checkpoint(folder, trained, config):
    longer = ['train_cfg.max_epochs=2'] if config is DETECTION else ['train_cfg.max_iters=6']
    work_dir = ['--work-dir', config.stem]
    log = succeed(folder, 'train.py', config, '--resume', *work_dir, '--cfg-options', *SHORT[config], *longer)
    assert f'resumed epoch: {1 if config is DETECTION else 0}, iter: {2 if config is DETECTION else 3}' in log
    latest = read_checkpoint(folder / config.stem / ('epoch_2.pth' if config is DETECTION else 'iter_6.pth'))
    assert latest['meta']['iter'] == (4 if config is DETECTION else 6)
    path = trained[config]
    log = succeed(folder, 'train.py', config, '--resume', path, *work_dir, '--cfg-options', *SHORT[config], *longer)
    assert 'resumed epoch' in log


@pytest.mark.slow
def test_pretrained_file_reaches_the_backbone(folder, trained):
    """The authors' layout: weights under `model`."""
    weights = {name: tensor + 0 for name, tensor in read_checkpoint(trained[DETECTION])['state_dict'].items()}
    backbone = {name.removeprefix('backbone.'): t for name, t in weights.items() if name.startswith('backbone.')}
    torch.save({'model': backbone}, folder / 'pretrained.pth')
    options = [
        'train_cfg.max_iters=1',
        'train_cfg.val_interval=9',
        'optim_wrapper.optimizer.lr=0.0',
        'train_dataloader.batch_size=2',
    ]
    options += ['optim_wrapper.optimizer.weight_decay=0.0', 'default_hooks.checkpoint.interval=1']
    work_dir = folder / 'from_pretrained'
    succeed(
        folder,
        'train.py',
        SEGMENTATION,
        '--pretrained',
        'pretrained.pth',
        '--work-dir',
        work_dir,
        '--cfg-options',
        *options,
    )
    learned = read_checkpoint(work_dir / 'iter_1.pth')['state_dict']
    parameters = [
        name for name in backbone if not name.endswith(('running_mean', 'running_var', 'num_batches_tracked'))
    ]
    assert all(torch.equal(learned[f'backbone.{name}'], backbone[name]) for name in parameters)


@pytest.mark.slow
def test_tta_of_segmentor_and_box_detector(folder, trained):
    succeed(folder, 'test.py', SEGMENTATION, trained[SEGMENTATION], '--tta', '--fuse', '--work-dir', 'tta')
    assert scalars(folder / 'tta')['mIoU'] >= 0
    boxes = folder / 'boxes.py'
    boxes.write_text(
        f"_base_ = '{DETECTION}'\n"
        "model = dict(type='FasterRCNN', roi_head=dict(mask_roi_extractor=None, mask_head=None))\n"
        "test_evaluator = dict(metric='bbox')\n"
    )
    succeed(folder, 'test.py', boxes, trained[DETECTION], '--tta', '--work-dir', 'tta_boxes', '--eval', 'bbox')
    assert scalars(folder / 'tta_boxes')['coco/bbox_mAP'] >= 0


@pytest.mark.slow
def test_distributed_launchers(folder):
    """Two processes over gloo; the distributed test predicts what the plain one does."""
    path = {'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    train = run(
        folder,
        TOOLS / 'dist_train.sh',
        DETECTION, 2, '--work-dir', 'distributed', '--cfg-options', *SHORT[DETECTION],
        **path, PORT='29511',
    )  # fmt: skip
    assert train.returncode == 0, train.stderr[-3000:]
    checkpoint = folder / 'distributed/epoch_1.pth'
    assert read_checkpoint(checkpoint)['meta']['iter'] == 1  # 8 images, 2 processes, 4 each
    test = run(
        folder,
        TOOLS / 'dist_test.sh',
        DETECTION, checkpoint, 2, '--fuse', '--work-dir', 'distributed_test', '--out', 'two.pkl',
        **path, PORT='29512',
    )  # fmt: skip
    assert test.returncode == 0, test.stderr[-3000:]
    succeed(folder, 'test.py', DETECTION, checkpoint, '--work-dir', 'plain_test', '--out', 'one.pkl')
    one, two = (
        {image['img_id']: image['pred_instances']['scores'] for image in pickle.loads((folder / name).read_bytes())}
        for name in ('one.pkl', 'two.pkl')
    )
    assert one.keys() == two.keys() and sum(len(scores) for scores in one.values()) > 0
    assert all(torch.allclose(one[image], two[image], atol=1e-4) for image in one)


@pytest.mark.parametrize(
    ('script', 'arguments', 'expected'),
    [
        (
            'slurm_train.sh',
            ['gpu', 'job', 'c.py', 'out', '--amp'],
            'train.py c.py --work-dir out --launcher slurm --amp',
        ),
        ('slurm_test.sh', ['gpu', 'job', 'c.py', 'c.pth', '--fuse'], 'test.py c.py c.pth --launcher slurm --fuse'),
    ],
)
def test_slurm_launchers_call_srun(tmp_path, script, arguments, expected):
    fake = tmp_path / 'srun'
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    path = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'GPUS': '16', 'SRUN_ARGS': '--time 10 --exclusive'}
    done = run(tmp_path, TOOLS / script, *arguments, **path)
    assert done.returncode == 0
    assert '--partition=gpu --job-name=job --gres=gpu:8 --ntasks=16 --ntasks-per-node=8' in done.stdout
    assert f'--time 10 --exclusive python -u {TOOLS}/{expected}' in done.stdout


@pytest.mark.parametrize(
    ('script', 'arguments', 'expected'),
    [
        ('dist_train.sh', ['c.py', '4', '--amp'], 'train.py c.py --launcher pytorch --amp'),
        ('dist_test.sh', ['c.py', 'c.pth', '4', '--fuse'], 'test.py c.py c.pth --launcher pytorch --fuse'),
    ],
)
def test_distributed_launchers_call_torchrun(tmp_path, script, arguments, expected):
    fake = tmp_path / 'torchrun'
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    path = {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
    machines = dict(NNODES='8', NODE_RANK='3', MASTER_ADDR='10.0.0.1', PORT='29600')
    for environment, options in (
        ({}, '--nnodes=1 --node_rank=0 --master_addr=127.0.0.1 --master_port=29500'),
        (machines, '--nnodes=8 --node_rank=3 --master_addr=10.0.0.1 --master_port=29600'),
    ):
        done = run(tmp_path, TOOLS / script, *arguments, **path, **environment)
        assert done.stdout == f'{options} --nproc_per_node=4 {TOOLS}/{expected}\n'


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh'])
def test_shell_launchers_say_what_they_take(tmp_path, script):
    done = run(tmp_path, TOOLS / script, 'only_one')
    assert done.returncode == 2
    assert done.stderr.startswith('usage: ') and done.stderr.count('\n') == 1


WRONG = {
    'no such config': (
        ['train.py', str(COCO).replace('m1_1', 'm1_2')],
        ['config', 'mask_rcnn_repvit_m1_2_fpn_1x_coco.py not found', 'the nearest is'],
    ),
    'no COCO': (
        ['train.py', COCO],
        [
            'data not found: data/coco/annotations/instances_train2017.json',
            'train_dataloader',
            'https://cocodataset.org',
        ],
    ),
    'no ADE20K': (
        ['test.py', ADE20K, 'exists.pth', '--eval', 'mIoU'],
        ['data not found: data/ade/ADEChallengeData2016/images/validation', 'test_dataloader'],
    ),
    'no pretrained file': (
        ['train.py', DETECTION, '--pretrained', 'absent.pth'],
        ['pretrained checkpoint absent.pth not found', '--pretrained none'],
    ),
    'no network': (
        ['train.py', DETECTION, '--pretrained', 'http://localhost:9/weights.pth'],
        [
            'http://localhost:9/weights.pth cannot be downloaded',
            'is not at',
            'checkpoints/weights.pth',
            '--pretrained none',
        ],
    ),
    'no checkpoint': (['test.py', DETECTION, 'absent.pth'], ['checkpoint absent.pth not found']),
    'typo in the checkpoint': (
        ['test.py', DETECTION, 'exist.pth'],
        ['exist.pth not found', 'the nearest is exists.pth'],
    ),
    'folder for a checkpoint': (['test.py', DETECTION, 'data'], ['checkpoint data is a folder']),
    'checkpoint of another task': (
        ['test.py', DETECTION, 'heads.pth'],
        ['checkpoint heads.pth is not of this config: outside the backbone tensors missing: '],
    ),
    'checkpoint without tensors': (
        ['test.py', DETECTION, 'exists.pth'],
        ['checkpoint exists.pth is not of this config: outside the backbone tensors missing: '],
    ),
    'checkpoint of other classes': (
        ['test.py', SEGMENTATION, 'classes.pth', '--fuse'],
        ['of another shape: 1 (decode_head.conv_seg.weight: (7, 128, 1, 1) for (', 'missing: '],
    ),
    'checkpoint that would run code': (
        ['test.py', DETECTION, 'evil.pth'],
        ['checkpoint evil.pth refers to posix.system', '--trust-checkpoint'],
    ),
    'web page for a checkpoint': (['test.py', DETECTION, 'page.pth'], ['checkpoint page.pth is a web page']),
    'backbone of another variant': (
        ['train.py', SEGMENTATION, '--pretrained', 'm0_9.pth'],
        ["m0_9.pth does not fit RepViT m0_6: it holds RepViT m0_9: set arch='m0_9'"],
    ),
    'resume from weights': (
        ['train.py', DETECTION, '--resume', 'exists.pth'],
        ["--resume: exists.pth is no checkpoint of a training run's", 'load_from=exists.pth'],
    ),
    'resume from nothing': (
        ['train.py', DETECTION, '--resume', 'absent.pth'],
        ['--resume: checkpoint absent.pth not found'],
    ),
    'segmentation metric for a detector': (
        ['test.py', DETECTION, 'exists.pth', '--eval', 'mIoU'],
        ['--eval mIoU: detection takes bbox, segm'],
    ),
    'detection metric for a segmentor': (
        ['test.py', SEGMENTATION, 'exists.pth', '--eval', 'bbox'],
        ['--eval bbox: segmentation takes mIoU, mDice, mFscore'],
    ),
    'ties of a segmentor': (
        ['test.py', SEGMENTATION, 'exists.pth', '--ties-in-order'],
        ['--ties-in-order', 'for a detector'],
    ),
    'float16 on a CPU': (
        ['test.py', SEGMENTATION, 'exists.pth', '--dtype', 'float16'],
        ['--dtype float16: float16 is for accelerators', 'take bfloat16'],
    ),
    'TTA of masks': (['test.py', DETECTION, 'exists.pth', '--tta'], ['--tta', 'masks']),
    'out of a detector': (['test.py', DETECTION, 'exists.pth', '--out', 'folder'], ['--out folder', '.pkl']),
    'out of a segmentor': (['test.py', SEGMENTATION, 'exists.pth', '--out', 'x.pkl'], ['--out x.pkl', 'folder']),
    'unknown arch': (
        ['train.py', DETECTION, '--cfg-options', 'model.backbone.arch=m1_2'],
        ["arch='m1_2'", "nearest is 'm1_", '--debug shows where'],
    ),
    'unknown option of the backbone': (
        ['train.py', DETECTION, '--cfg-options', 'model.backbone.norm_evil=True'],
        ["no option 'norm_evil'", "nearest is 'norm_eval'"],
    ),
    'nothing to fuse': (
        ['test.py', 'resnet.py', 'resnet.pth', '--fuse'],
        ['the model has no backbone of repvit_mm'],
    ),
    'config that cannot be read': (['train.py', 'broken.py'], ['config broken.py cannot be read']),
    'config of another library': (['train.py', 'pretrain.py'], ["default_scope='mmpretrain'", 'mmdet, mmseg']),
    'annotations that are not JSON': (
        ['train.py', 'broken_data.py'],
        [
            'annotation file broken.json is not JSON: Expecting value',
            'check_data.py broken_data.py',
            '--skip-data-check',
        ],
    ),
    'annotations to test on that are not JSON': (
        ['test.py', 'broken_data.py', 'exists.pth'],
        ['annotation file broken.json is not JSON: Expecting value'],
    ),
    'heads of other classes': (
        ['train.py', DETECTION, '--cfg-options', 'model.roi_head.bbox_head.num_classes=80'],
        ['model.roi_head.bbox_head.num_classes is 80, but train_dataloader.dataset has 6 classes'],
    ),
    'no base batch size': (['train.py', 'unscaled.py', '--auto-scale-lr'], ['auto_scale_lr.base_batch_size']),
}


class Evil:
    """Runs a command as it is unpickled."""

    def __reduce__(self):
        return os.system, ('touch was_run',)


@pytest.fixture(scope='module')
def wrong_folder(folder):
    torch.save({'state_dict': {}}, folder / 'exists.pth')
    torch.save({'state_dict': {'decode_head.conv_seg.weight': torch.zeros(1)}}, folder / 'heads.pth')
    torch.save({'decode_head.conv_seg.weight': torch.zeros(7, 128, 1, 1)}, folder / 'classes.pth')
    torch.save({'state_dict': {}, 'meta': Evil()}, folder / 'evil.pth')
    torch.save(RepViT('m0_9').state_dict(), folder / 'm0_9.pth')
    (folder / 'page.pth').write_text('<html>not found</html>')
    (folder / 'broken.py').write_text('_base_ = \n')
    (folder / 'pretrain.py').write_text("default_scope = 'mmpretrain'\n")
    (folder / 'unscaled.py').write_text(f"_base_ = '{DETECTION}'\nauto_scale_lr = dict(_delete_=True)\n")
    (folder / 'broken.json').write_text('instances')
    (folder / 'broken_data.py').write_text(
        f"_base_ = '{DETECTION}'\n"
        "broken = dict(data_root='', ann_file='broken.json', data_prefix=dict(img='data'))\n"
        'train_dataloader = dict(dataset=broken)\n'
        'val_dataloader = dict(dataset=broken)\n'
        'test_dataloader = dict(dataset=broken)\n'
        "val_evaluator = dict(ann_file='broken.json')\n"
    )
    (folder / 'resnet.py').write_text(
        f"_base_ = '{SEGMENTATION}'\n"
        "resnet = dict(_delete_=True, type='ResNet', depth=18)\n"
        'model = dict(backbone=resnet, neck=dict(in_channels=[64, 128, 256, 512]))\n'
    )
    cfg = Config.fromfile(folder / 'resnet.py')
    with DefaultScope.overwrite_default_scope('mmseg'):
        torch.save(MODELS.build(cfg.model).state_dict(), folder / 'resnet.pth')
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('case', WRONG)
def test_wrong_use_gets_one_line(wrong_folder, case):
    (tool, *arguments), expected = WRONG[case]
    done = launch(wrong_folder, tool, *arguments, '--work-dir', 'wrong')
    assert done.returncode == 1
    assert 'Traceback' not in done.stdout + done.stderr
    last_line = done.stderr.rstrip('\n').splitlines()[-1]
    for part in expected:
        assert part in last_line
    assert not list((wrong_folder / 'wrong').glob('*.pth')) and not (wrong_folder / 'was_run').exists()


@pytest.mark.slow
def test_check_data_tells_and_draws(wrong_folder):
    done = launch(wrong_folder, 'check_data.py', DETECTION, '--out', 'sheet.png', '--images', '4')
    assert done.returncode == 0, done.stderr
    assert 'train_dataloader.dataset (CocoDataset)' in done.stdout and done.stdout.endswith('0 errors, 0 warnings\n')
    with Image.open(wrong_folder / 'sheet.png') as sheet:
        assert sheet.size == (4 * 488, 514)
    done = launch(wrong_folder, 'check_data.py', SEGMENTATION, '--cfg-options', 'model.decode_head.num_classes=5')
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'error: model.decode_head.num_classes is 5, but train_dataloader.dataset has 7 classes' in done.stdout
    done = launch(wrong_folder, 'check_data.py', 'broken_data.py')
    assert done.returncode == 1 and 'annotation file broken.json is not JSON' in done.stdout


@pytest.mark.slow
def test_infinite_loss_stops_training_unless_told_otherwise(folder):
    """A learning rate of 1e30 does it: finite losses at first, no more afterwards."""
    arguments = [SEGMENTATION, '--seed', '1', '--cfg-options', *SHORT[SEGMENTATION], 'param_scheduler=None']
    arguments += ['optim_wrapper.optimizer.lr=1e30']
    done = launch(folder, 'train.py', '--work-dir', 'infinite', *arguments)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    last_line = done.stderr.rstrip('\n').splitlines()[-1]
    assert re.match(r'iteration 2: decode\.loss_ce is (nan|inf), on data/shapes/.*\.jpg; no checkpoint', last_line)
    done = launch(folder, 'train.py', '--work-dir', 'infinite', '--keep-going', *arguments)
    assert done.returncode == 0 and (folder / 'infinite/iter_3.pth').is_file()


class TestMixedPrecision:
    """What ``--amp`` makes of a config."""

    @pytest.fixture
    def wrapper(self, monkeypatch):
        """Gives the optimizer wrapper of a config on a device, which may multiply bfloat16."""
        monkeypatch.syspath_prepend(str(ROOT / 'tools'))
        train = importlib.import_module('train')

        def wrapper(dtype: str, device: str, multiplies: bool = True) -> dict:
            monkeypatch.setattr(train, 'get_device', lambda: device)
            monkeypatch.setattr(train, 'multiplies_bfloat16', lambda: multiplies)
            cfg = Config.fromfile(DETECTION)
            before = copy.deepcopy(cfg.optim_wrapper)
            train.use_mixed_precision(cfg, dtype)
            assert cfg.optim_wrapper.optimizer == before.optimizer
            return {name: value for name, value in cfg.optim_wrapper.items() if before.get(name) != value}

        return wrapper

    @pytest.mark.parametrize(
        ('dtype', 'expected'),
        [
            ('auto', dict(loss_scale='dynamic')),
            ('float16', dict(loss_scale='dynamic', dtype='float16')),
            ('bfloat16', dict(loss_scale=1.0, dtype='bfloat16')),
        ],
    )
    def test_on_a_gpu(self, wrapper, dtype, expected):
        assert wrapper(dtype, 'cuda') == dict(type='AmpOptimWrapper', **expected)
        assert expected.keys() <= inspect.signature(AmpOptimWrapper.__init__).parameters.keys()

    @pytest.mark.parametrize('dtype', ['auto', 'bfloat16'])
    def test_on_a_processor(self, wrapper, dtype):
        assert wrapper(dtype, 'cpu') == dict(type='CpuAmpOptimWrapper')
        with pytest.raises(SystemExit, match=r'^--amp needs an accelerator or a processor with AVX512-BF16 or AMX'):
            wrapper(dtype, 'cpu', multiplies=False)

    def test_float16_is_not_for_processors(self, wrapper):
        with pytest.raises(SystemExit, match=r'^--amp float16 is for accelerators: on a CPU take --amp bfloat16$'):
            wrapper('float16', 'cpu')


def test_usage_errors_are_argparse_s(tmp_path):
    done = launch(tmp_path, 'train.py')
    assert done.returncode == 2
    assert 'usage: train.py' in done.stderr and 'Traceback' not in done.stderr
