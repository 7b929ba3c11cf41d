"""Two processes, over gloo on the CPU, beside one: training, evaluation, and the death of one of the two."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from mmengine.config import Config
from programs import PROCESSES, be_quick, variables
from small_models import RETINANET, ROOT, like_trained
from test_resume import free_port
from torch.multiprocessing import start_processes

from repvit_mm.checkpoint import read_checkpoint
from repvit_mm.datasets.shapes import write_shapes
from repvit_mm.deploy.load import build_model

sys.path.append(str(ROOT / 'tools'))
_launch = importlib.import_module('_launch')

pytestmark = pytest.mark.needs_ops

UPDATES = 8
BACKBONE = dict(_delete_=True, type='RepViT', arch='m0_6', norm_eval=True)
SETTINGS = dict(
    train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=UPDATES),
    train_dataloader=dict(batch_size=1, num_workers=0, sampler=dict(type='InfiniteSampler')),
    test_dataloader=dict(batch_size=1, num_workers=0),
    optim_wrapper=dict(
        _delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-3, momentum=0.9), accumulative_counts=1
    ),
    default_hooks=dict(checkpoint=dict(by_epoch=False, interval=UPDATES)),
    randomness=dict(seed=1),
    load_from='begun.pth',
)
"""No step of the pipelines draws at random but the flip, and that is taken out; nor does a model's part."""

RUNS = {
    'two': {},
    'one': {'train_cfg.max_iters': 2 * UPDATES, 'optim_wrapper.accumulative_counts': 2},
    'half': {'test_dataloader.dataset.indices': [0, 2, 4]},
}
"""What two processes do, one that averages the gradients of two batches, and the first of the two by itself."""


def detector() -> Config:
    """RetinaNet, which samples nothing. Its weights have not learned to find anything."""
    cfg = Config.fromfile(ROOT / 'configs/det/mask_rcnn_repvit_m0_6_fpn_shapes.py')
    small = Config.fromstring(RETINANET.format(backbone=BACKBONE, channels=[40, 80, 160, 320]), '.py')
    cfg.model = small.model
    cfg.merge_from_dict(
        {
            'model.neck.norm_cfg': None,  # each process would normalize by its own half
            'model.bbox_head.norm_cfg': None,
            'model.bbox_head.num_classes': 6,
            'model.bbox_head.anchor_generator.octave_base_scale': 2,
            'test_evaluator.metric': 'bbox',
            'model.test_cfg': dict(nms_pre=1000, max_per_img=300, score_thr=0.0),
        }
    )
    cfg.train_dataloader.pop('batch_sampler')
    return cfg


def segmentor() -> Config:
    cfg = Config.fromfile(ROOT / 'configs/seg/fpn_repvit_m0_6_shapes.py')
    head = dict(norm_cfg=dict(type='BN'), dropout_ratio=0.0)  # SyncBN needs a GPU
    cfg.merge_from_dict({'model.backbone': BACKBONE, 'model.decode_head': head})
    return cfg


MODELS = {'detector': (detector, 'coco/bbox_mAP_50'), 'segmentor': (segmentor, 'mIoU')}


def prepare(folder: Path, cfg: Config) -> None:
    """Write the data, weights to begin with, others that tell places apart, and the runs' configs into a folder."""
    write_shapes(folder / 'data/shapes', train=8, val=5, size=96, seed=0)
    cfg.merge_from_dict(SETTINGS)
    cfg.param_scheduler = []
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.persistent_workers = False
        steps = [step for step in loader.dataset.pipeline if step.type != 'RandomFlip']
        loader.dataset.pipeline = [{**step, 'scale': (96, 96)} if step.type == 'Resize' else step for step in steps]
    torch.manual_seed(0)
    model = build_model(cfg)
    model.init_weights()
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, folder / 'begun.pth')
    like_trained(model, torch.randn(2, 3, 128, 128))
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, folder / 'like_trained.pth')
    for name, options in RUNS.items():
        own = Config(cfg.to_dict())
        own.merge_from_dict({**options, 'work_dir': name, 'experiment_name': name})
        own.dump(folder / f'{name}.py')


def work(index: int, folder: str, port: int) -> None:
    """One of the two processes, or a third one, which makes the other runs."""
    os.chdir(folder)
    be_quick()
    if index < 2:
        environment = dict(RANK=index, LOCAL_RANK=index, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in environment.items()})
    for name in ('two',) if index < 2 else ('one', 'half'):
        cfg = Config.fromfile(f'{name}.py')
        cfg.launcher = 'pytorch' if index < 2 else 'none'
        runner = _launch.build_runner(cfg, 'train_loop', 'test_loop')
        runner.train()
        runner.load_checkpoint('like_trained.pth')
        metrics = {key: float(value) for key, value in runner.test().items()}
        Path(f'{name}_{index}.json').write_text(json.dumps(metrics))


def learned(folder: Path, name: str, parameters: Sequence[str]) -> torch.Tensor:
    """The parameters that a run has ended with, one behind another."""
    weights = read_checkpoint((folder / name / 'last_checkpoint').read_text())['state_dict']
    return torch.cat([weights[parameter].flatten() for parameter in parameters])


@pytest.mark.slow
@pytest.mark.parametrize('kind', MODELS)
def test_two_processes_are_one_that_averages_gradients(tmp_path, kind):
    """The weights after eight steps, and the metrics of five images: one process gets two of them, the other three.

    Of BatchNorm with live statistics, in the segmentor's head, either process has those of its own half.
    """
    make, metric = MODELS[kind]
    cfg = make()
    prepare(tmp_path, cfg)
    start_processes(work, (str(tmp_path), free_port()), nprocs=3, start_method=PROCESSES.get_start_method())

    parameters = [name for name, _ in build_model(cfg).named_parameters()]
    initial = read_checkpoint(tmp_path / 'begun.pth')['state_dict']
    begun = torch.cat([initial[name].flatten() for name in parameters])
    two, one, half = (learned(tmp_path, name, parameters) - begun for name in RUNS)
    assert relative_error(two, one) < 1e-5 < 1e-2 < relative_error(half, one)

    first, second, alone, part = (
        json.loads((tmp_path / f'{name}.json').read_text()) for name in ('two_0', 'two_1', 'one_2', 'half_2')
    )
    assert first == second == alone
    assert 0 < alone[metric] != part[metric]


TROUBLE = """
import os, signal, time
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Trouble(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if (runner.iter, runner.rank) == (2, 1):
            {}
"""
ENDS = {
    # torchrun names the process that it was.
    'killed': ('os.kill(os.getpid(), signal.SIGKILL)', [], 'Signal 9 (SIGKILL) received by PID'),
    # torchrun ends a process by SIGTERM, and else half a minute later by SIGKILL.
    'hanging': (
        'signal.signal(signal.SIGTERM, signal.SIG_DFL), time.sleep(600)',
        ['--cfg-options', 'env_cfg.dist_cfg.timeout=10'],
        'Timed out waiting 10000ms',
    ),
}
"""What one of two processes does, the options of the run, and what is said of it."""


@pytest.mark.slow
@pytest.mark.parametrize('case', ENDS)
def test_process_that_is_lost_ends_the_other(tmp_path, case):
    what, options, reason = ENDS[case]
    prepare(tmp_path, segmentor())
    (tmp_path / 'trouble.py').write_text(TROUBLE.format(what))
    (tmp_path / 'config.py').write_text(
        "_base_ = 'two.py'\n"
        "custom_imports = dict(imports=['repvit_mm', 'trouble'])\n"
        "custom_hooks = [dict(type='Trouble')]\n"
    )
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    environment = variables(tmp_path, PATH=path, PORT=str(free_port()))
    command = [ROOT / 'tools/dist_train.sh', 'config.py', '2', '--work-dir', 'lost', *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert 'another process of this job has ended or does not answer ([' in done.stderr
    assert reason in done.stderr
    assert '[rank0]: ' not in done.stderr  # no traceback of the other
