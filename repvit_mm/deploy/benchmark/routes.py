"""The forms in which the benchmark runs a backbone: unfused, folded, fused, and by others' compilers and libraries."""

import copy
import importlib
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...backbone import ReparamBackbone
from ...compilation import CompilerError, check_compiler
from ...layers import module_by_module
from ...messages import one_line
from ...precision import check_dtype
from ...reparam import plain_formulation, switch_to_deploy
from ..export import EXPORTERS, Options, write_file
from ..graph import BackboneGraph, ExportError, Preprocess
from ..metadata import FileInfo
from ..quantize import quantize_file
from ..runtimes import RuntimeFileError, open_file
from ..verify import TOLERANCES, relative_error

BFLOAT16_TOLERANCE = TOLERANCES['bfloat16'].maps
"""Relative L2 error of a map in bfloat16."""


class LeftOut(Exception):
    """A route cannot be taken here; the message says why."""


class WrongRoute(Exception):
    """A route gives another result; the message says which and how far off."""


@dataclass(frozen=True)
class Source:
    """What the routes of one measurement start from.

    Args:
        name: Class and variant, as in 'RepViT:m1_1'.
        network: The unfused network in ``eval`` mode, in float32; routes copy it.
        images: The input ``(N, 3, H, W)`` on the network's device, of the dtype to compute in.
    """

    name: str
    network: nn.Module
    images: Tensor


@dataclass(frozen=True)
class Route:
    """A backbone that is ready to run.

    Args:
        run: Gives the maps, as tensors or arrays.
        network: What torch runs, or ``None`` if another library does.
        last_only: Whether it gives the last map only.
        tolerance: Relative L2 error of a map that the route may have; ``None`` if the precision alone says that.
    """

    run: Callable[[], Sequence[Any]]
    network: nn.Module | None = None
    last_only: bool = False
    tolerance: float | None = None


def run_network(network: nn.Module, images: Tensor) -> Route:
    """The route that runs a network on its input, and does nothing else."""
    return Route(lambda: network(images), network)


def without_shortcuts(network: ReparamBackbone, images: Tensor) -> Route:
    """A network as it was written: nothing overwritten in place, no memory format chosen for the processor.

    Nothing is overwritten where gradients are on, which they are here, for a network that has none to record.
    """
    network.requires_grad_(False)
    network.channels_last = False
    return Route(torch.enable_grad()(lambda: network(images)), network)


def plain_copy(network: nn.Module, stack: ExitStack) -> nn.Module:
    """A copy of a network, or of a whole model, that runs its branches for as long as the stack lasts."""
    twin = copy.deepcopy(network)
    stack.enter_context(plain_formulation(twin))
    return twin


def fused_copy(source: Source, dtype: torch.dtype | None = None) -> nn.Module:
    """The package's own deployed network, rounded to a dtype once it is fused; to that of the images unless given."""
    return switch_to_deploy(copy.deepcopy(source.network)).to(dtype or source.images.dtype)


def plain(source: Source, stack: ExitStack) -> Route:
    """Unfused, branch by branch."""
    return without_shortcuts(plain_copy(source.network, stack).to(source.images.dtype), source.images)


def folded(source: Source, stack: ExitStack) -> Route:
    """Unfused, evaluated with folded kernels."""
    return run_network(copy.deepcopy(source.network).to(source.images.dtype), source.images)


def fused_plain(source: Source, stack: ExitStack) -> Route:
    """Fused to convolutions with biases, and no other change."""
    return without_shortcuts(fused_copy(source), source.images)


def fused(source: Source, stack: ExitStack) -> Route:
    """Fused, as the package deploys it."""
    return run_network(fused_copy(source), source.images)


def fused_modules(source: Source, stack: ExitStack) -> Route:
    """Fused, as the package deploys it, but module by module: convolutions take nothing along."""
    network = fused_copy(source)
    return Route(module_by_module()(lambda: network(source.images)), network)


def fused_bf16(source: Source, stack: ExitStack) -> Route:
    """Fused, then in bfloat16."""
    network = bfloat16_copy(source)
    return Route(lambda: network(source.images.bfloat16()), network, tolerance=BFLOAT16_TOLERANCE)


def compiled_bf16(source: Source, stack: ExitStack) -> Route:
    """Fused, then in bfloat16, then compiled."""
    network = bfloat16_copy(source)
    run = compile_network(network, stack)
    return Route(lambda: run(source.images.bfloat16()), network, tolerance=BFLOAT16_TOLERANCE)


def bfloat16_copy(source: Source) -> nn.Module:
    """The deployed network in bfloat16.

    Raises:
        LeftOut: where that is slower than float32.
    """
    if warning := check_dtype('bfloat16', source.images.device.type):
        raise LeftOut(warning)
    return fused_copy(source, torch.bfloat16)


def channels_last(source: Source, stack: ExitStack) -> Route:
    """Fused, with the channels of each pixel side by side in memory."""
    if source.images.device.type == 'cpu':
        raise LeftOut('on a CPU the deployed network runs so anyway')
    network = fused_copy(source).to(memory_format=torch.channels_last)
    return run_network(network, source.images.contiguous(memory_format=torch.channels_last))


def compiled(source: Source, stack: ExitStack) -> Route:
    """Fused and compiled by torch.compile for this one shape."""
    network = fused_copy(source)
    run = compile_network(network, stack)
    return Route(lambda: run(source.images), network)


def compile_network(network: nn.Module, stack: ExitStack) -> Callable[[Tensor], Sequence[Tensor]]:
    """What torch.compile makes of a network for the shape that it gets first.

    Raises:
        LeftOut: if there is no compiler.
    """
    try:
        check_compiler(next(network.parameters()).device.type)
    except CompilerError as error:
        raise LeftOut(str(error)) from None
    # torch compiles one function a few times only and then, without a word, no more.
    stack.callback(torch.compiler.reset)
    return torch.compile(network, dynamic=False)


def timm(source: Source, stack: ExitStack) -> Route:
    """timm's model of the same variant and weights, fused by timm, up to its last map."""
    library = optional('timm')
    name = source.name.lower().replace(':', '_')
    if not library.is_model(name):
        raise LeftOut(f'timm has no {name}')
    network = library.create_model(name, num_classes=0).to(source.images).eval()
    tensors = source.network.state_dict()
    names = source.network.naming.translate(tensors, 'timm')
    network.load_state_dict({names[ours]: tensor for ours, tensor in tensors.items()})
    network = library.utils.reparameterize_model(network, inplace=True)
    return Route(lambda: (network.forward_features(source.images),), network, last_only=True)


@dataclass(frozen=True)
class FileRoute:
    """An exported file in its own runtime, on the CPU.

    Args:
        target: A key of :data:`~repvit_mm.deploy.export.EXPORTERS`.
        precision: What it computes in, a key of :data:`~repvit_mm.deploy.verify.TOLERANCES`. A file for ONNX or
            OpenVINO may be quantized to int8, one for OpenVINO may compute in bfloat16.
    """

    target: str
    precision: str = 'float32'

    def check(self) -> None:
        """Raise a :class:`LeftOut` where the processor does not multiply bfloat16, if the file wants that."""
        if self.precision == 'bfloat16' and (warning := check_dtype('bfloat16', 'cpu')):
            raise LeftOut(warning)


FILES = {
    'onnxruntime': FileRoute('onnx'),
    'onnxruntime_int8': FileRoute('onnx', 'int8'),
    'openvino': FileRoute('openvino'),
    'openvino_bf16': FileRoute('openvino', 'bfloat16'),
    'openvino_int8': FileRoute('openvino', 'int8'),
    'executorch': FileRoute('executorch'),
    'torchscript': FileRoute('torchscript'),
    'torch_export': FileRoute('torch_export'),
}
"""Name of a route by way of a file -> the file."""


def exported(name: str, source: Source, stack: ExitStack) -> Route:
    """The exported graph of the deployed backbone, in the file's own runtime."""
    route = FILES[name]
    if source.images.device.type != 'cpu' or source.images.dtype != torch.float32:
        raise LeftOut('measured on the CPU, from float32 only')
    route.check()
    images = source.images.numpy()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    path = folder / f'backbone{EXPORTERS[route.target].suffix}'
    graph = BackboneGraph(fused_copy(source).requires_grad_(False), Preprocess()).eval()
    graph.size = images.shape[2:]
    info = FileInfo('backbone', graph.outputs)
    options = Options('backbone', (graph.size,), bf16=route.precision == 'bfloat16')
    try:
        write_file(graph, info, route.target, path, options, len(images))
        if route.precision == 'int8':
            path = quantized(path, [images])
        runtime = open_file(path, torch.get_num_threads())
    except (ExportError, RuntimeFileError) as error:
        raise LeftOut(one_line(error)) from None
    return Route(lambda: list(runtime.run(images).values()), tolerance=TOLERANCES[route.precision].maps)


def quantized(path: Path, images: Sequence[np.ndarray]) -> Path:
    """Make an int8 file of a float file, beside it.

    Args:
        path: The file, ``.onnx`` or ``.xml``.
        images: Batches to calibrate on, ``(N, 3, H, W)``.

    Raises:
        RuntimeFileError: if a library is missing.
    """
    goal = path.with_stem(f'{path.stem}_int8')
    quantize_file(path, goal, images)
    return goal


ROUTES: dict[str, Callable[[Source, ExitStack], Route]] = {
    'plain': plain,
    'folded': folded,
    'fused_plain': fused_plain,
    'fused': fused,
    'fused_modules': fused_modules,
    'fused_bf16': fused_bf16,
    'channels_last': channels_last,
    'compiled': compiled,
    'compiled_bf16': compiled_bf16,
    'timm': timm,
    **{name: partial(exported, name) for name in FILES},
}
"""Name of a route -> what prepares it. What a route needs for its running is undone as the stack closes."""


def optional(name: str) -> ModuleType:
    """A library that need not be there; without it, or if it is broken, the route is left out."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a library that does not fit another one may fail in any way
        raise LeftOut(one_line(error)) from None


def check(name: str, route: Route, expected: Sequence[Tensor], tolerance: float) -> None:
    """Run a route once and compare its maps.

    Args:
        name: The route's name.
        route: The route.
        expected: The unfused network's maps.
        tolerance: Largest relative L2 error of a map, if the route does not state its own.

    Raises:
        WrongRoute: if a map is missing or further off.
    """
    tolerance = tolerance if route.tolerance is None else route.tolerance
    wanted = expected[-1:] if route.last_only else expected
    maps = [torch.as_tensor(found) for found in route.run()]
    if len(maps) != len(wanted):
        raise WrongRoute(f'route {name} gives {len(maps)} maps instead of {len(wanted)}')
    for found, right in zip(maps, wanted, strict=True):
        error = relative_error(found, right)
        if not error <= tolerance:
            raise WrongRoute(f'route {name} differs from the unfused network by {error:.1e}, at most {tolerance:.0e}')
