"""Uses of private parts of torch, with the reason for each, and stand-ins for what older versions lack.

Tried with torch 2.13.0, 2.1.2 and 2.0.1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

# The one class that all norms of a kind have in common, SyncBatchNorm and those of other dimensions too.
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNorm

# The one way to see every operation that runs, those of the backward pass too.
from torch.utils._python_dispatch import TorchDispatchMode

# Tensors compare element by element, so the weak dictionaries of the standard library cannot hold them as keys.
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    'BatchNorm',
    'ConvOptions',
    'InstanceNorm',
    'TorchDispatchMode',
    'WeakTensorKeyDictionary',
    'add_conv_',
    'any_row_count',
    'autocast_dtype',
    'before_loading',
    'children_of',
    'conv_activated',
    'conv_backward',
    'conv_with_exact_bias',
    'draw_indices',
    'export_onnx',
    'fuses_into_convolutions',
    'gelu_',
    'gpu_multiplies_bfloat16',
    'has_hooks',
    'in_backward',
    'is_compiling',
    'is_transforming',
    'lost_process',
    'maps_checkpoints',
    'multiplies_bfloat16',
    'multiply_each',
    'named_tree_of',
    'plain_attention',
    'replace_module',
    'scan',
    'tensors_of',
    'tree_of',
    'version',
]


CPUINFO = Path('/proc/cpuinfo')
"""Where Linux tells of the processor."""

ConvOptions = tuple[int, int, int, int]
"""Stride, zero padding, dilation and groups of a convolution, the first three for height and width alike."""


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks see a module's calls, its own or those for all modules; torch has no public function for it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


def lost_process(error: Exception) -> bool:
    """Whether an exception says that another process of the job has ended or does not answer.

    Gloo raises a plain ``RuntimeError`` that begins with the place in its own source.
    """
    kinds = getattr(torch.distributed, 'DistError', ())  # since torch 2.2; Gloo never raised it before
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and '/gloo/' in str(error))


# Torch 2.1 has a name for it, torch 2.0 has none.
_is_compiling = next(
    (
        place.is_compiling
        for place in (getattr(torch, 'compiler', None), torch._utils)
        if hasattr(place, 'is_compiling')
    ),
    bool,
)


def is_compiling() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` is tracing this; it has a public name since torch 2.3."""
    return _is_compiling()


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype in which autocast computes on a type of device; ``None`` where it is off.

    Torch asks by the type of device since 2.4.
    """
    if hasattr(torch, 'get_autocast_dtype'):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if device == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if device == 'cuda' and torch.is_autocast_enabled() else None


def plain_attention() -> AbstractContextManager:
    """Within the context attention is computed by plain operations; the module for it begins with torch 2.3."""
    if find_spec('torch.nn.attention'):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.MATH)
    return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_mem_efficient=False)


def before_loading(module: nn.Module, hook: Callable) -> None:
    """Have ``hook(module, state_dict, prefix, ...)`` called before a module loads; public since torch 2.5."""
    if hasattr(module, 'register_load_state_dict_pre_hook'):
        module.register_load_state_dict_pre_hook(hook)
    else:
        module._register_load_state_dict_pre_hook(hook, with_module=True)


def export_onnx(*args: Any, **options: Any) -> None:
    """``torch.onnx.export`` as it was before torch 2.5: the newer exporter fails on detectors."""
    newer = {'dynamo': False} if 'dynamo' in signature(torch.onnx.export).parameters else {}
    torch.onnx.export(*args, **options, **newer)


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another; ``set_submodule`` begins with torch 2.5."""
    parent, _, name = path.rpartition('.')
    setattr(root.get_submodule(parent), name, module)


def is_transforming() -> bool:
    """Whether a transform of ``torch.func`` (``vmap``, ``jvp``, ``grad``) or forward-mode differentiation is on.

    An ``autograd.Function`` has to be written for each of them, and memory that is overwritten disturbs them.
    """
    if is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def in_backward() -> bool:
    """Whether this runs within a backward pass: checkpointing runs modules again there. Its own code asks so."""
    return torch._C._current_graph_task_id() >= 0


def tree_of(module: nn.Module) -> list[nn.Module]:
    """A module and all below it.

    ``modules()`` gives the same and takes several times as long, which matters because each block asks in every pass.
    """
    tree = [module]
    for parent in tree:
        if parent._modules:
            tree.extend([child for child in parent._modules.values() if child is not None])
    return tree


def named_tree_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """A module and all below it as :func:`tree_of` gives them, each with what the names of its tensors begin with."""
    tree = [('', module)]
    for prefix, parent in tree:
        tree.extend([(f'{prefix}{name}.', child) for name, child in parent._modules.items() if child is not None])
    return tree


def _is_legacy_batch(tensor: Tensor) -> bool:
    """Whether a tensor stands for a batch within ``torch.autograd.grad(is_grads_batched=True)``."""
    if hasattr(torch._C._functorch, 'is_legacy_batchedtensor'):  # since torch 2.3
        return torch._C._functorch.is_legacy_batchedtensor(tensor)
    return 'Batched' in str(torch._C._dispatch_keys(tensor))


def multiply_each(tensors: Sequence[Tensor], factors: Sequence[Tensor], in_place: bool = False) -> Sequence[Tensor]:
    """Each tensor times its factor in one operation, which the optimizers use; it has no public name.

    It has no rule for ``vmap`` either, nor for the older form of it, which ``torch.autograd.grad`` uses for batches.
    """
    if any(map(_is_legacy_batch, tensors)) or is_transforming():
        return [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]
    if not in_place:
        return torch._foreach_mul(tensors, factors)
    torch._foreach_mul_(tensors, factors)
    return tensors


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers of a module and of all below it, as fast as :func:`tree_of`."""
    for child in tree_of(module):
        for tensor in (*child._parameters.values(), *child._buffers.values()):
            if tensor is not None:
                yield tensor


def version(tensor: Tensor) -> int:
    """How many in-place changes of a tensor autograd has counted; it shows the number in an error message only."""
    return tensor._version


def gelu_(x: Tensor) -> Tensor:
    """Exact GELU in place, which ``torch.nn.functional`` does not offer."""
    return torch.ops.aten.gelu_(x)


def onednn_has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor; torch tells since 2.1."""
    return hasattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported') and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions that multiply bfloat16, AVX512-BF16 or AMX, and oneDNN may use them."""
    if hasattr(torch.cpu, '_is_amx_tile_supported'):
        has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:  # torch tells since 2.6; Linux does anyway
        flags = CPUINFO.read_text() if CPUINFO.exists() else ''
        has = 'avx512_bf16' in flags or 'amx_bf16' in flags
    return has and onednn_has_bfloat16()


def gpu_multiplies_bfloat16() -> bool:
    """Whether the GPU has instructions for it; since torch 2.4 the function also tells whether it can be emulated."""
    options = signature(torch.cuda.is_bf16_supported).parameters
    return torch.cuda.is_bf16_supported(**({'including_emulation': False} if options else {}))


def conv_with_exact_bias(x: Tensor, weight: Tensor, bias: Tensor, options: ConvOptions) -> Tensor:
    """A convolution in half precision whose bias is added in float32, before the sum is rounded.

    ``torch.nn.functional.conv2d`` wants the bias in the dtype of the map. oneDNN adds a float32 one where it
    accumulates; the operator that hands it over is what ``torch.compile`` uses. Elsewhere it is added to the map.

    Args:
        x: Map ``(N, C_in, H, W)``.
        weight: Kernel ``(C_out, C_in / groups, kH, kW)``, in the dtype of the map.
        bias: ``(C_out,)``, float32.
        options: Of the convolution.
    """
    if x.device.type == 'cpu' and x.dtype is torch.bfloat16 and onednn_has_bfloat16():
        return conv_activated(x, weight, bias, options, 'none')
    y = torch.nn.functional.conv2d(x, weight, None, *options)
    return y.add_(bias.view(-1, 1, 1))


ACTIVATIONS = {'none': '', 'relu': '', 'gelu': 'none'}
"""Activation that oneDNN applies to the output of a convolution -> how it may approximate it: GELU not at all."""


def _pairs(options: ConvOptions) -> tuple[list[int], list[int], list[int], int]:
    """Padding, stride, dilation and groups, as oneDNN's operators take them: for height and width separately."""
    stride, padding, dilation, groups = options
    return [padding] * 2, [stride] * 2, [dilation] * 2, groups


def conv_activated(x: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions, activation: str) -> Tensor:
    """A convolution and the activation of its output in one operation of oneDNN's, on a CPU and without gradients.

    ``torch.compile`` uses these operators; they have no public name. Arguments as for :func:`conv_with_exact_bias`,
    ``activation`` is a key of ``ACTIVATIONS``.
    """
    approximation = ACTIVATIONS[activation]
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *_pairs(options), activation, [], approximation)


def add_conv_(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions) -> Tensor:
    """``total += convolution(x)`` in one operation of oneDNN's, as :func:`conv_activated`."""
    add = torch.ops.mkldnn._convolution_pointwise_.binary
    return add(total, x, weight, bias, *_pairs(options), 'add', 1.0, None, [], None)


@cache
def fuses_into_convolutions() -> bool:
    """Whether oneDNN's convolutions are there, take activations and sums along, and compute them right in float32.

    They are tried once, on a small map, because operators without a public name may change or disappear.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, total = (
        map_.contiguous(memory_format=torch.channels_last) for map_ in torch.randn(2, 1, 16, 5, 7, generator=generator)
    )
    weight, bias = torch.randn(16, 16, 1, 1, generator=generator) / 4, torch.randn(16, generator=generator)
    y = torch.nn.functional.conv2d(x, weight, bias)
    expected = torch.nn.functional.gelu(y), torch.relu(y), y + total
    try:
        with torch.inference_mode():
            found = [conv_activated(x, weight, bias, (1, 0, 1, 1), activation) for activation in ('gelu', 'relu')]
            found.append(add_conv_(total.clone(), x, weight, bias, (1, 0, 1, 1)))
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(found, expected, strict=True))


def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, options: ConvOptions, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a convolution's input, weight and bias, those that are ``needed``, in one operation.

    ``torch.nn.grad`` has one function for the input and one for the weight, and none for the bias.
    """
    padding, stride, dilation, groups = _pairs(options)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], stride, padding, dilation, False, [0, 0], groups, needed
    )


def draw_indices(batches: Iterator) -> None:
    """Skip the next batch of a data loader's iterator by drawing only its indices.

    A data loader has no public way to skip a batch without making it.

    Raises:
        StopIteration: at the end of the data.
    """
    batches._next_index()


def maps_checkpoints() -> bool:
    """Whether ``torch.load`` was told to map files into memory by default, which it can be since torch 2.7."""
    serialization = getattr(torch.utils, 'serialization', None)
    settings = getattr(getattr(serialization, 'config', None), 'load', None)
    return bool(getattr(settings, 'mmap', False))


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    """A module's children by name; ``named_children()`` leaves out the second name of one that has two."""
    return {name: child for name, child in module._modules.items() if child is not None}


def scan(*args: Any) -> Any:
    """Torch's loop operator, which ``torch.export`` keeps as a loop. It has no public name and is slow to import."""
    from torch._higher_order_ops.scan import scan

    return scan(*args)


def any_row_count(enabled: bool) -> AbstractContextManager:
    """Within the context ``torch.export`` does not treat a size of 1 as a special case.

    Otherwise a program that was traced with maps of several rows would refuse maps of one row. Torch 2.6 has no such
    setting.
    """
    from torch.fx.experimental import _config

    known = hasattr(_config, 'backed_size_oblivious')
    return _config.patch(backed_size_oblivious=enabled) if known else nullcontext()
