"""Hooks for MMEngine's Runner."""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner, find_latest_checkpoint
from torch import nn

from .backbone import ReparamBackbone
from .compat.pytorch import lost_process
from .compilation import compile_networks
from .fold import fold_conv_norms
from .loading import check_outside_backbones
from .messages import one_line
from .precision import HALF, compute_in
from .reparam import plain_formulation, reparam_blocks, switch_to_deploy
from .samples import SampleError


class FusionError(RuntimeError):
    """A model cannot be fused, or its fused network does not compute the same."""


class TestOnlyHook(Hook):
    """Changes the model of a stand-alone test run; a run that trains is left alone, a test after training too."""

    trains = False

    def before_train(self, runner: Runner) -> None:
        """Note that this run trains."""
        self.trains = True

    def before_test(self, runner: Runner) -> None:
        """Change the runner's model, unless this run trains."""
        if self.trains:
            print_log(f'{type(self).__name__}: this run trains, the model stays as it is', 'current', logging.INFO)
        else:
            self._change(runner)

    @abstractmethod
    def _change(self, runner: Runner) -> None:
        """What the hook does to the runner's model."""


@HOOKS.register_module()
class FuseOnDeployHook(TestOnlyHook):
    """Fuses the model before a stand-alone test run and proves that its outputs stay the same.

    The backbone's blocks are fused, and the norms of necks and heads are folded into the convolutions before them.

    A run that trains is not touched, nor its validation, nor a test after training: fusing replaces parameters that the
    optimizer and the checkpoints refer to. An :class:`~mmengine.hooks.EMAHook` swaps its averaged parameters with the
    model's, one by one in their order, so the averaged copy is fused as well. Put it in a config as
    ``custom_hooks = [dict(type='FuseOnDeployHook')]``.

    Args:
        tolerance: Largest difference that is accepted between the feature maps of the unfused backbone, run branch by
            branch, and those of the fused one, relative to the largest absolute value in a map. The same limit holds
            for each convolution outside the backbone. Half precision is allowed 500 times as much.

    Raises:
        FusionError: before the test if the difference is larger, or if the model has nothing to fuse.
    """

    priority = 'VERY_LOW'

    def __init__(self, tolerance: float = 1e-4) -> None:
        self.tolerance = tolerance

    def _change(self, runner: Runner) -> None:
        """Fuse the runner's model and its averaged copies."""
        self._fuse(runner.model)
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                switch_to_deploy(hook.ema_model)
                fold_conv_norms(hook.ema_model.eval())

    def _fuse(self, model: nn.Module) -> None:
        count = len(reparam_blocks(model))
        backbones = [module for module in model.modules() if isinstance(module, ReparamBackbone)]
        if not backbones:
            raise FusionError('FuseOnDeployHook: the model has no backbone of repvit_mm, there is nothing to fuse')
        model.eval()
        if not count:
            print_log('FuseOnDeployHook: the backbone is fused already', 'current', logging.INFO)
            self._check(fold_conv_norms(model).difference, model)
            return
        images = [self._random_image(backbone) for backbone in backbones]
        # TensorFloat-32 would hide the differences that are measured here.
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            with plain_formulation(model):
                before = [backbone(image) for backbone, image in zip(backbones, images, strict=True)]
            switch_to_deploy(model)
            after = [backbone(image) for backbone, image in zip(backbones, images, strict=True)]
        pairs = [(a.float(), b.float()) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)]
        # Unlike Python's max, torch's keeps a NaN.
        differences = torch.stack([(a - b).abs().max() for a, b in pairs])
        sizes = torch.stack([a.abs().max() for a, _ in pairs]).clamp_min(1e-12)
        largest, relative = differences.max().item(), (differences / sizes).max().item()
        print_log(
            f'FuseOnDeployHook: fused {count} blocks; on a random input the largest output difference is '
            f'{largest:.2e}, {relative:.2e} of the largest output',
            'current',
            logging.INFO,
        )
        self._check(relative, model)
        self._check(fold_conv_norms(model).difference, model)

    def _check(self, relative: float, model: nn.Module) -> None:
        """Raise a :class:`FusionError` unless a relative difference is tolerated."""
        half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
        tolerance = self.tolerance * (500 if half else 1)
        if not relative <= tolerance:  # not a number is refused too
            raise FusionError(
                f'FuseOnDeployHook: the fused network differs by {relative:.2e} of the largest output, more than '
                f'tolerance={tolerance:.2e}: check the checkpoint for broken BatchNorm statistics'
            )

    @staticmethod
    def _random_image(backbone: ReparamBackbone) -> torch.Tensor:
        like = next(backbone.parameters())
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, 3, 64, 96, generator=generator).to(like)


@HOOKS.register_module()
class HalfPrecisionHook(TestOnlyHook):
    """Lets backbone, neck and heads compute in half precision in a stand-alone test run.

    Beside a :class:`FuseOnDeployHook` it comes second: kernels are folded in float64 before they are rounded. In a
    config: ``custom_hooks = [dict(type='HalfPrecisionHook', dtype='bfloat16')]``. See
    :func:`~repvit_mm.precision.compute_in`.

    Args:
        dtype: ``'bfloat16'``, or ``'float16'`` on an accelerator.
    """

    # Behind FuseOnDeployHook.
    priority = 'LOWEST'

    def __init__(self, dtype: str) -> None:
        self.dtype = HALF[dtype]

    def _change(self, runner: Runner) -> None:
        compute_in(runner.model.eval(), self.dtype)


@HOOKS.register_module()
class CompileHook(TestOnlyHook):
    """Lets backbone and neck run compiled by ``torch.compile`` in a stand-alone test run.

    It goes with :class:`FuseOnDeployHook` and :class:`HalfPrecisionHook`: what they leave is compiled. In a config:
    ``custom_hooks = [dict(type='CompileHook')]``. See :func:`~repvit_mm.compilation.compile_networks`.

    Raises:
        CompilerError: before the test if there is no compiler.
    """

    # Beside HalfPrecisionHook: nothing is compiled before the first image.
    priority = 'LOWEST'

    def _change(self, runner: Runner) -> None:
        compile_networks(runner.model.eval())


@HOOKS.register_module()
class WholeCheckpointHook(Hook):
    """Refuses a checkpoint that lacks one of the model's tensors or has one of another shape.

    MMEngine would warn and go on with random numbers there. That is right where training starts from the weights of
    another task, but wrong for a test. The backbones of this package check their own tensors themselves.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare it with the model.

        Raises:
            CheckpointError: if a tensor outside the backbone does not fit.
        """
        check_outside_backbones(runner.model, checkpoint, runner.cfg.get('load_from'))


class NonFiniteError(RuntimeError):
    """A loss or a weight is no longer finite; the message is one line that says where."""


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stops a run as soon as a loss is infinite or not a number, before the next checkpoint is saved.

    A checkpoint with a weight that is not finite is not saved either: a step can make one even if the loss was finite.
    So the latest checkpoint is always a good one. MMEngine's log reads every loss anyway, so the check costs nothing.

    In a config: ``custom_hooks = [dict(type='FiniteLossHook')]``; ``tools/train.py`` adds it without being asked.
    """

    # Before CheckpointHook, which is VERY_LOW.
    priority = 'NORMAL'

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        """Look at the losses of an iteration.

        Raises:
            NonFiniteError: if one of them is not finite.
        """
        for name, value in (outputs or {}).items():
            if 'loss' in name and not torch.as_tensor(value).isfinite().all():
                part = named_loss(outputs, name)
                number = torch.as_tensor(outputs[part]).float().mean().item()
                raise NonFiniteError(
                    f'iteration {runner.iter + 1}: {part} is {number}, on {images_of(data_batch)}; '
                    f'{last_checkpoint(runner)}. Look at these images with tools/check_data.py, lower the learning '
                    'rate or clip gradients; --keep-going trains on'
                )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Look at the weights that are to be saved.

        Raises:
            NonFiniteError: if one of them is not finite.
        """
        for name, tensor in checkpoint['state_dict'].items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise NonFiniteError(
                    f'iteration {runner.iter + 1}: the weights are no longer finite ({name} first), no checkpoint is '
                    f'saved; {last_checkpoint(runner)}. Lower the learning rate or clip gradients; --keep-going trains '
                    'on'
                )


class BatchError(RuntimeError):
    """A training step failed; the message is one line that names its images."""


@HOOKS.register_module()
class NamedBatchHook(Hook):
    """Names the images of a batch on which a training step fails, and the label maps whose labels are no classes.

    On a GPU a label that is no class says no more than "device-side assert triggered".

    In a config: ``custom_hooks = [dict(type='NamedBatchHook')]``; ``tools/train.py`` adds it without being asked.
    """

    def before_train(self, runner: Runner) -> None:
        """Let what a step raises be told with its batch."""
        self.compiled_step = vars(runner.model).get('train_step')
        step = runner.model.train_step

        def train_step(data: Any, optim_wrapper: OptimWrapper) -> Any:
            try:
                return step(data, optim_wrapper)
            except Exception as error:  # whatever a model raises
                if lost_process(error):
                    raise
                raise explained(error, data, runner) from error

        runner.model.train_step = train_step

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        del runner.model.train_step
        if self.compiled_step:
            runner.model.train_step = self.compiled_step


def explained(error: Exception, data_batch: Any, runner: Runner) -> BatchError | SampleError:
    """What to say of a training step that failed."""
    for module in runner.model.modules():
        if not (hasattr(module, 'num_classes') and hasattr(module, 'ignore_index')):  # no head of a segmentor
            continue
        for sample in samples_of(data_batch):
            labels = getattr(getattr(sample, 'gt_sem_seg', None), 'data', None)
            if labels is None:
                continue
            wrong = labels[(labels >= module.num_classes) & (labels != module.ignore_index)]
            if len(wrong):
                return SampleError(
                    f'iteration {runner.iter + 1}: label {wrong[0]} in {sample.seg_map_path} of {sample.img_path} is '
                    f'no class, expected 0 to {module.num_classes - 1}, or {module.ignore_index} where nothing is '
                    f'learned: {one_line(error)}'
                )
    return BatchError(f'iteration {runner.iter + 1}: {one_line(error)}, on {images_of(data_batch)}')


def named_loss(outputs: Mapping[str, Any], name: str) -> str:
    """The part of a loss that is not finite, where the sum comes first."""
    parts = [
        part
        for part, value in outputs.items()
        if 'loss' in part and part != 'loss' and not torch.as_tensor(value).isfinite().all()
    ]
    return parts[0] if name == 'loss' and parts else name


def samples_of(data_batch: Any) -> Sequence[Any]:
    """What a batch says of its images; MMYOLO's batches keep boxes and labels only, in a dictionary."""
    found = data_batch.get('data_samples', ()) if isinstance(data_batch, Mapping) else ()
    return () if isinstance(found, Mapping) else found


def images_of(data_batch: Any, most: int = 8) -> str:
    """The files of a batch."""
    paths = [
        str(getattr(sample, 'img_path', None) or getattr(sample, 'img_id', '?')) for sample in samples_of(data_batch)
    ]
    if not paths:
        return 'a batch that does not name its images'
    return ', '.join(paths[:most]) + (f' and {len(paths) - most} more' if len(paths) > most else '')


def last_checkpoint(runner: Runner) -> str:
    """Which checkpoint a run leaves behind."""
    latest = find_latest_checkpoint(runner.work_dir)
    return f'the last good checkpoint is {Path(latest)}' if latest else 'no checkpoint was saved before'
