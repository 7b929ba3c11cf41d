"""Runs that may be killed at any moment: whole checkpoints, and resumed runs that end as if never stopped."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from .compat.openmmlab import (
    SavingBeforeRemovingHook,
    SkippingEpochBasedTrainLoop,
    SkippingIterBasedTrainLoop,
    iterator_within,
    save_to_resume_from,
)
from .compat.pytorch import draw_indices
from .files import UNFINISHED, claim, release, write_whole
from .fingerprint import changed, fingerprints


def random_state() -> dict[str, Any]:
    """The states of all generators that training draws from: Python's, NumPy's, torch's and each CUDA device's."""
    return dict(
        python=random.getstate(),
        numpy=np.random.get_state(),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all(),
    )


def set_random_state(state: dict[str, Any]) -> None:
    """Set the generators to what :func:`random_state` returned; CUDA devices that are missing here are skipped."""
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    # A resuming runner reads a checkpoint's tensors onto its device; generators need them on the CPU.
    torch.set_rng_state(state['torch'].cpu())
    torch.cuda.set_rng_state_all([device.cpu() for device in state['cuda'][: torch.cuda.device_count()]])


def fast_forward(batches: Iterator, dataloader: DataLoader, steps: int) -> None:
    """Skip batches by drawing only their indices.

    Args:
        batches: A fresh iterator over the data loader: torch's, or MMEngine's endless one of an iteration-based loop.
        dataloader: What it iterates over.
        steps: How many batches to skip.
    """
    # Worker processes already have the indices of the first batches: as many batches come out before any others.
    begun = min(steps, dataloader.num_workers * (dataloader.prefetch_factor or 0))
    for _ in range(steps - begun):
        try:
            draw_indices(iterator_within(batches, dataloader))
        except StopIteration:  # the end of an epoch: the first batch of the next
            next(batches)
    for _ in range(begun):
        next(batches)


@register_backend('atomic_local')
class AtomicLocalBackend(LocalBackend):
    """MMEngine's access to the local disk, which writes a file whole or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write beside the file, flush to the disk, rename."""
        write_whole(Path(filepath), obj)


class OptimizerError(RuntimeError):
    """A checkpoint's settings are another optimizer's; the message is one line that says what to do."""


class FolderInUseError(RuntimeError):
    """Two runs would overwrite each other's checkpoints; the message is one line that names the folder."""


@HOOKS.register_module()
class ResumableCheckpointHook(SavingBeforeRemovingHook):
    """MMEngine's ``CheckpointHook`` with the same options, safe against being killed at any moment.

    On the local disk a checkpoint is written under another name, flushed and renamed (not with the deprecated
    ``file_client_args``). Then ``last_checkpoint`` is written in the same way, and only then are outdated files
    removed. Unfinished files of a killed run are removed when the next run in the folder begins. A second run in the
    folder of one that still trains is refused.

    A checkpoint's ``meta`` holds a fingerprint of the annotations. A resumed run says if they are others now.

    A checkpoint's ``random_state`` holds the states of the random number generators, a list with an item for each
    process. Validation does not change the generators, because a resumed run does not repeat the validation that
    followed its checkpoint. So with a seed and without worker processes, a resumed run repeats one that was never
    stopped, bit by bit: from the end of an epoch in MMEngine's ``EpochBasedTrainLoop``, from any iteration in
    :class:`ResumableEpochBasedTrainLoop` and :class:`ResumableIterBasedTrainLoop`.
    """

    annotations: dict[str, str] | None = None
    loaded_annotations: dict[str, str] | None = None
    loaded_states: Sequence[dict[str, Any]] = ()
    resumed_state: dict[str, Any] | None = None
    training_state: dict[str, Any] | None = None
    saved_states: list[dict[str, Any]] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Remember what a checkpoint says of its run; whether this run resumes from it is not known yet."""
        self.loaded_annotations = checkpoint.get('meta', {}).get('annotations')
        self.loaded_states = checkpoint.get('random_state', ())

    def before_train(self, runner: Runner) -> None:
        """Do as MMEngine does; then remove what a killed run left, and restore the random state."""
        super().before_train(runner)
        if isinstance(self.file_backend, LocalBackend):
            self.backend_args = dict(backend='atomic_local')
        if is_main_process():
            self.claim_folder(runner)
            for folder in {runner.work_dir, self.out_dir}:
                for unfinished in Path(folder).glob(f'*{UNFINISHED}'):
                    unfinished.unlink()
            self.check_annotations(runner)
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop) and loop.iter and not isinstance(loop, ResumableIterBasedTrainLoop):
            runner.logger.warning(
                f'{type(loop).__name__} runs the data pipeline for each iteration that it skips and goes on with other '
                "random numbers; set train_cfg.type='ResumableIterBasedTrainLoop'"
            )
        if runner.iter > 0:
            self.check_optimizer(runner)
            self.choose_state(runner)
        self.after_fast_forward(runner)

    def check_optimizer(self, runner: Runner) -> None:
        """Make sure that the checkpoint was saved with the optimizer that the run goes on with.

        Raises:
            OptimizerError: if its settings, which a resumed run takes, lack what this optimizer needs.
        """
        wrapper = runner.optim_wrapper
        for part in wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]:
            optimizer = part.optimizer
            if not isinstance(optimizer, Optimizer):  # DeepSpeed's and the like check for themselves
                continue
            if missing := sorted(optimizer.defaults.keys() - optimizer.param_groups[0].keys()):
                raise OptimizerError(
                    f'the checkpoint is of a run with another optimizer: it has no {", ".join(missing)} for '
                    f"{type(optimizer).__name__}; resume with that run's optimizer, or start from the weights with "
                    'load_from and without resume'
                )

    def claim_folder(self, runner: Runner) -> None:
        """Make sure that no other run writes checkpoints into the work folder.

        Raises:
            FolderInUseError: if one does.
        """
        try:
            claim(Path(runner.work_dir))
        except BlockingIOError:
            raise FolderInUseError(
                f'another run writes into {runner.work_dir}: wait until it has ended, or take another work_dir'
            ) from None

    def after_train(self, runner: Runner) -> None:
        """Let go of the work folder."""
        super().after_train(runner)
        if is_main_process():
            release(Path(runner.work_dir))

    def check_annotations(self, runner: Runner) -> None:
        """Remember what the annotations are, and say if a resumed run has begun with others."""
        dataloader = getattr(runner.train_loop, 'dataloader', None)
        self.annotations = fingerprints(getattr(dataloader, 'dataset', None))
        if runner.iter > 0 and self.loaded_annotations is not None:
            for path in changed(self.loaded_annotations, self.annotations):
                runner.logger.warning(
                    f'{path} has changed since the checkpoint was saved: the run goes on with what it holds now, and '
                    'ends in other weights than a run that was never stopped'
                )

    def choose_state(self, runner: Runner) -> None:
        """Find this process's random state in the checkpoint that the run resumes from."""
        if len(self.loaded_states) == get_world_size():
            self.resumed_state = self.loaded_states[get_rank()]
        else:
            runner.logger.warning(
                f'The checkpoint holds the random states of {len(self.loaded_states)} processes, this run has '
                f'{get_world_size()}: it goes on with other random numbers than a run that was never stopped'
            )

    def after_fast_forward(self, runner: Runner) -> None:
        """Restore the random state of a resumed run."""
        if self.resumed_state is not None:
            set_random_state(self.resumed_state)

    def before_val(self, runner: Runner) -> None:
        """Remember training's random state."""
        self.training_state = random_state()

    def after_val(self, runner: Runner) -> None:
        """Give training its random state back."""
        set_random_state(self.training_state)
        self.training_state = None

    def before_save(self, runner: Runner) -> None:
        """Gather the random states of all processes."""
        self.saved_states = all_gather_object(self.training_state or random_state())

    def after_save(self, runner: Runner) -> None:
        """Add no random state to a best checkpoint: it is not for resuming."""
        self.saved_states = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the random states and the fingerprint."""
        if self.saved_states is not None:
            checkpoint['random_state'] = self.saved_states
            checkpoint['meta']['annotations'] = self.annotations


@LOOPS.register_module()
class ResumableIterBasedTrainLoop(SkippingIterBasedTrainLoop):
    """MMEngine's loop, which resumes at once: it skips the data that was trained on by drawing only its indices.

    Then, before the first batch is made, it calls the method ``after_fast_forward`` of each hook that has one.
    """

    def skip_trained_data(self) -> None:
        """Pass over it by its indices, and tell the hooks."""
        fast_forward(self.dataloader_iterator, self.dataloader, self.iter)
        self.runner.call_hook('after_fast_forward')


@LOOPS.register_module()
class ResumableEpochBasedTrainLoop(SkippingEpochBasedTrainLoop):
    """MMEngine's loop, which also resumes within an epoch, where a run that was asked to stop has ended.

    Before the first batch is made, it calls the method ``after_fast_forward`` of each hook that has one.
    """

    def skip_trained_data(self, batches: Iterator, steps: int) -> None:
        """Pass over it by its indices, and tell the hooks."""
        fast_forward(batches, self.dataloader, steps)
        self.runner.call_hook('after_fast_forward')


RESUMABLE = {
    'EpochBasedTrainLoop': 'ResumableEpochBasedTrainLoop',
    'IterBasedTrainLoop': 'ResumableIterBasedTrainLoop',
    'CheckpointHook': 'ResumableCheckpointHook',
}
"""What MMEngine has -> what takes the same options and may be killed at any moment."""


def make_resumable(cfg: Config) -> None:
    """Put this file's loop and checkpoint hook into a config, unless it has others than MMEngine's own."""
    loop = cfg.train_cfg
    by_epoch = {True: 'EpochBasedTrainLoop', False: 'IterBasedTrainLoop'}.get(loop.get('by_epoch'))
    if (name := loop.get('type', by_epoch)) in RESUMABLE:
        loop.pop('by_epoch', None)
        loop['type'] = RESUMABLE[name]
    hooks = cfg.get('default_hooks') or {}
    hook = hooks.get('checkpoint', dict(type='CheckpointHook'))  # None is no hook
    if hook and hook.get('type') in RESUMABLE:
        cfg.default_hooks = dict(hooks, checkpoint=dict(hook, type=RESUMABLE[hook['type']]))


class Stopped(RuntimeError):
    """A run was asked to stop; the message is one line that says where it can go on.

    Args:
        signum: The signal that asked.
        message: The line.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


@HOOKS.register_module()
class StopOnSignalHook(Hook):
    """Ends a run that is asked to stop, by SIGTERM or Ctrl-C, with a checkpoint of the iteration that it is in.

    Slurm sends SIGTERM before it kills. With the loops of this file a resumed run repeats one that was never stopped.
    The processes of a job agree every ten iterations on whether one of them was asked to stop.

    Args:
        patience: Seconds within which a further signal is taken for the same request. A later one ends the process at
            once, as it would without this hook.
    """

    priority = 'LOWEST'  # when everything else of the iteration is done
    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, patience: float = 2.0) -> None:
        self.patience = patience
        self.asked: int | None = None
        self.asked_at = 0.0
        self.saved_at: int | None = None
        self.validating = False
        self.before: dict[int, Any] = {}

    def before_train(self, runner: Runner) -> None:
        """Take over the signals, which only the main thread of a process may do."""
        if threading.current_thread() is threading.main_thread():
            self.process = os.getpid()
            self.before = {signum: signal.signal(signum, self.note) for signum in self.signals}

    def after_train(self, runner: Runner) -> None:
        """Give the signals back."""
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        self.before = {}

    def note(self, signum: int, _: Any) -> None:
        """Remember the signal."""
        if os.getpid() != self.process:  # a data loader's worker, which inherits the handler
            return
        if self.asked is None:
            self.asked, self.asked_at = signum, time.monotonic()
            # Workers that were ended by the same signal must not disturb the iteration, which has its batch.
            self.before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
            print_log(f'{signal.Signals(signum).name}: stopping after this iteration', 'current')
        elif time.monotonic() - self.asked_at > self.patience:
            signal.signal(signum, self.before[signum])
            os.kill(self.process, signum)

    def is_asked(self, iteration: int) -> bool:
        """Whether any process of the job was asked to stop."""
        if get_world_size() == 1:
            return self.asked is not None
        if iteration % 10:
            return False
        self.asked = next((asked for asked in all_gather_object(self.asked) if asked is not None), None)
        return self.asked is not None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Remember of which iteration there is a checkpoint; one that a validation saves is not for resuming."""
        if not self.validating:
            self.saved_at = checkpoint['meta']['iter']

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Save and stop, if asked."""
        if self.is_asked(runner.iter):
            self.stop(runner, runner.iter + 1)

    def before_val(self, runner: Runner) -> None:
        """Note that a validation begins."""
        self.validating = True

    def after_val_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Stop if asked and if a checkpoint was saved before this validation; the weights may be averages by now."""
        if self.before and get_world_size() == 1 and self.asked is not None and self.saved_at == runner.iter:
            self.stop(runner, runner.iter)

    def after_val(self, runner: Runner) -> None:
        """Save and stop, if asked."""
        self.validating = False
        if self.before and self.is_asked(0):
            self.stop(runner, runner.iter)

    def stop(self, runner: Runner, iteration: int) -> None:
        """Save, unless that was done already, and end the run.

        Args:
            runner: The runner.
            iteration: How many iterations it has done.

        Raises:
            Stopped: always.
        """
        try:
            if self.saved_at == iteration:
                path = runner.message_hub.get_info('last_ckpt')
            else:
                path = self.save(runner, f'stopped_iter_{iteration}.pth', dict(epoch=runner.epoch, iter=iteration))
        finally:
            # Not earlier: MMEngine asks git for its commit as it saves. When that process ends, torch would raise for
            # the workers that the same signal ended.
            self.after_train(runner)
        loop = runner.train_loop
        by_iteration = isinstance(loop, IterBasedTrainLoop)
        complete = iteration >= loop.max_iters if by_iteration else loop.epoch >= loop.max_epochs
        raise Stopped(
            self.asked,
            f'{signal.Signals(self.asked).name}: stopped after iteration {iteration}; {path} is saved, '
            + ('training is complete' if complete else '--resume goes on'),
        )

    def save(self, runner: Runner, filename: str, meta: dict) -> str:
        """Save a checkpoint, by the run's own hook if that writes files whole; returns its path."""
        for hook in runner.hooks:
            if isinstance(hook, ResumableCheckpointHook):
                return hook.save(runner, filename, meta)
        backend_args = dict(backend='atomic_local')
        return save_to_resume_from(runner, runner.work_dir, filename, meta=meta, backend_args=backend_args)
