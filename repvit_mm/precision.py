"""Whole models that compute in half precision where they are evaluated."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine.utils import apply_to
from torch import Tensor, nn

from .compat.pytorch import gpu_multiplies_bfloat16, multiplies_bfloat16
from .reparam import reparam_blocks

HALF = {'bfloat16': torch.bfloat16, 'float16': torch.float16}
"""Name -> dtype of half the size of float32."""


class PrecisionError(ValueError):
    """A device does not compute in a dtype; the message is one line that says what to do."""


def check_dtype(dtype: str, device: str) -> str:
    """Check that a device computes in a dtype.

    Args:
        dtype: A name in ``HALF``.
        device: A device type, as ``mmengine.device.get_device`` gives it.

    Returns:
        A warning in one line if the dtype is slow there, else an empty text.

    Raises:
        PrecisionError: for float16 on a CPU, which takes several times as long as float32.
    """
    if device == 'cpu':
        if dtype == 'float16':
            raise PrecisionError('float16 is for accelerators, a CPU takes several times as long: take bfloat16')
        if not multiplies_bfloat16():
            return 'this processor has neither AVX512-BF16 nor AMX: bfloat16 is slower than float32 on it'
    elif device == 'cuda' and dtype == 'bfloat16' and not gpu_multiplies_bfloat16():
        return 'this GPU does not multiply bfloat16: float16 is faster on it'
    return ''


def lowered(function: Callable[..., Any], device: str, dtype: torch.dtype, keep: bool = False) -> Callable[..., Any]:
    """A function that runs under autocast and gives its maps in float32.

    Args:
        function: What takes and gives tensors, in lists, tuples or dictionaries too.
        device: The device type that it runs on.
        dtype: The dtype to compute in.
        keep: Leave the maps in the dtype that they have.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype):
            outputs = function(*args, **kwargs)
        if keep:
            return outputs
        return apply_to(outputs, lambda value: isinstance(value, Tensor) and value.dtype is dtype, Tensor.float)

    return run


def compute_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Let backbone, neck and heads of a whole model compute in half precision, in place. It is for evaluation only.

    Each of them runs under autocast. Everything between and behind them stays in float32: RoIAlign, the decoding of
    boxes and non-maximum suppression. For these mmcv has no bfloat16 on a CPU, and half precision would move boxes. The
    layers of backbone and neck are rounded once. Blocks that are not folded yet are not rounded: their kernels are
    folded first.

    Args:
        model: A detector or a segmentor in ``eval`` mode, fused or not, on the device that it will run on.
        dtype: The dtype.

    Returns:
        The same model.
    """
    device = next(model.parameters()).device.type
    into_necks = {module.backbone for module in model.modules() if getattr(module, 'neck', None) is not None}
    for name, part in parts_of(model):
        if name in ('backbone', 'neck'):
            _round_layers(part, dtype)
        # MMSegmentation calls forward() itself, which passes hooks by.
        part.forward = lowered(part.forward, device, dtype, keep=part in into_necks)
    return model


def parts_of(module: nn.Module, name: str = '') -> Iterator[tuple[str, nn.Module]]:
    """Backbones, necks and the innermost heads, each with its name."""
    if name in ('backbone', 'neck'):
        yield name, module
        return
    is_list = isinstance(module, nn.ModuleList)
    children = module.named_children()
    inner = [part for child_name, child in children for part in parts_of(child, name if is_list else child_name)]
    yield from inner
    if name.endswith('head') and not (inner or is_list):
        yield name, module


def _round_layers(part: nn.Module, dtype: torch.dtype) -> None:
    """Round convolutions and linear layers, as autocast would in each pass; none that belongs to a block."""
    unfused = {module for block in reparam_blocks(part) for module in block.modules()}
    for module in part.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module not in unfused:
            module.to(dtype)
