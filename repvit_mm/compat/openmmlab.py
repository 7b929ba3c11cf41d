"""Uses of private parts of MMEngine, with the reason for each. Tried with mmengine 0.10.7.

Three classes of MMEngine have one long method, of which one step has to be done in another way. Their subclasses here
rewrite that method, so that the step becomes a public method that further subclasses can override.
"""

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mmengine.config.config
import mmengine.runner.checkpoint
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.dataset import BaseDataset
from mmengine.dist import is_main_process
from mmengine.fileio import join_path
from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from .._versions import FRAMEWORKS, is_between
from ..files import write_whole


def offer_configs(package: str, module: str) -> None:
    """Let configs inherit from a package's: ``_base_ = '<package>::...'``.

    MMEngine has a fixed table of packages and the names of their distributions. It looks for configs among the files of
    the distribution, which an editable install does not have. By the name of a module it finds the package itself;
    before 0.8 it takes names of distributions only, and is told where the package is.
    """
    if is_between(mmengine.__version__, '0.8.0', '99'):
        MODULE2PACKAGE.setdefault(package, module)
        return
    MODULE2PACKAGE.setdefault(package, package)
    (place,), config = find_spec(package).submodule_search_locations, mmengine.config.config
    find = config.get_installed_path
    config.get_installed_path = wraps(find)(lambda name: place if name == package else find(name))


def offer_configs_of_forks() -> None:
    """Let configs inherit from ``mmseg::...`` where MMSegmentation is the maintained fork.

    MMEngine's fork still looks for OpenMMLab's distributions, not for the forks. Seen with onedl-mmengine 0.10.12.
    """
    for module in FRAMEWORKS.keys() & MODULE2PACKAGE.keys():
        try:
            metadata.version(MODULE2PACKAGE[module])
        except metadata.PackageNotFoundError:
            if find_spec(module):
                MODULE2PACKAGE[module] = module


def build_inherited_collate_functions() -> None:
    """Let a data loader take a function that collates from another library's base, as MMYOLO's configs have it.

    MMEngine adds ``_scope_`` to what a config inherits from a package, and then hands it to this function as an option,
    which the function does not know. Seen with mmengine 0.7.4 and 0.10.7.
    """
    build = Runner.build_dataloader

    @wraps(build)
    def build_dataloader(dataloader: DataLoader | dict, *arguments: Any, **options: Any) -> DataLoader:
        collate = dataloader.get('collate_fn') if isinstance(dataloader, dict) else None
        if isinstance(collate, dict):
            known = {name: value for name, value in collate.items() if name != '_scope_'}
            dataloader = {**dataloader, 'collate_fn': known}
        return build(dataloader, *arguments, **options)

    Runner.build_dataloader = staticmethod(build_dataloader)


def replace_reader_of_addresses(reader: Callable) -> None:
    """Replace MMEngine's ``load_from_http``.

    The registered readers of ``torchvision://``, ``open-mmlab://``, ``mmcls://`` and the like call it by this name.
    """
    mmengine.runner.checkpoint.load_from_http = reader


def watch_samples(explain: Callable[[Any, Exception], Exception], check: Callable[[Any], None]) -> None:
    """Look at each sample that a data set of MMEngine hands out, in every process that is forked from this one.

    An exception of a pipeline often does not name the file, and a data set has no hook that could add the name.

    Args:
        explain: Takes the data set's information on a sample and the exception of its pipeline; returns the exception
            to raise.
        check: Called with each sample.
    """
    if hasattr(BaseDataset.prepare_data, '__wrapped__'):
        return  # done already

    @wraps(BaseDataset.prepare_data)
    def prepare_data(self: BaseDataset, index: int) -> Any:
        try:
            sample = prepare_data.__wrapped__(self, index)
        except Exception as error:  # a pipeline may raise anything
            raise explain(self.get_data_info(index), error) from error
        check(sample)
        return sample

    BaseDataset.prepare_data = prepare_data


def iterator_within(batches: Iterator, dataloader: DataLoader) -> Iterator:
    """Torch's iterator inside the endless iterator of an iteration-based loop, which gives no access to it.

    An iterator that is torch's own is returned as it is.
    """
    if not hasattr(batches, '_iterator'):
        return batches
    if batches._iterator is None:  # the forks of MMEngine create it later
        batches._iterator = iter(dataloader)
    return batches._iterator


def may_normalize(preprocessor: object) -> bool:
    """Whether this is a data preprocessor for images. MMEngine's plain ``BaseDataPreprocessor`` is not."""
    return hasattr(preprocessor, '_enable_normalize')


def normalizes(preprocessor: nn.Module) -> bool:
    """Whether a data preprocessor normalizes images, which MMEngine and its libraries keep in a private attribute."""
    return getattr(preprocessor, '_enable_normalize', False)


def reverses_channels(preprocessor: nn.Module) -> bool:
    """Whether a data preprocessor turns BGR images into RGB, which MMDetection's keeps in a private attribute."""
    names = ('channel_conversion', 'to_rgb', '_channel_conversion')  # MMSegmentation's, MMPretrain's, MMDetection's
    return next((bool(getattr(preprocessor, name)) for name in names if hasattr(preprocessor, name)), False)


def save_to_resume_from(runner: Runner, folder: str, filename: str, **options: Any) -> str:
    """Save a checkpoint, and then let ``last_checkpoint`` name it; returns its path.

    Args:
        runner: The runner.
        folder: Where to, on the local disk or elsewhere.
        filename: The checkpoint's name.
        options: As for ``Runner.save_checkpoint``.
    """
    runner.save_checkpoint(folder, filename, **options)
    path = join_path(folder, filename, backend_args=options.get('backend_args'))
    if is_main_process():
        write_whole(Path(runner.work_dir, 'last_checkpoint'), path.encode())
    return path


class SavingBeforeRemovingHook(CheckpointHook):
    """MMEngine's hook, which may be killed at any moment without losing the last checkpoint.

    MMEngine removes outdated checkpoints before it saves the next one, in two private methods. Here the checkpoint is
    saved first, then ``last_checkpoint`` is written, whole or not at all, and outdated checkpoints are removed last.
    """

    def before_save(self, runner: Runner) -> None:
        """Called in every process before a checkpoint to resume from is saved; not before a best checkpoint."""

    def after_save(self, runner: Runner) -> None:
        """Called in every process once a checkpoint to resume from is saved."""

    def remove(self, path: str) -> bool:
        """Remove a checkpoint, a folder if DeepSpeed wrote it; returns whether it was there."""
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):
            self.file_backend.rmtree(path)
        else:
            return False
        return True

    def save(self, runner: Runner, filename: str, meta: dict) -> str:
        """Save a checkpoint to resume from, and let ``last_checkpoint`` name it; returns its path."""
        self.before_save(runner)
        path = save_to_resume_from(
            runner,
            self.out_dir,
            filename,
            file_client_args=self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        self.after_save(runner)
        return path

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        kept = []
        if self.max_keep_ckpts > 0:
            # The checkpoint also names the file that is to be removed. If the run is killed before it has removed the
            # file, it does so when it is resumed.
            kept = [*(other for other in self.keep_ckpt_ids if other != step), step]
            runner.message_hub.update_info('keep_ckpt_ids', kept)
        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)

        self.save(runner, filename, meta)
        if is_main_process():
            for outdated in kept[: -self.max_keep_ckpts]:
                self.remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(outdated)))
        if kept:
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Let MMEngine save the best checkpoint without knowing the previous one, which it would remove first."""
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
            elif path and path != paths[name] and is_main_process() and self.remove(path):
                runner.logger.info(f'The previous best checkpoint {path} is removed')


class SkippingEpochBasedTrainLoop(EpochBasedTrainLoop):
    """MMEngine's loop, which can also resume within an epoch. MMEngine's own repeats the whole epoch."""

    @abstractmethod
    def skip_trained_data(self, batches: Iterator, steps: int) -> None:
        """Called as a resumed run goes on within an epoch: pass over as many batches of its data."""

    def run_epoch(self) -> None:
        """Run an epoch, or what is left of it."""
        length = len(self.dataloader)
        done = self.trained_batches(length)
        # A checkpoint holds the message hub. Lengths change with the number of processes and the batch size.
        self.runner.message_hub.update_info('epoch_begun', [self.epoch, self.iter - done, length])
        if not done:
            return super().run_epoch()
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        batches = iter(self.dataloader)
        self.skip_trained_data(batches, done)
        for index, batch in enumerate(batches, start=done):
            self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def trained_batches(self, length: int) -> int:
        """How many batches of the coming epoch, which has ``length``, a run has trained on before it was resumed."""
        epoch, begun, former_length = self.runner.message_hub.runtime_info.get('epoch_begun', [None, 0, 1])
        return (self.iter - begun) * length // former_length if epoch == self.epoch else 0


class SkippingIterBasedTrainLoop(IterBasedTrainLoop):
    """MMEngine's loop, in which passing over the data that was trained on is a method.

    MMEngine does it inside ``run``, by making each batch; its forks do it in another way.
    """

    @abstractmethod
    def skip_trained_data(self) -> None:
        """Called as a resumed run begins: after it ``dataloader_iterator`` gives what follows ``iter`` batches."""

    def run(self) -> nn.Module:
        """Train; returns the model."""
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        if self.iter > 0:
            self.skip_trained_data()
        while self.iter < self.max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._decide_current_val_interval()
            validate = self.iter % self.val_interval == 0 or self.iter == self.max_iters
            if self.runner.val_loop is not None and self.iter >= self.val_begin and validate:
                self.runner.val_loop.run()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model
