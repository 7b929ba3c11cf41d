"""What a network takes: multiply-accumulates, parameters, the memory of its tensors, and what it moves to and fro."""

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from mmengine.analysis import FlopAnalyzer
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ...compat.pytorch import TorchDispatchMode
from ..timing import Run

MATRIX_SIZE = {'cpu': 2048, 'cuda': 8192}
"""Side of the matrices that are multiplied for the roofline: large enough that the arithmetic is all that counts."""


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Run, int]:
    """A large product of square matrices, for the machine's matrix rate, and its multiply-accumulates."""
    size = MATRIX_SIZE[device.type]
    first, second = torch.randn(2, size, size, device=device, dtype=dtype)
    return lambda: torch.mm(first, second), size**3


def count_macs(network: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of a network's convolutions and linear layers, counted by MMEngine.

    Args:
        network: The network; it is traced.
        images: Its input ``(N, 3, H, W)``.
    """
    # MMEngine calls a multiply-accumulate one flop.
    analyzer = FlopAnalyzer(network, images).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad():
        operators = analyzer.by_operator()
    return operators['conv'] + operators['linear']


def count_parameters(network: nn.Module) -> int:
    """The number of a network's parameters, frozen ones too."""
    return sum(parameter.numel() for parameter in network.parameters())


def start_of(event: Any) -> int:
    """When an event of torch's profiler began; before torch 2.4 it is told in microseconds."""
    return event.start_ns() if hasattr(event, 'start_ns') else event.start_us()


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most memory that tensors take at once during a run, above what was there before it, in bytes.

    Weights and input are there before. On a GPU the allocator counts; on a CPU the profiler sees each tensor come and
    go. Memory that a library takes for itself, not for a tensor, is not seen.
    """
    if device.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    total = peak = 0
    for event in sorted(events, key=start_of):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def saved_bytes(run: Run, network: nn.Module) -> int:
    """The memory of all distinct tensors that a run saves for its backward pass, in bytes.

    Views of one tensor count once, with the memory that they keep; the network's parameters and buffers, which are
    there anyway, do not count. The input does.
    """
    in_network = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    # Kept until the end: memory that was given back could be another tensor's.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in in_network:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())


CONVOLUTIONS = ('convolution', '_convolution_pointwise')
PRODUCTS = (
    *CONVOLUTIONS,
    'convolution_backward',
    'mm',
    'addmm',
    'bmm',
    'baddbmm',
    '_scaled_dot_product_flash_attention',
    '_scaled_dot_product_flash_attention_for_cpu',
    '_scaled_dot_product_flash_attention_for_cpu_backward',
)
"""Operations whose arithmetic counts, not what they move."""
WRITING = ('copy_', 'fill_', 'zero_')
"""Operations that change a tensor in place without reading it."""


NOTHING = ('_unsafe_view', 'is_same_size')
"""Operations that compute nothing, which torch does not call views."""


class Traffic(TorchDispatchMode):
    """Within it every operation counts, and the bytes that the elementwise ones read and write.

    Whatever is no convolution, no matrix product and no view counts as elementwise: sums, norms, activations, their
    gradients and conversions too. Each is a pass over its operands, which is what it costs where memory is the limit.
    """

    operations = 0
    elementwise_bytes = 0
    bias_bytes = 0
    """What the biases of convolutions would add, each as one more pass over the output: torch adds them so behind
    cuDNN's convolutions, inside the one operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or 'empty' in name or name in NOTHING:
            return outputs
        self.operations += 1
        if name in PRODUCTS:
            if name in CONVOLUTIONS and args[2] is not None:
                self.bias_bytes += 2 * bytes_of([outputs])
            return outputs
        shape_only = name.startswith('new_') or name.endswith('_like') or name in WRITING
        self.elementwise_bytes += bytes_of([args[1:] if shape_only else args, kwargs, outputs])
        return outputs


def bytes_of(values: Iterable[Any]) -> int:
    """The bytes of all tensors in nested lists, tuples and dictionaries; an expanded one counts as what it repeats."""
    return sum(
        tensor.element_size() * prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
        for tensor in tree_flatten(list(values))[0]
        if isinstance(tensor, Tensor)
    )
