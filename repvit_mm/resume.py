"""Runs that may be killed at any moment: whole checkpoints, and a resumed run that repeats one never stopped."""

import os
import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

UNFINISHED = '.repvit_mm-unfinished'
"""What the name of a file ends with while it is written."""


def random_state() -> dict[str, Any]:
    """The states of all generators that training draws from: Python's, NumPy's, torch's and each CUDA device's."""
    return dict(
        python=random.getstate(),
        numpy=np.random.get_state(),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all(),
    )


def set_random_state(state: dict[str, Any]) -> None:
    """Set the generators to what :func:`random_state` returned; CUDA devices that are not here are passed over."""
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    # A resuming runner has read the checkpoint's tensors onto its device; generators want them on the CPU.
    torch.set_rng_state(state['torch'].cpu())
    torch.cuda.set_rng_state_all([device.cpu() for device in state['cuda'][: torch.cuda.device_count()]])


def fast_forward(batches: Iterator, dataloader: DataLoader, steps: int) -> None:
    """Pass over batches of MMEngine's endless iterator by drawing their indices alone.

    Args:
        batches: The iterator of an iteration-based loop, fresh.
        dataloader: What it iterates over.
        steps: How many batches to pass over.
    """
    if batches._iterator is None:  # the forks of MMEngine make it late
        batches._iterator = iter(dataloader)
    # Worker processes have been handed the indices of the first batches already: as many come out before others do.
    begun = min(steps, dataloader.num_workers * (dataloader.prefetch_factor or 0))
    for _ in range(steps - begun):
        try:
            batches._iterator._next_index()
        except StopIteration:  # the end of an epoch: the first batch of the next
            next(batches)
    for _ in range(begun):
        next(batches)


@register_backend('atomic_local')
class AtomicLocalBackend(LocalBackend):
    """MMEngine's access to the local disk, where a file that is put is there whole or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write beside the file, flush to the disk, rename."""
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + UNFINISHED)
        with unfinished.open('wb') as file:
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


@HOOKS.register_module()
class ResumableCheckpointHook(CheckpointHook):
    """MMEngine's hook, safe against being killed at any moment; all options are as there.

    On the local disk (unless through the deprecated ``file_client_args``) checkpoints are written beside, flushed and
    renamed. ``last_checkpoint`` follows the checkpoint in the same way, and only then are outdated files removed. What
    a killed run left unfinished is removed as the next one in the folder begins.

    The states of the random number generators ride in a checkpoint's ``random_state``, a list with an item for each
    process. Validation leaves the generators as it found them: a resumed run does not repeat the validation that
    followed its checkpoint. With a seed and without worker processes, a resumed run thus repeats one that was never
    stopped, bit by bit: from an epoch's end in MMEngine's ``EpochBasedTrainLoop``, from any iteration in
    :class:`ResumableIterBasedTrainLoop`.
    """

    resumed_state: dict[str, Any] | None = None
    training_state: dict[str, Any] | None = None
    saved_states: list[dict[str, Any]] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take this process's random state out of the checkpoint to resume from."""
        if not runner._resume:
            return
        states = checkpoint.get('random_state', [])
        if len(states) == get_world_size():
            self.resumed_state = states[get_rank()]
        else:
            runner.logger.warning(
                f'The checkpoint holds the random states of {len(states)} processes, this run has {get_world_size()}: '
                'it goes on with other random numbers than a run that was never stopped'
            )

    def before_train(self, runner: Runner) -> None:
        """As MMEngine's; then clear away what a killed run left, and restore the random state."""
        super().before_train(runner)
        if isinstance(self.file_backend, LocalBackend):
            self.backend_args = dict(backend='atomic_local')
        if is_main_process():
            for folder in {runner.work_dir, self.out_dir}:
                for unfinished in Path(folder).glob(f'*{UNFINISHED}'):
                    unfinished.unlink()
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop) and loop.iter and not isinstance(loop, ResumableIterBasedTrainLoop):
            runner.logger.warning(
                f'{type(loop).__name__} runs the data pipeline for each iteration that it skips and goes on with other '
                "random numbers; set train_cfg.type='ResumableIterBasedTrainLoop'"
            )
        self.after_fast_forward(runner)

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

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the random states, unless it is a best checkpoint, which is not for resuming."""
        if self.saved_states is not None:
            checkpoint['random_state'] = self.saved_states

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """As MMEngine's, with another order: the checkpoint, ``last_checkpoint``, the removal of outdated files."""
        kept = []
        if self.max_keep_ckpts > 0:
            # The file to remove is named in the checkpoint: a run killed before it is gone removes it as it resumes.
            kept = [*(other for other in self.keep_ckpt_ids if other != step), step]
            runner.message_hub.update_info('keep_ckpt_ids', kept)
        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)

        self.saved_states = all_gather_object(self.training_state or random_state())
        runner.save_checkpoint(
            self.out_dir,
            filename,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self.saved_states = None
        if is_main_process():
            AtomicLocalBackend().put(self.last_ckpt.encode(), Path(runner.work_dir, 'last_checkpoint'))
            for outdated in kept[: -self.max_keep_ckpts]:
                self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(outdated)))
        if kept:
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """As MMEngine's, with the previous best file removed last: MMEngine removes those that it knows of first."""
        if not self.save_best:
            return
        several = len(self.key_indicators) > 1
        paths = self.best_ckpt_path_dict if several else vars(self)
        names = self.key_indicators if several else ['best_ckpt_path']
        previous = {name: paths[name] for name in names}
        paths.update(dict.fromkeys(names))
        super()._save_best_checkpoint(runner, metrics)
        for name, path in previous.items():
            if paths[name] is None:
                paths[name] = path
            elif path and path != paths[name] and is_main_process() and self._remove(path):
                runner.logger.info(f'The previous best checkpoint {path} is removed')

    def _remove(self, path: str) -> bool:
        """Remove a checkpoint, a folder if DeepSpeed wrote it; returns whether it was there."""
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):
            self.file_backend.rmtree(path)
        else:
            return False
        return True


@LOOPS.register_module()
class ResumableIterBasedTrainLoop(IterBasedTrainLoop):
    """MMEngine's loop, which resumes at once: the data that was trained on is passed over by its indices alone.

    Then, before the first batch is made, the method ``after_fast_forward`` of each hook that has one is called.
    """

    def run(self) -> nn.Module:
        """Train; returns the model."""
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        if self._iter > 0:
            fast_forward(self.dataloader_iterator, self.dataloader, self._iter)
            self.runner.call_hook('after_fast_forward')
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._decide_current_val_interval()
            validate = self._iter % self.val_interval == 0 or self._iter == self._max_iters
            if self.runner.val_loop is not None and self._iter >= self.val_begin and validate:
                self.runner.val_loop.run()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model
