"""Core ML packages. They can be made on any system but run only on Apple's, so the converted program is inspected."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .graph import ExportError, Graph
from .metadata import KEY, FileInfo


def write_package(graph: Graph, images: Tensor, info: FileInfo, path: Path, half: bool) -> None:
    """Convert a graph to an ML program with an image as its input, and save it.

    Core ML scales all channels of an image by one number and shifts each channel by its own. The rest of the
    normalization, a factor close to 1 for each channel, stays in the network. The shift is not folded into the first
    convolution: that pads the normalized image with zeros, and no shift before the padding can give the same.

    Args:
        graph: The graph; its normalization is changed for the conversion and put back.
        images: A batch of one to trace it with.
        info: The package's description.
        path: The package.
        half: Whether it computes in half precision, which the Neural Engine needs.

    Raises:
        ExportError: if the program has another number of convolutions than the network runs, or any BatchNorm.
    """
    import coremltools

    from ..compat.coreml import whole_number_division

    normalization = graph.preprocess.mean, graph.preprocess.std
    mean, std = (values.flatten() for values in normalization)
    scale = 1 / float(std.mean())
    convolutions = count_convolutions(graph, images)
    graph.preprocess.mean = torch.zeros_like(normalization[0])
    graph.preprocess.std = normalization[1] * scale
    try:
        program = _program(graph, (images - normalization[0]) * scale, several_sizes=len(info.sizes) > 1)
    finally:
        graph.preprocess.mean, graph.preprocess.std = normalization
    shapes = [(1, 3, *size) for size in info.sizes]
    with whole_number_division():
        model = coremltools.convert(
            program,
            inputs=[
                coremltools.ImageType(
                    name='images',
                    shape=shapes[0] if len(shapes) == 1 else coremltools.EnumeratedShapes(shapes, default=shapes[0]),
                    scale=scale,
                    bias=[-float(value) * scale for value in mean],
                    color_layout=coremltools.colorlayout.RGB,
                )
            ],
            outputs=[coremltools.TensorType(name=name) for name in graph.outputs],
            convert_to='mlprogram',
            minimum_deployment_target=coremltools.target.iOS16,
            compute_precision=_half_maps() if half else coremltools.precision.FLOAT32,
            skip_model_load=True,
        )
    found = Counter(operation.type for operation in operations(model.get_spec()))
    if found['conv'] != convolutions:
        raise ExportError(f'the Core ML program has {found["conv"]} convolutions, the fused network {convolutions}')
    if found['batch_norm']:
        raise ExportError(f'the Core ML program still has {found["batch_norm"]} BatchNorms')
    model.user_defined_metadata[KEY] = info.to_json()
    model.save(str(path))


def _program(graph: Graph, images: Tensor, several_sizes: bool) -> Any:
    """A graph as coremltools takes it: if it has one size, without any computation of sizes."""
    if several_sizes:
        graph.size = None
        return torch.jit.trace(graph, images, check_trace=False)
    # coremltools does not know the operator that does nothing.
    return torch.export.export(graph, (images,)).run_decompositions({torch.ops.aten.alias.default: lambda x: x})


def _half_maps() -> Any:
    """Half precision for maps, which have four dimensions; it would round the coordinates of boxes to whole pixels."""
    import coremltools

    return coremltools.transform.FP16ComputePrecision(
        op_selector=lambda operation: all(output.rank == 4 for output in operation.outputs)
    )


def count_convolutions(graph: nn.Module, images: Tensor) -> int:
    """How many convolutions a network runs on a batch of images."""
    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1

    handles = [module.register_forward_hook(note) for module in graph.modules() if isinstance(module, nn.Conv2d)]
    try:
        graph(images)
    finally:
        for handle in handles:
            handle.remove()
    return count


def operations(spec: Any) -> Iterator[Any]:
    """All operations of a converted program, including those inside loops and branches."""

    def within(block: Any) -> Iterator[Any]:
        for operation in block.operations:
            yield operation
            for inner in operation.blocks:
                yield from within(inner)

    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            yield from within(block)
