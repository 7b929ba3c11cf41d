"""Makes int8 files by the tools of each format: onnxruntime's for ONNX, NNCF for OpenVINO, PT2E for ExecuTorch.

Weights get one scale for each output channel, activations one for each tensor, from calibration images. The
caller decides which layers stay in float, see :mod:`~repvit_mm.deploy.sensitivity`. What comes before the first layer
and behind the last one, where boxes are decoded and suppressed, always stays in float.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compat.openvino import openvino_core, same_signal_stack
from .metadata import KEY, FileInfo
from .runtimes import RuntimeFileError, import_library, open_file
from .structure import Kind, Layer, Node, Structure, find_structure, module_of

if TYPE_CHECKING:
    from torch import fx

    from .graph import Graph
    from .qdq import QdqNetwork

OPENVINO_KINDS: dict[str, Kind] = {
    **dict.fromkeys(('Convolution', 'GroupConvolution'), 'conv'),
    **dict.fromkeys(('ConvolutionBackpropData', 'GroupConvolutionBackpropData'), 'conv'),
    'MatMul': 'linear',
    'Add': 'add',
    'Multiply': 'mul',
    'ShapeOf': 'shape',
    **dict.fromkeys(('NonMaxSuppression', 'ROIAlign', 'TopK', 'NonZero', 'Loop', 'TensorIterator'), 'barrier'),
}
"""OpenVINO's type of an operator -> its kind; all others are ``'other'``."""

SATURATING = ('onnx', 'openvino')
"""Targets whose runtimes need VNNI, or the like, to add products of 8-bit numbers exactly."""

TORCH_KINDS: dict[str, Kind] = {
    **dict.fromkeys(('conv2d', 'convolution', 'conv_transpose2d'), 'conv'),
    **dict.fromkeys(('linear', 'matmul', 'bmm', 'mm', 'addmm'), 'linear'),
    **dict.fromkeys(('add', 'add_'), 'add'),
    **dict.fromkeys(('mul', 'mul_'), 'mul'),
    'sym_size': 'shape',
    **dict.fromkeys(('topk', 'nonzero', 'argmax', 'argmin', 'sort', 'scan', 'roi_align'), 'barrier'),
}
"""Name of a torch operator -> its kind; all others are ``'other'``."""


def quantize_file(
    source: str | Path,
    goal: str | Path,
    images: Sequence[np.ndarray],
    kept: Collection[Layer] = (),
    reduce_range: bool | None = None,
) -> None:
    """Make an int8 file of an exported float file: ``.onnx``, or ``.xml`` with its ``.bin``.

    Args:
        source: The float file.
        goal: The int8 file, with the same suffix.
        images: Calibration images ``(N, 3, H, W)`` as the file takes them: float32, RGB, values from 0 to 255.
        kept: Layers that stay in float.
        reduce_range: Whether to keep weights in half of their range. Unless given, where products saturate here.

    Raises:
        RuntimeFileError: if the file cannot be opened, is no float file of one of the two formats, or if a library is
            missing.
    """
    source, goal = Path(source), Path(goal)
    if source.suffix not in ('.onnx', '.xml'):
        raise RuntimeFileError(f'{source} cannot be quantized: expected a name that ends in .onnx or .xml')
    runtime = open_file(source)
    info, saturates = runtime.info, runtime.saturates()
    reduce_range = saturates if reduce_range is None else reduce_range
    info = replace(info, exact_products=not reduce_range)
    if info.precision != 'float32':
        raise RuntimeFileError(f'{source} cannot be quantized: it is in {info.precision} already, expected float32')
    if source.suffix == '.onnx':
        from .qdq import QdqNetwork

        write_onnx(QdqNetwork(source, images), goal, info, kept, reduce_range)
    else:
        write_openvino(source, goal, info, images, kept, reduce_range)


def int8_info(info: FileInfo, *libraries: ModuleType) -> FileInfo:
    """The description of an int8 file, made from its float file's."""
    versions = {library.__name__: library.__version__.partition('-')[0] for library in libraries}
    return replace(info, precision='int8', versions=info.versions | versions)


def write_onnx(
    network: 'QdqNetwork', goal: Path, info: FileInfo, kept: Collection[Layer] = (), reduce_range: bool = False
) -> None:
    """Write an ONNX network in int8.

    Args:
        network: The network, calibrated.
        goal: The file.
        info: What the float file says of itself.
        kept: Layers that stay in float.
        reduce_range: Whether to keep weights in half of their range, for processors on which products saturate.
    """
    import onnx
    import onnxruntime

    from .qdq import set_description

    layers = [layer for layer in network.structure.layers if not _is_kept(layer, kept)]
    model = network.quantized(layers, reduce_range)
    set_description(model, KEY, int8_info(info, onnxruntime).to_json())
    onnx.save(model, goal)


def write_openvino(
    source: Path,
    goal: Path,
    info: FileInfo,
    images: Sequence[np.ndarray],
    kept: Collection[Layer] = (),
    reduce_range: bool = False,
) -> None:
    """Write an OpenVINO model in int8.

    Args:
        source: The float ``.xml`` file.
        goal: The int8 file.
        info: What the float file says of itself.
        images: Calibration images.
        kept: Layers that stay in float.
        reduce_range: Whether to keep weights in half of their range, for processors on which products saturate.
    """
    nncf = import_library('nncf', source)
    openvino = import_library('openvino', source)
    model = openvino_core().read_model(source)
    nodes = list(_openvino_nodes(model))
    structure = find_structure(nodes)
    floats = {layer.name for layer in structure.layers if _is_kept(layer, kept)}
    fix = nncf.quantization.advanced_parameters.OverflowFix
    with _quiet('nncf'), same_signal_stack():
        quantized = nncf.quantize(
            model,
            nncf.Dataset(images),
            # Activations without negative values, or with few, use the whole range.
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(
                names=sorted({node.name for node in nodes if node.name not in structure.between} | floats),
                validate=False,
            ),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=fix.ENABLE if reduce_range else fix.DISABLE,
                # It gained nothing on trained models, and on a random one it tripled the error.
                disable_bias_correction=True,
            ),
        )
    quantized.set_rt_info(int8_info(info, openvino, nncf).to_json(), [KEY])
    openvino.save_model(quantized, goal, compress_to_fp16=False)


def write_executorch(
    graph: 'Graph', goal: Path, info: FileInfo, images: Sequence[np.ndarray], kept: Collection[Layer] = ()
) -> None:
    """Write an ExecuTorch program in int8.

    Args:
        graph: The graph, built for ExecuTorch.
        goal: The file.
        info: What the float file says of itself.
        images: Calibration images.
        kept: Layers that stay in float.
    """
    import torch

    torchao = import_library('torchao', goal)
    import_library('executorch.exir', goal)
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from .export import lower_executorch

    # ExecuTorch refuses the strides of a view of one image in a batch.
    tensors = [torch.from_numpy(image).clone(memory_format=torch.contiguous_format) for image in images]
    with torch.no_grad(), _quiet('torchao'):
        module = torch.export.export(graph, (tensors[0],)).module()
        structure = find_structure(list(_torch_nodes(module.graph)))
        floats = {layer.name for layer in structure.layers if _is_kept(layer, kept)}
        computed = structure.between - floats
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        # It is called for each node of a pattern, including the weights of a convolution.
        quantizer.set_filter_function(lambda node: node.op == 'get_attr' or node.name in computed)
        prepared = prepare_pt2e(module, quantizer)
        for tensor in tensors:
            prepared(tensor)
        program = torch.export.export(convert_pt2e(prepared), (tensors[0],))
        lower_executorch(program, int8_info(info, torchao), goal)


def _is_kept(layer: Layer, kept: Collection[Layer]) -> bool:
    """Whether a layer of this format is among the chosen layers, which may be named as in another format."""
    return any(other.is_same_layer(layer.module, layer.kind) for other in kept)


def openvino_structure(model: Any) -> Structure:
    """The structure of an OpenVINO model."""
    return find_structure(list(_openvino_nodes(model)))


def _openvino_nodes(model: Any) -> Iterator[Node]:
    constant: set[str] = set()
    for operator in model.get_ordered_ops():
        name, kind = operator.get_friendly_name(), operator.get_type_name()
        sources = (operator.input_value(index).get_node() for index in range(operator.get_input_size()))
        inputs = [source.get_friendly_name() for source in sources]
        if kind == 'Constant' or (inputs and constant.issuperset(inputs)):
            constant.add(name)
        elif kind != 'Result':
            users = (target.get_node() for output in operator.outputs() for target in output.get_target_inputs())
            yield Node(
                name,
                OPENVINO_KINDS.get(kind, 'other'),
                module_of(name.removesuffix('/WithoutBiases'), inputs[1:2]),
                tuple(source for source in inputs if source not in constant),
                any(user.get_type_name() == 'Result' for user in users),
            )


def _torch_nodes(graph: 'fx.Graph') -> Iterator[Node]:
    constant: set[str] = set()
    for node in graph.nodes:
        inputs = [source.name for source in node.all_input_nodes]
        if node.op == 'get_attr' or (node.op == 'call_function' and inputs and constant.issuperset(inputs)):
            constant.add(node.name)
        elif node.op in ('placeholder', 'call_function'):
            operator = getattr(node.target, '__name__', str(node.target)).partition('.')[0]
            stack = list((node.meta.get('nn_module_stack') or {'': ('', None)}).values())
            yield Node(
                node.name,
                TORCH_KINDS.get(operator, 'other'),
                stack[-1][0].removeprefix('model.'),
                tuple(source for source in inputs if source not in constant),
                any(user.op == 'output' for user in node.users),
            )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Within the context a library does not log its progress."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
