"""Runs that are killed at any moment, or that lose what they need: resumed, they end as one that nobody disturbed."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from programs import launch
from test_resume import KILLED, differences, free_port, lasting
from tiny import ADE, COCO, CONFIGS, LAST, write_tiny

from repvit_mm.checkpoint import read_checkpoint
from repvit_mm.files import UNFINISHED

pytestmark = [pytest.mark.needs_ops, pytest.mark.slow]
tasks = pytest.mark.parametrize('task', CONFIGS)
long = pytest.mark.torture

FAULT = """
import multiprocessing, os, resource, signal
from pathlib import Path
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Fault(Hook):
    '''Does what the environment says before the seventh iteration.'''
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        fault = os.environ.get('FAULT') if runner.iter == 6 else None
        if fault == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == 'full disk':
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        elif fault == 'killed worker':
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        elif fault == 'lost images':
            Path('images').rename('elsewhere')
        elif fault == 'Ctrl-C':
            os.killpg(0, signal.SIGINT)
"""
KILLS = 30
"""How often the runs of a task are killed."""

IMAGES = {'det': f'{COCO}/train2017', 'seg': f'{ADE}/images/training'}


def copy_scene(scene: Path, folder: Path) -> Path:
    """The scene in a folder of its own."""
    return Path(shutil.copytree(scene, folder, dirs_exist_ok=True))


@pytest.fixture(scope='module')
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp('scene'))
    (folder / 'fault.py').write_text(FAULT)
    for task in CONFIGS:
        with (folder / f'{task}.py').open('a') as config:
            config.write(
                "custom_imports['imports'].append('fault')\ncustom_hooks = [dict(type='Fault'), dict(type='EMAHook')]\n"
            )
    return folder


def train(folder: Path, task: str, *arguments: str, **options: object) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get('PYTHONPATH'))))
    arguments = (f'{task}.py', '--seed', '1', '--work-dir', 'work', *arguments)
    return launch(folder, 'train.py', *arguments, PYTHONPATH=path, **options)


def result(folder: Path, task: str) -> dict:
    """What a run that has come to its end leaves."""
    path = Path((folder / 'work/last_checkpoint').read_text())
    assert path.name == LAST[task]
    return lasting(read_checkpoint(folder / path))


def check_files(folder: Path) -> None:
    """Every checkpoint is whole, and ``last_checkpoint`` leads to one."""
    for path in (folder / 'work').glob('*.pth'):
        read_checkpoint(path)
    with suppress(FileNotFoundError):
        read_checkpoint(folder / (folder / 'work/last_checkpoint').read_text())


@pytest.fixture(scope='module')
def undisturbed(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict, float]]:
    """What a run that nobody disturbs ends in, and how many seconds it takes."""
    done: dict[str, tuple[dict, float]] = {}

    def run(task: str) -> tuple[dict, float]:
        if task not in done:
            folder = copy_scene(scene, tmp_path_factory.mktemp(task))
            begun = time.monotonic()
            assert train(folder, task).returncode == 0
            done[task] = result(folder, task), time.monotonic() - begun
        return done[task]

    return run


def send(signum: int, seconds: float, process: int) -> None:
    """Wait, then send a signal; the process may have ended before."""
    time.sleep(seconds)
    with suppress(ProcessLookupError):
        os.kill(process, signum)


def kill_within_write(folder: Path, seconds: float, patience: float, process: int) -> None:
    """Wait until a checkpoint is being written, then a moment more, and kill."""

    def unfinished() -> set[tuple[str, int]]:
        with suppress(FileNotFoundError):  # finished between two looks
            return {(path.name, path.stat().st_ino) for path in folder.glob(f'work/*{UNFINISHED}')}
        return set()

    left, given_up = unfinished(), time.monotonic() + patience  # what a killed run has left is none of this one's
    while time.monotonic() < given_up and not unfinished() - left:
        time.sleep(0.0005)
    send(signal.SIGKILL, seconds, process)


@long
@tasks
def test_killed_at_random_moments(scene, tmp_path, undisturbed, tried, torture_seed, task):
    """Thirty times, in as many runs as that takes; a run that comes to its end has the weights of any other.

    The moments lie in the whole life of a run, from its start on.
    """
    expected, seconds = undisturbed(task)
    moments = random.Random(f'{torture_seed} {task}')
    folder = copy_scene(scene, tmp_path)
    kills = 0
    while True:
        begun = time.monotonic()
        hit = partial(send, signal.SIGKILL, moments.uniform(0, 1) * seconds) if kills < KILLS else None
        done = train(folder, task, '--resume', meanwhile=hit)
        check_files(folder)
        if done.returncode == KILLED:
            tried()
            kills += 1
            continue
        assert done.returncode == 0, done.stderr[-2000:]
        assert not differences(result(folder, task), expected), kills
        if kills == KILLS:
            break
        seconds = min(seconds, time.monotonic() - begun)
        shutil.rmtree(folder / 'work')


@long
@tasks
def test_killed_while_a_checkpoint_is_written(scene, tmp_path, undisturbed, tried, torture_seed, task):
    expected, seconds = undisturbed(task)
    moments = random.Random(f'write {torture_seed} {task}')
    folder = copy_scene(scene, tmp_path)
    for _ in range(5):
        tried()
        meanwhile = partial(kill_within_write, folder, moments.uniform(0, 0.003), 4 * seconds)
        done = train(folder, task, '--resume', meanwhile=meanwhile)
        assert done.returncode in (0, KILLED), done.stderr[-2000:]
        check_files(folder)
    assert train(folder, task, '--resume').returncode == 0
    assert not differences(result(folder, task), expected)


@long
@tasks
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_asked_to_stop_at_random_moments(scene, tmp_path, undisturbed, tried, torture_seed, task, signum):
    """Before training begins the process ends at once, as any other; from then on it saves and says how to go on."""
    expected, seconds = undisturbed(task)
    moments = random.Random(f'{signum} {torture_seed} {task}')
    folder = copy_scene(scene, tmp_path)
    for _ in range(5):
        tried()
        done = train(folder, task, '--resume', meanwhile=partial(send, signum, moments.uniform(0.3, 1) * seconds))
        assert done.returncode in (0, -signum, 128 + signum), done.stderr[-2000:]
        if done.returncode == 128 + signum and 'interrupted' not in done.stderr:
            # After the last iteration there is nothing to go on with.
            assert done.stderr.rstrip().endswith(('is saved, --resume goes on', 'is saved, training is complete'))
        check_files(folder)
    assert train(folder, task, '--resume').returncode == 0
    assert not differences(result(folder, task), expected)


@long
@tasks
def test_ctrl_c_in_a_terminal_is_told_in_one_line(scene, tmp_path, task):
    """A terminal sends it to the workers too."""
    folder = copy_scene(scene, tmp_path)
    workers = ['--cfg-options', 'train_dataloader.num_workers=2']
    done = train(folder, task, *workers, first=os.setsid, FAULT='Ctrl-C')
    assert done.returncode == 128 + signal.SIGINT and 'Traceback' not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].endswith('stopped_iter_7.pth is saved, --resume goes on')


TWICE_AS_LONG = {
    'det': ('epoch_12.pth', ['train_cfg.max_epochs=12', 'train_cfg.val_interval=12']),
    'seg': (
        'iter_24.pth',
        ['train_cfg.max_iters=24', 'train_cfg.val_interval=24', 'model.decode_head.norm_cfg.type=BN'],
    ),
}
"""What 24 iterations of two processes end with, and their settings; SyncBN needs a GPU."""


class TwoProcesses:
    """Runs of two processes that talk over gloo: 24 iterations, of which the two compare notes at every tenth.

    Args:
        scene: The data and the configs.
        folder: Gets a copy of them.
        task: A key of ``CONFIGS``.
    """

    def __init__(self, scene: Path, folder: Path, task: str) -> None:
        self.folder = copy_scene(scene, folder)
        self.task = task
        self.last, settings = TWICE_AS_LONG[task]
        self.settings = ('--cfg-options', *settings, 'env_cfg.dist_cfg.timeout=15')

    def train(self, meanwhile: Sequence[Callable[[int], None] | None] = (None, None)) -> list:
        """Go on in both processes, with something that is done to each; returns how they have ended."""
        meeting = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))

        def run(rank: int) -> subprocess.CompletedProcess:
            environment = dict(RANK=str(rank), LOCAL_RANK=str(rank), **meeting)
            arguments = ('--resume', '--launcher', 'pytorch', *self.settings)
            return train(self.folder, self.task, *arguments, meanwhile=meanwhile[rank], **environment)

        with ThreadPoolExecutor(2) as pool:
            return [*pool.map(run, (0, 1))]

    def result(self) -> dict:
        """What the two have learned."""
        path = Path((self.folder / 'work/last_checkpoint').read_text())
        assert path.name == self.last
        return lasting(read_checkpoint(self.folder / path))


@pytest.fixture(scope='module')
def undisturbed_two(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict, float]]:
    """What two processes end in that nobody disturbs, and how many seconds they take."""
    done: dict[str, tuple[dict, float]] = {}

    def run(task: str) -> tuple[dict, float]:
        if task not in done:
            two = TwoProcesses(scene, tmp_path_factory.mktemp(task), task)
            begun = time.monotonic()
            assert [process.returncode for process in two.train()] == [0, 0]
            done[task] = two.result(), time.monotonic() - begun
        return done[task]

    return run


@long
@tasks
def test_one_of_two_processes_is_killed(scene, tmp_path, undisturbed_two, tried, torture_seed, task):
    """The other one ends too, and says why; the run goes on in two processes, and would in one."""
    expected, seconds = undisturbed_two(task)
    moments = random.Random(f'two {torture_seed} {task}')
    two = TwoProcesses(scene, tmp_path / 'two', task)
    for number in range(4):
        tried()
        killed = number % 2
        meanwhile = [None, None]
        meanwhile[killed] = partial(send, signal.SIGKILL, moments.uniform(0, 0.9) * seconds)
        done = two.train(meanwhile)
        assert 'Traceback' not in ''.join(process.stdout + process.stderr for process in done)
        if done[killed].returncode == KILLED and done[1 - killed].returncode:
            assert done[1 - killed].returncode == 1
            assert 'another process of this job has ended or does not answer' in done[1 - killed].stderr
        check_files(two.folder)
        if not any(process.returncode for process in done):
            assert not differences(two.result(), expected)
            shutil.rmtree(two.folder / 'work')
    alone = copy_scene(two.folder, tmp_path / 'alone')
    assert [process.returncode for process in two.train()] == [0, 0]
    assert not differences(two.result(), expected)
    assert train(alone, task, '--resume', *two.settings).returncode == 0


@long
@tasks
def test_both_processes_are_asked_to_stop(scene, tmp_path, undisturbed_two, task):
    """As slurm asks them: within training, when something has been saved already."""
    expected, seconds = undisturbed_two(task)
    two = TwoProcesses(scene, tmp_path, task)

    def ask(process: int) -> None:
        given_up = time.monotonic() + 4 * seconds
        while time.monotonic() < given_up and not [*two.folder.glob('work/*.pth')]:
            time.sleep(0.01)
        send(signal.SIGTERM, 0, process)

    done = two.train([ask, ask])
    assert [process.returncode for process in done] == [128 + signal.SIGTERM] * 2
    for process in done:
        assert process.stderr.splitlines()[-1].endswith('1.pth is saved, --resume goes on')
    assert [process.returncode for process in two.train()] == [0, 0]
    assert not differences(two.result(), expected)


FAULTS = {
    'full disk': ([], 'File too large'),
    'killed worker': (['--cfg-options', 'train_dataloader.num_workers=1'], 'DataLoader worker'),
    'lost images': ([], 'cannot be read: No such file or directory'),
}


@pytest.mark.parametrize(
    ('task', 'fault'),
    [
        pytest.param(task, fault, marks=[] if (task, fault) == ('seg', 'full disk') else long)
        for task in CONFIGS
        for fault in FAULTS
    ],
)
def test_run_that_loses_what_it_needs(scene, tmp_path, undisturbed, task, fault):
    """It ends with one line that names the checkpoint from which it then goes on."""
    folder = copy_scene(scene, tmp_path)
    images = folder / IMAGES[task]
    images.rename(folder / 'images')
    images.symlink_to(folder / 'images')
    arguments, expected = FAULTS[fault]
    done = train(folder, task, *arguments, FAULT=fault)
    assert done.returncode == 1 and 'Traceback' not in done.stdout + done.stderr, done.stderr[-2000:]
    last_line = done.stderr.rstrip('\n').splitlines()[-1]
    saved = {'det': 'epoch_1.pth', 'seg': 'iter_4.pth'}[task]
    assert expected in last_line and last_line.endswith(saved) and '--resume goes on from' in last_line
    assert [path.name for path in folder.glob('work/*.pth')] == [saved]
    assert 'Traceback' in ''.join(path.read_text() for path in folder.glob('work/*/*.log')) or fault == 'full disk'
    check_files(folder)
    if fault == 'lost images':
        (folder / 'elsewhere').rename(folder / 'images')
    assert train(folder, task, '--resume', *arguments).returncode == 0
    if fault != 'killed worker':  # with workers no run repeats another bit by bit
        assert not differences(result(folder, task), undisturbed(task)[0])


@pytest.mark.parametrize('task', ['seg', pytest.param('det', marks=long)])
def test_changed_annotations_are_told_on_resuming(scene, tmp_path, task):
    folder = copy_scene(scene, tmp_path)
    assert train(folder, task, FAULT='kill').returncode == KILLED
    shutil.copytree(folder / 'work', folder / 'kept')
    told = 'has changed since the checkpoint was saved'
    done = train(folder, task, '--resume')
    assert done.returncode == 0 and told not in done.stdout + done.stderr
    shutil.rmtree(folder / 'work')
    (folder / 'kept').rename(folder / 'work')
    if task == 'det':
        changed = path = folder / COCO / 'annotations/instances_train2017.json'
        content = json.loads(path.read_text())
        content['annotations'][0]['bbox'][0] += 1
        path.write_text(json.dumps(content))
    else:
        changed = folder / ADE / 'annotations/training'
        path = sorted(changed.iterdir())[0]
        shutil.copyfile(sorted(changed.iterdir())[1], path)
    done = train(folder, task, '--resume')
    assert done.returncode == 0
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if told in line]
    assert str(changed.relative_to(folder)) in line
