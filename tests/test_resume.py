"""Runs that are really killed, and resumed, beside a run that is never stopped."""

import itertools
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mmengine.runner.loops
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.evaluator import BaseMetric
from mmengine.fileio import BaseStorageBackend, register_backend
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from programs import PROCESSES, be_quick, launch
from test_tools import DETECTION, SEGMENTATION
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from repvit_mm.checkpoint import read_checkpoint
from repvit_mm.compat.pytorch import multiplies_bfloat16
from repvit_mm.datasets.shapes import write_shapes
from repvit_mm.files import claim, release
from repvit_mm.resume import (
    UNFINISHED,
    OptimizerError,
    ResumableCheckpointHook,
    StopOnSignalHook,
    Stopped,
    fast_forward,
    make_resumable,
    random_state,
)

KILLED = -signal.SIGKILL
LAST = {'epoch': 'epoch_4.pth', 'iteration': 'iter_12.pth'}
"""The two loops, with the last checkpoint of their runs; each run has 12 iterations and saves after every third."""


class Noisy(Dataset):
    """Six samples, or as many as asked for, whose augmentation draws from each generator."""

    def __init__(self, length: int = 6) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        noise = random.gauss(0, 1) + np.random.randn() + torch.randn(4)
        return dict(inputs=torch.linspace(-1, 1, 4) * index + noise, label=torch.tensor(float(index)))


class Net(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, inputs: Tensor, label: Tensor, mode: str) -> dict[str, Tensor] | list[Tensor]:
        outputs = self.layers(inputs)[:, 0]
        return {'loss': (outputs - label).square().mean()} if mode == 'loss' else list(outputs)


class Progress(BaseMetric):
    """A metric that is better each time, and one that is worse."""

    def process(self, data_batch: dict, data_samples: Sequence[Tensor]) -> None:
        self.results.append(None)

    def compute_metrics(self, results: list[None]) -> dict[str, float]:
        iteration = float(MessageHub.get_current_instance().get_info('iter'))
        return {'acc': iteration, 'loss': iteration}


def die(signum: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), signum)


class Death(Hook):
    """Kills its process at some iteration, ``'train'`` before it and ``'val'`` in a validation that precedes it.

    Writes down where the run has begun, and the epoch and number of each sample that it gets.
    """

    def __init__(self, iteration: int | None = None, stage: str = 'train', signum: int = signal.SIGKILL) -> None:
        self.iteration = iteration
        self.stage = stage
        self.signum = signum

    def before_train(self, runner: Runner) -> None:
        with open('starts', 'a') as file:
            file.write(f'{runner.iter}\n')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict) -> None:
        if (self.stage, self.iteration) == ('train', runner.iter):
            die(self.signum)
        with open('samples', 'a') as file:
            file.writelines(f'{runner.epoch} {label:.0f}\n' for label in data_batch['label'])

    def before_val_iter(self, runner: Runner, *args, **kwargs) -> None:
        if (self.stage, self.iteration) == ('val', runner.iter):
            die(self.signum)


class Ask(Hook):
    """Asks its process to stop, once, before an iteration of training or of a validation."""

    def __init__(self, iteration: int, stage: str, signum: int) -> None:
        self.asks = [(stage, iteration)]
        self.signum = signum

    def ask(self, stage: str, iteration: int) -> None:
        if (stage, iteration) in self.asks:
            self.asks.clear()
            os.kill(os.getpid(), self.signum)

    def before_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        self.ask('train', runner.iter)

    def before_val_iter(self, runner: Runner, *args, **kwargs) -> None:
        self.ask('val', runner.iter)


def watch_files(fatal: int | None) -> None:
    """Note each step in the life of checkpoints and of ``last_checkpoint`` in the file ``steps``; die before one."""
    numbers = itertools.count()

    def step(what: str, written: int | None = None) -> None:
        if next(numbers) == fatal:
            if written is not None:  # leave what is there in the midst of writing
                os.ftruncate(written, os.fstat(written).st_size // 2)
            die()
        os.write(steps, f'{what}\n'.encode())

    def audit(event: str, arguments: tuple) -> None:
        writes = event == 'open' and isinstance(arguments[1], str) and 'w' in arguments[1]
        if writes or event in ('os.rename', 'os.remove'):
            name = os.path.basename(os.fspath(arguments[0]))
            if '.pth' in name or name.startswith('last_checkpoint'):
                step(f'{event} {name}')

    def fsync(file: int) -> None:
        name = os.path.basename(os.readlink(f'/proc/self/fd/{file}'))
        step(f'write {name}', written=file)
        step(f'fsync {name}')
        really_fsync(file)

    steps = os.open('steps', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    really_fsync, os.fsync = os.fsync, fsync
    sys.addaudithook(audit)


def train(
    folder: Path,
    loop: str,
    *,
    resume: bool = False,
    death: tuple = (),
    ask: tuple = (),
    watch: bool = False,
    fatal_step: int | None = None,
    without: Sequence[str] = (),
    hook: Sequence[tuple[str, Any]] = (),
    train_cfg: Sequence[tuple[str, Any]] = (),
    optimizer: str = 'AdamW',
    length: int = 6,
    rank: int | None = None,
    port: int | None = None,
) -> None:
    """A run in the current process.

    Args:
        folder: Working folder.
        loop: A key of ``LAST``.
        resume: Go on from the latest checkpoint.
        death: Arguments of the hook that kills the process.
        ask: Arguments of the hook that asks it to stop, which it then does in good order. Of two it is the second.
        watch: Note the steps of writing files.
        fatal_step: The number of the step before which the process dies.
        without: Methods of the checkpoint hook to switch off.
        hook: Changes to the options of the checkpoint hook.
        train_cfg: Changes to the options of the training loop.
        optimizer: Name of its optimizer.
        length: How many samples there are.
        rank: Rank of this process out of two.
        port: Port at which the two meet.
    """
    os.chdir(folder)
    be_quick()
    if rank is not None:
        environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in environment.items()})
        torch.distributed.init_process_group('gloo')  # MMEngine would insist on CUDA
    for method in without:
        setattr(ResumableCheckpointHook, method, lambda *_: None)
    if watch:
        watch_files(fatal_step)
    by_epoch = loop == 'epoch'
    loader = dict(
        batch_size=3 if rank is not None and length == 6 else 2,
        num_workers=0,
        dataset=Noisy(length),
        collate_fn=dict(type='default_collate'),
    )
    checkpoint = dict(by_epoch=by_epoch, interval=1 if by_epoch else 3, max_keep_ckpts=1, save_best='acc')
    if by_epoch:
        cfg = dict(type='EpochBasedTrainLoop', max_epochs=4, val_interval=2)
        schedule = dict(type='ExponentialLR', gamma=0.5)
    else:
        cfg = dict(type='ResumableIterBasedTrainLoop', max_iters=12, val_interval=6)
        schedule = dict(type='PolyLR', end=12, by_epoch=False)
    hooks = [dict(type='EMAHook', momentum=0.2), Death(*death)]
    if ask:
        hooks += [Ask(*ask[:3])] if rank != 0 else []
        hooks.append(dict(type='StopOnSignalHook', patience=ask[3] if len(ask) > 3 else 2.0))
    runner = Runner(
        Net(),
        work_dir='work',
        train_dataloader=dict(loader, sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', seed=1)),
        train_cfg={**cfg, **dict(train_cfg)},
        optim_wrapper=dict(optimizer=dict(type=optimizer, lr=0.05)),
        param_scheduler=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=5), schedule],
        val_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=False)),
        val_cfg={},
        val_evaluator=[Progress()],
        custom_hooks=hooks,
        default_hooks=dict(checkpoint={'type': 'ResumableCheckpointHook', **checkpoint, **dict(hook)}),
        randomness=dict(seed=1, diff_rank_seed=rank is not None),
        launcher='none' if rank is None else 'pytorch',
        resume=resume,
        cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None)),
    )
    try:
        runner.train()
    except Stopped as stopped:
        Path('stopped').write_text(str(stopped))
        sys.exit(128 + stopped.signum)
    except OptimizerError as error:
        Path('stopped').write_text(str(error))
        sys.exit(1)


def run(*args, **options) -> int:
    """Exit status of a process that trains."""
    process = PROCESSES.Process(target=train, args=args, kwargs=options)
    process.start()
    process.join()
    return process.exitcode


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def run_two(*args, **options) -> list[int]:
    """Exit statuses of two processes that train together."""
    port = free_port()
    arguments = [dict(options, rank=rank, port=port) for rank in (0, 1)]
    processes = [PROCESSES.Process(target=train, args=args, kwargs=own) for own in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.fixture
def make_folder(tmp_path) -> Callable[[], Path]:
    numbers = itertools.count()

    def make_folder() -> Path:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return folder

    return make_folder


@pytest.fixture(scope='module')
def never_stopped(tmp_path_factory) -> dict[str, dict]:
    """The last checkpoint of a run with either loop."""
    checkpoints = {}
    for loop, last in LAST.items():
        folder = tmp_path_factory.mktemp(loop)
        assert run(folder, loop) == 0
        assert latest(folder) == folder / 'work' / last
        checkpoints[loop] = read_checkpoint(latest(folder))
    return checkpoints


def latest(folder: Path) -> Path:
    return Path((folder / 'work/last_checkpoint').read_text())


def files(folder: Path) -> set[str]:
    """What is in the work folder, without the copies of the config."""
    return {path.name for path in (folder / 'work').iterdir() if path.is_file() and path.suffix != '.py'}


def starts(folder: Path) -> list[int]:
    """The iterations at which the runs in a folder have begun."""
    return [int(line) for line in (folder / 'starts').read_text().split()]


def steps_of(folder: Path) -> list[str]:
    return (folder / 'steps').read_text().splitlines()


def logged(folder: Path) -> str:
    return ''.join(path.read_text() for path in folder.glob('work/*/*.log'))


def differences(a: Any, b: Any, name: str = '') -> list[str]:
    """The names of what is not the same, to the bit, in two checkpoints."""
    if isinstance(a, HistoryBuffer):
        a, b = a.data, b.data
    if isinstance(a, dict):
        return [inner for key in {**a, **b} for inner in differences(a.get(key), b.get(key), f'{name}.{key}')]
    if isinstance(a, list | tuple):
        pairs = enumerate(zip(a, b, strict=True))
        return [inner for i, (x, y) in pairs for inner in differences(x, y, f'{name}[{i}]')]
    if isinstance(a, Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, np.ndarray):
        return [] if np.array_equal(a, b) else [name]
    return [] if a == b else [name]


def lasting(checkpoint: dict) -> dict:
    """A checkpoint without what tells of clocks, of paths and of validations, which a resumed run does not repeat."""
    keys = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'random_state')
    scalars = checkpoint['message_hub']['log_scalars']
    return {
        **{key: checkpoint[key] for key in keys},
        'position': [checkpoint['meta'][key] for key in ('epoch', 'iter')],
        'scalars': {name: scalars[name] for name in ('train/loss', 'train/lr')},
    }


def same(folder: Path, expected: dict) -> bool:
    """Whether the last checkpoint in a folder is the expected one; where it is not, its weights differ."""
    found = differences(lasting(read_checkpoint(latest(folder))), lasting(expected))
    assert not found or any(name.startswith('.state_dict') for name in found), found
    return not found


@pytest.mark.parametrize('loop', LAST)
@pytest.mark.parametrize(
    ('death', 'start'),
    [((1,), 0), ((3,), 3), ((7,), 6), ((6, 'val'), 6), ((11,), 9)],
    ids=['before the first checkpoint', 'right after it', 'later', 'in validation', 'before the end'],
)
def test_killed_run_ends_like_one_never_stopped(make_folder, never_stopped, loop, death, start):
    folder = make_folder()
    assert run(folder, loop, death=death) == KILLED
    assert run(folder, loop, resume=True) == 0
    assert starts(folder) == [0, start]
    assert latest(folder).name == LAST[loop]
    assert same(folder, never_stopped[loop])


@pytest.mark.parametrize('loop', LAST)
def test_run_killed_twice(make_folder, never_stopped, loop):
    folder = make_folder()
    assert run(folder, loop, death=(4,)) == KILLED
    assert run(folder, loop, resume=True, death=(10,)) == KILLED
    assert run(folder, loop, resume=True) == 0
    assert starts(folder) == [0, 3, 9]
    assert same(folder, never_stopped[loop])


@pytest.mark.parametrize('loop', LAST)
def test_states_must_be_restored(make_folder, never_stopped, loop):
    """The twin of the tests above."""
    folder = make_folder()
    assert run(folder, loop, death=(4,)) == KILLED
    assert run(folder, loop, resume=True, without=['after_fast_forward']) == 0
    assert not same(folder, never_stopped[loop])


@pytest.mark.parametrize('loop', LAST)
@pytest.mark.parametrize('disturbed', [[], ['before_val', 'after_val']], ids=['kept apart', 'disturbing'])
def test_validation_must_be_kept_apart(make_folder, loop, disturbed):
    """Without a best model there is no second save after validation."""
    options = dict(hook=[('save_best', None)], without=disturbed)
    expected, folder = make_folder(), make_folder()
    assert run(expected, loop, **options) == 0
    assert run(folder, loop, death=(7,), **options) == KILLED
    assert run(folder, loop, resume=True, **options) == 0
    assert same(folder, read_checkpoint(latest(expected))) is not bool(disturbed)


@pytest.mark.parametrize(('other', 'missing'), [('SGD', 'momentum'), ('Adagrad', 'lr_decay')])
def test_another_optimizer_is_refused(make_folder, other, missing):
    folder = make_folder()
    assert run(folder, 'iteration', death=(4,)) == KILLED
    assert run(folder, 'iteration', resume=True, optimizer=other) == 1
    told = (folder / 'stopped').read_text()
    assert told.startswith('the checkpoint is of a run with another optimizer: it has no ') and '\n' not in told
    assert missing in told and f' for {other};' in told
    assert run(folder, 'iteration', resume=True) == 0


def test_loop_of_mmengine_does_not_repeat_the_run_and_is_named(make_folder, never_stopped):
    folder = make_folder()
    loop = [('type', 'IterBasedTrainLoop')]
    warning = 'IterBasedTrainLoop runs the data pipeline for each iteration that it skips'
    assert run(folder, 'iteration', train_cfg=loop, death=(4,)) == KILLED
    assert warning not in logged(folder)
    assert run(folder, 'iteration', train_cfg=loop, resume=True) == 0
    assert warning in logged(folder)
    assert not same(folder, never_stopped['iteration'])


BEFORE_VALIDATION = {'epoch': 'epoch_2.pth', 'iteration': 'iter_6.pth'}
WITHIN_EPOCHS = [('type', 'ResumableEpochBasedTrainLoop')]


@pytest.mark.parametrize('loop', LAST)
@pytest.mark.parametrize(
    'signum',
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    ids=lambda signum: signum.name,
)
@pytest.mark.parametrize(
    ('iteration', 'stage', 'start'),
    [(0, 'train', 1), (2, 'train', 3), (4, 'train', 5), (6, 'val', 6)],
    ids=['the first', 'the last of an epoch', 'within an epoch', 'validation'],
)
def test_run_that_is_asked_to_stop_goes_on_where_it_was(
    make_folder, never_stopped, loop, signum, iteration, stage, start
):
    folder, options = make_folder(), dict(train_cfg=WITHIN_EPOCHS) if loop == 'epoch' else {}
    assert run(folder, loop, ask=(iteration, stage, signum), **options) == 128 + signum
    path = latest(folder)
    assert (folder / 'stopped').read_text() == (
        f'{signum.name}: stopped after iteration {start}; {path} is saved, --resume goes on'
    )
    if stage == 'val':
        assert path.name == BEFORE_VALIDATION[loop]
    else:  # every third iteration is saved without being asked
        assert path.name == ('iter_3.pth' if (loop, start) == ('iteration', 3) else f'stopped_iter_{start}.pth')
    assert run(folder, loop, resume=True, **options) == 0
    assert starts(folder) == [0, start]
    assert latest(folder).name == LAST[loop] and same(folder, never_stopped[loop])


@pytest.mark.parametrize(
    ('loop', 'iteration', 'stage', 'saved', 'then'),
    [
        ('epoch', 11, 'train', 'stopped_iter_12.pth', '--resume goes on'),
        ('epoch', 12, 'val', 'epoch_4.pth', 'training is complete'),
        ('iteration', 11, 'train', 'iter_12.pth', 'training is complete'),
        ('iteration', 12, 'val', 'iter_12.pth', 'training is complete'),
    ],
)
def test_run_that_is_asked_to_stop_at_its_end_saves_once(
    make_folder, never_stopped, loop, iteration, stage, saved, then
):
    """The last iteration of the last epoch is followed by a checkpoint of that epoch, and by a validation."""
    folder, options = make_folder(), dict(train_cfg=WITHIN_EPOCHS) if loop == 'epoch' else {}
    assert run(folder, loop, ask=(iteration, stage, signal.SIGTERM), **options) == 128 + signal.SIGTERM
    told = f'SIGTERM: stopped after iteration 12; {latest(folder)} is saved, {then}'
    assert (folder / 'stopped').read_text() == told
    ends = {'epoch_4.pth', 'iter_12.pth', 'stopped_iter_12.pth'}
    assert latest(folder).name == saved and files(folder) & ends == {saved}
    assert run(folder, loop, resume=True, **options) == 0
    assert latest(folder).name == LAST[loop] and same(folder, never_stopped[loop])


def test_stop_without_the_hook_that_writes_files_whole(make_folder):
    """The checkpoint that is saved as the run stops is written whole all the same."""
    folder, options = make_folder(), dict(train_cfg=WITHIN_EPOCHS, hook=[('type', 'CheckpointHook')])
    assert run(folder, 'epoch', ask=(4, 'train', signal.SIGTERM), watch=True, **options) == 128 + signal.SIGTERM
    assert latest(folder).name == 'stopped_iter_5.pth' and read_checkpoint(latest(folder))['meta']['iter'] == 5
    assert f'os.rename stopped_iter_5.pth{UNFINISHED}' in steps_of(folder)
    assert run(folder, 'epoch', resume=True, **options) == 0


def test_stopped_within_an_epoch_needs_the_loop_that_goes_on_there(make_folder, never_stopped):
    """The twin of the test above: MMEngine's loop begins the epoch anew."""
    folder = make_folder()
    assert run(folder, 'epoch', ask=(4, 'train', signal.SIGTERM), train_cfg=WITHIN_EPOCHS) == 128 + signal.SIGTERM
    assert run(folder, 'epoch', resume=True) == 0
    assert read_checkpoint(latest(folder))['meta']['iter'] == 14


def test_validation_before_which_nothing_was_saved_runs_to_its_end(make_folder, never_stopped):
    """Weights are averages within it."""
    folder = make_folder()
    rare = dict(hook=[('interval', 4)], train_cfg=WITHIN_EPOCHS)
    assert run(folder, 'epoch', ask=(6, 'val', signal.SIGTERM), **rare) == 128 + signal.SIGTERM
    assert latest(folder).name == 'stopped_iter_6.pth'
    assert run(folder, 'epoch', resume=True, **rare) == 0
    assert same(folder, never_stopped['epoch'])


def test_workers_that_the_signal_ended_do_not_disturb_the_checkpoint(monkeypatch):
    """MMEngine runs git as it saves. The end of any process calls torch's handler, which raises for lost workers."""

    def handler(*_):
        raise RuntimeError('DataLoader worker is killed by signal')

    def save(*_):
        subprocess.run(['true'], check=True)
        return 'saved.pth'

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGCHLD, *StopOnSignalHook.signals)}
    signal.signal(signal.SIGCHLD, handler)
    try:
        hook = StopOnSignalHook()
        hook.before_train(None)
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(hook, 'save', save)
        loop = SimpleNamespace(epoch=0, max_epochs=2)
        with pytest.raises(Stopped, match=r'saved\.pth is saved, --resume goes on'):
            hook.stop(SimpleNamespace(epoch=0, train_loop=loop), 1)
        assert signal.getsignal(signal.SIGCHLD) is handler
        with pytest.raises(RuntimeError, match='DataLoader worker'):
            save()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@pytest.mark.parametrize('patience', [0.0, 100.0])
def test_second_signal_ends_the_process_unless_it_follows_at_once(make_folder, patience):
    folder = make_folder()
    twice = dict(ask=(4, 'train', signal.SIGTERM, patience), death=(4, 'train', signal.SIGTERM))
    status = run(folder, 'iteration', **twice)
    assert status == (128 + signal.SIGTERM if patience else -signal.SIGTERM)
    assert (folder / 'stopped').exists() == bool(patience)


# Two saves, each followed by a validation that finds a better model.
SHORT = {
    'epoch': [('max_epochs', 2), ('val_interval', 1)],
    'iteration': [('max_iters', 6), ('val_interval', 3)],
}


@pytest.mark.slow
@pytest.mark.parametrize('loop', LAST)
def test_killed_at_any_step_of_saving(make_folder, loop):
    """Before every opening, in the midst of each write, before every flush, rename and removal."""
    folder = make_folder()
    assert run(folder, loop, train_cfg=SHORT[loop], watch=True) == 0
    steps = steps_of(folder)
    last = latest(folder).name
    expected = read_checkpoint(latest(folder))
    assert files(folder) == {last, f'best_acc_{last}', 'last_checkpoint'}
    # Either checkpoint is written after training and again when validation has found it best; so is the pointer to it.
    assert len([step for step in steps if step.startswith('os.rename')]) == 2 * (2 + 2 + 1)
    assert [step.split('_')[0] for step in steps if step.startswith('os.remove')] == [
        'os.remove epoch' if loop == 'epoch' else 'os.remove iter',
        'os.remove best',
    ]

    unfinished, begun = 0, set()
    for number, step in enumerate(steps):
        folder = make_folder()
        assert run(folder, loop, train_cfg=SHORT[loop], watch=True, fatal_step=number) == KILLED
        assert steps_of(folder) == steps[:number]
        unfinished += any(name.endswith(UNFINISHED) for name in files(folder))
        whole = {name: read_checkpoint(folder / 'work' / name) for name in files(folder) if name.endswith('.pth')}
        pointed = any(line.startswith('os.rename last_checkpoint') for line in steps[:number])
        start = whole[latest(folder).name]['meta']['iter'] if pointed else 0
        if pointed:
            best = whole[latest(folder).name]['message_hub']['runtime_info'].get('best_ckpt')
            assert best is None or Path(best).name in whole, step

        assert run(folder, loop, train_cfg=SHORT[loop], resume=True) == 0, step
        assert starts(folder) == [0, start], step
        begun.add(start)
        assert latest(folder).name == last and same(folder, expected), step
        # Validation is not repeated: the best model then known is the first one, or there is one too many.
        best = {name for name in files(folder) if name.startswith('best_acc_')}
        assert best and files(folder) - best == {last, 'last_checkpoint'}, step
    assert unfinished == 3 * 10 and begun == {0, 3, 6}


@pytest.mark.parametrize('loop', LAST)
def test_killed_between_the_second_checkpoint_and_its_pointer(make_folder, loop):
    """A fast part of the test above."""
    folder = make_folder()
    assert run(folder, loop, train_cfg=SHORT[loop], watch=True) == 0
    steps, expected = steps_of(folder), read_checkpoint(latest(folder))
    rename = steps.index(f'os.rename {latest(folder).name}{UNFINISHED}')
    removal = next(number for number, step in enumerate(steps) if step.startswith('os.remove'))
    for fatal_step, start in ((rename - 1, 3), (rename, 3), (rename + 1, 3), (removal, 6)):
        folder = make_folder()
        assert run(folder, loop, train_cfg=SHORT[loop], watch=True, fatal_step=fatal_step) == KILLED
        assert run(folder, loop, train_cfg=SHORT[loop], resume=True) == 0
        assert starts(folder) == [0, start]
        assert same(folder, expected)


def test_hook_of_mmengine_loses_the_run(make_folder):
    """The twin of the two tests above."""
    options = dict(train_cfg=SHORT['epoch'], hook=[('type', 'CheckpointHook')])
    folder = make_folder()
    assert run(folder, 'epoch', watch=True, **options) == 0
    steps = steps_of(folder)
    after_removal = steps.index('os.remove epoch_1.pth') + 1
    assert steps[after_removal] == 'open epoch_2.pth'
    folder = make_folder()
    assert run(folder, 'epoch', watch=True, fatal_step=after_removal, **options) == KILLED
    assert not latest(folder).exists()
    assert run(folder, 'epoch', resume=True, **options) == 1


def test_unfinished_files_are_cleared_away(make_folder):
    folder = make_folder()
    work = folder / 'work'
    work.mkdir()
    for name in ('epoch_1.pth', 'epoch_9.pth', 'last_checkpoint'):
        (work / f'{name}{UNFINISHED}').write_text('half')
    (work / 'notes.unfinished').write_text('of somebody else')
    assert run(folder, 'epoch', train_cfg=[('max_epochs', 1)], hook=[('save_best', None)]) == 0
    assert files(folder) == {'epoch_1.pth', 'last_checkpoint', 'notes.unfinished'}


def test_second_run_in_the_folder_of_one_that_trains_is_refused(make_folder):
    """Its files stay, unfinished ones too; how it ends makes no difference."""
    folder = make_folder()
    work = folder / 'work'
    work.mkdir()
    (work / f'epoch_1.pth{UNFINISHED}').write_text('half')
    claim(work)
    assert run(folder, 'epoch') == 1
    assert files(folder) == {f'epoch_1.pth{UNFINISHED}'}
    release(work)
    assert run(folder, 'epoch', death=(4,)) == KILLED
    assert run(folder, 'epoch', resume=True) == 0


def test_options_mean_what_they_mean_in_mmengine(make_folder):
    """The same files, and the same about them in the message hub."""
    listings, hubs = [], []
    for hook in ('CheckpointHook', 'ResumableCheckpointHook'):
        folder = make_folder()
        options = dict(
            type=hook,
            max_keep_ckpts=2,
            save_best=['acc', 'loss'],
            filename_tmpl='after_{}.pth',
            out_dir=str(folder / 'out'),
        )
        assert run(folder, 'epoch', hook=[*options.items()], train_cfg=[('val_interval', 1)]) == 0
        listings.append(sorted(str(path.relative_to(folder)) for path in folder.rglob('*.pth')))
        hub = read_checkpoint(latest(folder))['message_hub']['runtime_info']
        prefixes = ('best_', 'last_ckpt', 'keep_ckpt_ids')
        hubs.append({key: str(hub[key]).replace(str(folder), '') for key in sorted(hub) if key.startswith(prefixes)})
    names = ['after_3.pth', 'after_4.pth', 'best_acc_after_4.pth', 'best_loss_after_1.pth']
    assert listings == [[f'out/work/{name}' for name in names]] * 2
    assert hubs[0] == hubs[1] and len(hubs[1]) == 6


def test_each_process_gets_its_own_random_state_back(make_folder):
    never_stopped, folder = make_folder(), make_folder()
    assert run_two(never_stopped, 'epoch') == [0, 0]
    expected = read_checkpoint(latest(never_stopped))
    mine, other = expected['random_state']
    assert {'.torch', '.numpy[1]'} <= set(differences(mine, other))
    assert run_two(folder, 'epoch', death=(3,)) == [KILLED, KILLED]
    assert run_two(folder, 'epoch', resume=True) == [0, 0]
    assert starts(folder) == [0, 0, 3, 3]  # together they take an epoch's six samples in one iteration
    assert same(folder, expected)

    assert run(folder, 'epoch', resume=True, train_cfg=[('max_epochs', 5)]) == 0
    assert 'The checkpoint holds the random states of 2 processes, this run has 1' in logged(folder)


def samples(folder: Path, epoch: int) -> list[int]:
    """The numbers of the samples that the runs in a folder have trained on in an epoch, in ascending order."""
    lines = [line.split() for line in (folder / 'samples').read_text().splitlines()]
    return sorted(int(number) for of, number in lines if int(of) == epoch)


def done_well(status: int | list[int]) -> bool:
    return status in (0, [0, 0])


@pytest.mark.parametrize(('first', 'second'), [(run, run_two), (run_two, run)], ids=['one, then two', 'two, then one'])
class TestAnotherNumberOfProcesses:
    """Twelve samples, two in a batch: one process has six iterations in an epoch, two have three."""

    def check_warning(self, folder: Path, first: Callable) -> None:
        before, after = (1, 2) if first is run else (2, 1)
        assert f'holds the random states of {before} processes, this run has {after}' in logged(folder)

    def test_from_the_end_of_an_epoch(self, make_folder, first, second):
        """The longer or shorter epochs of before must not be taken for one that has begun."""
        folder, options = make_folder(), dict(length=12)
        assert done_well(first(folder, 'epoch', train_cfg=[*WITHIN_EPOCHS, ('max_epochs', 2)], **options))
        assert done_well(second(folder, 'epoch', train_cfg=WITHIN_EPOCHS, resume=True, **options))
        assert starts(folder)[-1] == (12 if first is run else 6)
        position = read_checkpoint(latest(folder))['meta']
        assert (position['epoch'], position['iter']) == (4, 18)
        assert all(samples(folder, epoch) == list(range(12)) for epoch in range(4))
        self.check_warning(folder, first)

    def test_within_an_epoch(self, make_folder, first, second):
        """What is left of it are the samples that were not trained on."""
        folder, options = make_folder(), dict(length=12, train_cfg=WITHIN_EPOCHS)
        iteration, epoch = (9, 1) if first is run else (10, 3)
        first(folder, 'epoch', ask=(iteration, 'train', signal.SIGTERM), **options)
        assert len(samples(folder, epoch)) == 8
        assert done_well(second(folder, 'epoch', resume=True, **options))
        assert all(samples(folder, epoch) == list(range(12)) for epoch in range(4))
        self.check_warning(folder, first)

    def test_by_iterations(self, make_folder, first, second):
        folder = make_folder()
        assert done_well(first(folder, 'iteration', train_cfg=[('max_iters', 6)]))
        assert done_well(second(folder, 'iteration', resume=True))
        assert starts(folder)[-1] == 6 and latest(folder).name == 'iter_12.pth'
        self.check_warning(folder, first)


@pytest.mark.parametrize('loop', LAST)
def test_one_of_two_processes_is_asked_to_stop(make_folder, loop):
    """Both stop, with one checkpoint, at the next iteration at which they compare notes."""
    folder = make_folder()
    options = dict(ask=(4, 'train', signal.SIGTERM), hook=[('interval', 100), ('save_best', None)])
    if loop == 'epoch':
        options |= dict(length=12, train_cfg=[*WITHIN_EPOCHS, ('val_interval', 100)])
    else:
        options |= dict(train_cfg=[('val_interval', 100)])
    assert run_two(folder, loop, **options) == [128 + signal.SIGTERM] * 2
    assert files(folder) == {'stopped_iter_11.pth', 'last_checkpoint'}
    assert (folder / 'stopped').read_text().startswith('SIGTERM: stopped after iteration 11; ')


@register_backend('elsewhere')
class Elsewhere(BaseStorageBackend):
    """A store that is not the local disk."""

    def get(self, filepath: str) -> bytes:
        raise FileNotFoundError(filepath)

    get_text = get


@pytest.mark.parametrize(('args', 'expected'), [(None, 'atomic_local'), ({'backend': 'elsewhere'}, 'elsewhere')])
def test_other_stores_are_written_as_mmengine_does(tmp_path, args, expected):
    hook = ResumableCheckpointHook(backend_args=args)
    hub = MessageHub.get_instance('elsewhere')
    runner = SimpleNamespace(
        work_dir=str(tmp_path), logger=logging.getLogger(), message_hub=hub, train_loop=None, iter=0
    )
    hook.before_train(runner)
    assert hook.backend_args == {'backend': expected}


@pytest.mark.parametrize(
    ('iteration', 'states', 'restored', 'warned'),
    [(0, 1, False, False), (3, 1, True, False), (3, 0, False, True), (3, 2, False, True), (0, 0, False, False)],
    ids=['weights to start with', 'resumed', 'without states', 'of two processes', 'nothing loaded'],
)
def test_states_are_restored_in_a_run_that_goes_on(tmp_path, caplog, iteration, states, restored, warned):
    hook = ResumableCheckpointHook()
    hub = MessageHub.get_instance('goes_on')
    wrapper = OptimWrapper(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    runner = SimpleNamespace(
        work_dir=str(tmp_path),
        logger=logging.getLogger(),
        message_hub=hub,
        train_loop=None,
        optim_wrapper=wrapper,
        iter=iteration,
    )
    torch.manual_seed(1)
    checkpoint = {'random_state': [random_state()] * states} if states else {}
    saved = torch.rand(3)
    hook.after_load_checkpoint(runner, checkpoint)
    hook.before_train(runner)
    assert torch.equal(torch.rand(3), saved) is restored
    assert (f'holds the random states of {states} processes, this run has 1' in caplog.text) is warned


class Counted(Dataset):
    """Numbers from 0 to 9; counts how many were made in this process."""

    made = 0

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        self.made += 1
        return index


@pytest.mark.parametrize('steps', [1, 2, 4, 5, 6, 13])
@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize('sampler', [InfiniteSampler, DefaultSampler])
def test_fast_forward_leads_to_the_same_batches(monkeypatch, sampler, workers, steps):
    monkeypatch.setattr(mmengine.runner.loops.time, 'sleep', lambda seconds: None)

    def make_loader() -> DataLoader:
        data = Counted()
        return DataLoader(data, batch_size=2, sampler=sampler(data, seed=3), num_workers=workers)

    plain = _InfiniteDataloaderIterator(make_loader())
    for _ in range(steps):
        next(plain)
    loader = make_loader()
    batches = _InfiniteDataloaderIterator(loader)
    fast_forward(batches, loader, steps)
    # Of all that is passed over, only the first batch of a further epoch is made.
    assert loader.dataset.made == (2 * ((steps - 1) // 5) if sampler is DefaultSampler and not workers else 0)
    assert [next(batches).tolist() for _ in range(12)] == [next(plain).tolist() for _ in range(12)]


EPOCHS, ITERATIONS = dict(type='ResumableEpochBasedTrainLoop'), dict(type='ResumableIterBasedTrainLoop')
OURS = dict(type='ResumableCheckpointHook')


@pytest.mark.parametrize(
    ('loop', 'hooks', 'expected_loop', 'expected_hook'),
    [
        (dict(by_epoch=True), None, EPOCHS, OURS),
        (dict(by_epoch=False), {}, ITERATIONS, OURS),
        (dict(type='EpochBasedTrainLoop', max_epochs=3), {'timer': {}}, dict(EPOCHS, max_epochs=3), OURS),
        (dict(type='IterBasedTrainLoop'), dict(checkpoint=None), ITERATIONS, None),
        (ITERATIONS, dict(checkpoint=dict(type='CheckpointHook', interval=9)), ITERATIONS, dict(OURS, interval=9)),
        (dict(type='Own'), dict(checkpoint=dict(type='Own')), dict(type='Own'), dict(type='Own')),
        ({}, dict(checkpoint=OURS), {}, OURS),
    ],
)
def test_config_is_made_resumable(loop, hooks, expected_loop, expected_hook):
    cfg = Config(dict(train_cfg=loop, **({} if hooks is None else dict(default_hooks=hooks))))
    make_resumable(cfg)
    assert cfg.train_cfg == expected_loop and cfg.default_hooks == dict(hooks or {}, checkpoint=expected_hook)


KILLER = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from repvit_mm.resume import ResumableCheckpointHook

if 'FORGETFUL' in os.environ:
    ResumableCheckpointHook.after_fast_forward = lambda self, runner: None

@HOOKS.register_module()
class Killer(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == int(os.environ.get('DIE_AT', -1)):
            os.kill(os.getpid(), signal.SIGKILL)
"""
REAL = {
    DETECTION: ["checkpoint = dict(type='ResumableCheckpointHook')", 'train_cfg = dict(max_epochs=3, val_interval=2)'],
    SEGMENTATION: [
        "checkpoint = dict(type='ResumableCheckpointHook', interval=2)",
        "train_cfg = dict(type='ResumableIterBasedTrainLoop', max_iters=6, val_interval=4)",
    ],
}


@pytest.mark.slow
@pytest.mark.needs_ops
@pytest.mark.parametrize('config', REAL, ids=lambda path: path.stem)
def test_killed_training_of_a_real_model(tmp_path, config):
    """Six iterations of tools/train.py, killed before the last one; the segmentor has a twin whose states are lost.

    The detector trains in mixed precision if the processor does.
    """
    precision = ['--amp'] if config is DETECTION and multiplies_bfloat16() else []
    write_shapes(tmp_path / 'data/shapes', train=4, val=1, size=64, seed=0)
    (tmp_path / 'killer.py').write_text(KILLER)
    lines = [
        f"_base_ = '{config}'",
        "custom_imports = dict(imports=['repvit_mm', 'repvit_mm.resume', 'killer'])",
        *REAL[config],
        'default_hooks = dict(checkpoint=checkpoint)',
        "custom_hooks = [dict(type='Killer'), dict(type='EMAHook')]",
        'model = dict(backbone=dict(drop_path_rate=0.2))',
        'train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)',
        'val_dataloader = dict(num_workers=0, persistent_workers=False)',
    ]
    (tmp_path / 'config.py').write_text('\n'.join(lines))

    def train(folder: str, *arguments: str, **environment: str) -> int:
        path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get('PYTHONPATH'))))
        arguments = ('config.py', '--seed', '1', '--work-dir', folder, *precision, *arguments)
        return launch(tmp_path, 'train.py', *arguments, PYTHONPATH=path, **environment).returncode

    def result(folder: str) -> dict:
        return lasting(read_checkpoint((tmp_path / folder / 'last_checkpoint').read_text()))

    assert train('never_stopped') == 0
    assert train('killed', DIE_AT='5') == KILLED
    assert result('killed')['position'] == ([2, 4] if config is DETECTION else [0, 4])
    if config is SEGMENTATION:
        shutil.copytree(tmp_path / 'killed', tmp_path / 'twin')
        pointer = tmp_path / 'twin/last_checkpoint'
        pointer.write_text(pointer.read_text().replace('/killed/', '/twin/'))
    assert train('killed', '--resume') == 0
    assert result('killed')['position'][1] == 6
    assert not differences(result('killed'), result('never_stopped'))
    if config is SEGMENTATION:
        assert train('twin', '--resume', FORGETFUL='1') == 0
        assert any(name.startswith('.state_dict') for name in differences(result('twin'), result('never_stopped')))
