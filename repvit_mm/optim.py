"""Learning rates for fine-tuning, and mixed precision on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from torch import nn

from .backbone import ReparamBackbone
from .precision import lowered


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class StageDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor with learning rates that fall from stage to stage towards the image.

    The last stage of the backbone learns at ``stage_decay`` times the learning rate, the one before it at
    ``stage_decay`` squared, and so on to the stem; necks and heads learn at the full rate. This is ELECTRA's
    layer-wise decay (https://arxiv.org/abs/2003.10555) by stages, as ConvNeXt uses it for fine-tuning
    (https://arxiv.org/abs/2201.03545). In a config::

        optim_wrapper = dict(
            constructor='StageDecayOptimWrapperConstructor',
            paramwise_cfg=dict(stage_decay=0.7, norm_decay_mult=0.0, bias_decay_mult=0.0),
        )

    Every other option of ``paramwise_cfg`` is MMEngine's and is applied first.

    Raises:
        ValueError: if ``stage_decay`` is not above 0 and at most 1, or the model has no backbone of this package.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer."""
        decay = self.paramwise_cfg.get('stage_decay', 1.0)
        if not 0 < decay <= 1:
            raise ValueError(f'paramwise_cfg.stage_decay is {decay}: expected a number above 0 and at most 1')
        factors = {
            id(parameter): decay**distance
            for backbone in model.modules()
            if isinstance(backbone, ReparamBackbone)
            for distance, part in enumerate([*reversed(backbone.stages), backbone.stem], 1)
            for parameter in part.parameters()
        }
        if not factors:
            raise ValueError('StageDecayOptimWrapperConstructor: the model has no backbone of repvit_mm')
        optim_wrapper = super().__call__(model)
        # With paramwise_cfg MMEngine makes one group for each parameter.
        for group in optim_wrapper.optimizer.param_groups:
            group['lr'] *= factors.get(id(group['params'][0]), 1.0)
        return optim_wrapper


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """Mixed precision on a CPU: backbone and neck compute in bfloat16, which needs no scaling of the loss.

    MMEngine's wrapper is for accelerators alone. Heads get float32 maps: mmcv's operators take no bfloat16 on a CPU.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """MMEngine runs a model's forward pass within it."""
        network = model.module if is_model_wrapper(model) else model
        extract_feat = lowered(network.extract_feat, 'cpu', torch.bfloat16)
        with super().optim_context(model), mock.patch.object(network, 'extract_feat', extract_feat):
            yield
