"""Makes ONNX files in int8 by onnxruntime's tools: pairs of quantize and dequantize nodes around chosen layers.

Activations are unsigned, one scale for each tensor; weights are signed, one scale for each output channel. Both matter:
ONNX Runtime has no fast kernel on x86 for the signed activations that its tools take by themselves. GELU becomes one
node first: in pieces, as it is exported, each of them would be quantized.

Needs onnx and onnxruntime, no torch.
"""

import copy
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    create_calibrator,
    quant_pre_process,
)
from onnxruntime.quantization.fusions import FusionGelu
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

from .structure import Kind, Layer, Node, Structure, find_structure, module_of

KINDS: dict[str, Kind] = {
    'Conv': 'conv',
    'ConvTranspose': 'conv',
    'Gemm': 'linear',
    'MatMul': 'linear',
    'Add': 'add',
    'Mul': 'mul',
    'Shape': 'shape',
    'Size': 'shape',
    **dict.fromkeys(('NonMaxSuppression', 'RoiAlign', 'TopK', 'NonZero', 'ArgMax', 'ArgMin', 'Loop'), 'barrier'),
}
"""ONNX operator -> its kind; all others are ``'other'``."""

PASSING = ('Relu', 'Resize', 'MaxPool', 'Transpose', 'Reshape', 'Concat', 'Split', 'Squeeze', 'Unsqueeze', 'Slice')
"""Operators that take int8 as it is, so that it need not become float between two layers."""

GELU_DOMAIN = 'com.microsoft'


class QdqNetwork:
    """An ONNX file, any layers of which can be quantized.

    Args:
        path: The float file.
        images: Calibration images ``(N, 3, H, W)`` as the file takes them.
    """

    def __init__(self, path: Path, images: Sequence[np.ndarray]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            prepared = Path(scratch, 'prepared.onnx')
            # Without symbolic shape inference, which fails on detectors.
            quant_pre_process(path, prepared, skip_symbolic_shape=True)
            fuse_gelu(prepared)
            self._model = load_model_with_shape_infer(prepared)
            calibrator = create_calibrator(
                prepared,
                self._operators,
                augmented_model_path=str(Path(scratch, 'augmented.onnx')),
                calibrate_method=CalibrationMethod.MinMax,
            )
            for image in images:  # one by one: the calibrator keeps everything that one call collects
                calibrator.collect_data(_Reader([image]))
            self._ranges = calibrator.compute_data()
        nodes = list(_nodes(self._model.graph))
        self.structure = find_structure(nodes)
        operators = {node.name: node.op_type for node in self._model.graph.node}
        self._passing = {
            node.name: node.inputs
            for node in nodes
            if node.name in self.structure.between and operators[node.name] in PASSING
        }

    _operators = (*(name for name, kind in KINDS.items() if kind in ('conv', 'linear', 'add', 'mul')), *PASSING)

    @property
    def float_model(self) -> onnx.ModelProto:
        """A copy of the network as it is, prepared."""
        return copy.deepcopy(self._model)

    def quantized(self, layers: Collection[Layer], reduce_range: bool = False) -> onnx.ModelProto:
        """The network with some layers in int8, and the nodes that only pass on their results.

        Args:
            layers: The layers of :attr:`structure` that are quantized.
            reduce_range: Whether to keep weights in 7 bits, for processors on which products saturate.
        """
        nodes = {layer.name for layer in layers}
        for name, inputs in self._passing.items():
            if nodes.issuperset(inputs):
                nodes.add(name)
        if not nodes:
            return self.float_model
        quantizer = QDQQuantizer(
            self.float_model,
            per_channel=True,
            reduce_range=reduce_range,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=self._ranges,
            nodes_to_quantize=sorted(nodes),
            nodes_to_exclude=[],
            op_types_to_quantize=list(self._operators),
            extra_options={},
        )
        quantizer.quantize_model()
        return quantizer.model.model


class _Reader(CalibrationDataReader):
    """Calibration images as onnxruntime asks for them."""

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._images, None)
        return None if image is None else {'images': image}


def fuse_gelu(path: Path) -> None:
    """Make one node of each GELU of an ONNX file, in place."""
    model = ONNXModel(onnx.load(path))
    if FusionGelu(model).apply() and GELU_DOMAIN not in {entry.domain for entry in model.model.opset_import}:
        model.model.opset_import.append(onnx.helper.make_opsetid(GELU_DOMAIN, 1))
    model.topological_sort()
    onnx.save(model.model, path)


def structure_of(model: onnx.ModelProto) -> Structure:
    """The structure of an ONNX graph."""
    return find_structure(list(_nodes(model.graph)))


def _nodes(graph: onnx.GraphProto) -> Iterator[Node]:
    weights = {tensor.name for tensor in graph.initializer}
    outputs = {output.name for output in graph.output}
    makers: dict[str, str] = {}
    constant: set[str] = set(weights)
    for node in graph.node:
        if node.op_type == 'Constant':
            constant.update(node.output)
            continue
        makers.update(dict.fromkeys(node.output, node.name))
        yield Node(
            node.name,
            KINDS.get(node.op_type, 'other'),
            module_of(node.name, [name for name in node.input[1:2] if name in weights]),
            tuple(makers[name] for name in node.input if name in makers),
            any(name in outputs for name in node.output),
        )


def set_description(model: onnx.ModelProto, key: str, text: str) -> None:
    """Set one entry of an ONNX model's metadata."""
    properties: dict[str, Any] = {entry.key: entry.value for entry in model.metadata_props}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, properties | {key: text})
