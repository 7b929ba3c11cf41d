"""Measures which layers int8 hurts, one layer at a time.

Quantized numbers are made float again before they are multiplied. So nothing saturates, on no processor.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import track

from .structure import Layer

if TYPE_CHECKING:
    import onnx

    from .qdq import QdqNetwork

IMAGES = 4
"""How many of the calibration images errors are measured on."""

CANDIDATES = 8
"""How many of the most sensitive layers of a section are tried in float."""

GAIN = 0.05
"""A layer stays in float if the error of its section falls by at least this share,"""

TOLERATED = 0.05
"""unless the error is no larger than this anyway."""


@dataclass(frozen=True)
class FloatLayers:
    """Layers that stay in float together, and why: a single layer, or a layer with those that take its result.

    Args:
        layers: The layers.
        alone: The error if only the most sensitive of them is quantized.
        before: The error of the section with these layers in int8.
        after: The error of the section with these layers in float.
    """

    layers: tuple[Layer, ...]
    alone: float
    before: float
    after: float

    def __str__(self) -> str:
        return (
            f'{", ".join(map(describe, self.layers))}: alone {self.alone:.2%}; '
            f'in float they bring the error of all from {self.before:.2%} to {self.after:.2%}'
        )


@dataclass(frozen=True)
class Sensitivity:
    """The measured errors of a network.

    An error is the root mean square of the relative L2 errors of all maps that leave a section of the network. In the
    second section of a two-stage detector the proposals are those of the float network.

    Args:
        alone: Layer -> the error if only this layer is quantized.
        sections: Section -> the error with all of its layers quantized.
        kept: The layers that stay in float.
        images: How many images it was measured on.
    """

    alone: Mapping[Layer, float]
    sections: Mapping[int, float]
    kept: tuple[FloatLayers, ...]
    images: int

    @property
    def float_layers(self) -> tuple[Layer, ...]:
        """The layers that stay in float."""
        return tuple(layer for kept in self.kept for layer in kept.layers)

    def __str__(self) -> str:
        errors = ', '.join(f'{error:.2%}' for error in self.sections.values())
        lines = [f'sensitivity on {self.images} images, {len(self.alone)} layers one at a time; all of them: {errors}']
        lines += [f'stays in float: {kept}' for kept in self.kept] or ['no layer has to stay in float']
        worst = sorted(self.alone.items(), key=lambda item: -item[1])[:5]
        lines.append('most sensitive: ' + ', '.join(f'{describe(layer)} {error:.2%}' for layer, error in worst))
        return '\n'.join(lines)


def describe(layer: Layer) -> str:
    """A layer in words."""
    return f'{layer.module} ({layer.kind})'


def measure(network: 'QdqNetwork', images: Sequence[np.ndarray], threads: int | None = None) -> Sensitivity:
    """Quantize one layer at a time; then keep those layers in float that reduce the error of their section.

    The most sensitive layers of each section are tried in turn, each with those that were kept before it.

    Args:
        network: The network.
        images: Images ``(N, 3, H, W)``; the first few are taken.
        threads: How many threads it computes in; ``None`` leaves that to the library.
    """
    images = images[:IMAGES]
    layers = network.structure.layers
    ends = [layer for layer in layers if layer.end]
    probe = _Probe(network, ends, images, threads)
    console = Console(stderr=True)
    progress = dict(console=console, transient=True, disable=not console.is_terminal)
    alone = {
        layer: probe.error([layer], layer.section) for layer in track(layers, 'sensitivity of each layer', **progress)
    }
    section_errors: dict[int, float] = {}
    kept: list[FloatLayers] = []
    for section in sorted({layer.section for layer in ends}):
        chosen = {layer for layer in layers if layer.section == section}
        section_errors[section] = current = probe.error(chosen, section)
        for layer in sorted(chosen, key=alone.__getitem__, reverse=True)[:CANDIDATES]:
            if current <= TOLERATED:
                break
            if layer not in chosen:
                continue
            # The layers that take a layer's result quantize it once more, so they are tried together with it.
            for group in ({layer}, {layer, *(user for user in chosen if layer.name in user.takes)}):
                trial = probe.error(chosen - group, section)
                if trial <= (1 - GAIN) * current:
                    kept.append(
                        FloatLayers(tuple(other for other in layers if other in group), alone[layer], current, trial)
                    )
                    chosen -= group
                    current = trial
                    break
    return Sensitivity(alone, section_errors, tuple(kept), len(images))


class _Probe:
    """Runs a network with some layers quantized and compares its outputs with the float network's."""

    def __init__(
        self, network: 'QdqNetwork', ends: Sequence[Layer], images: Sequence[np.ndarray], threads: int | None
    ) -> None:
        self._network, self._images, self._threads = network, images, threads
        outputs = {node.name: node.output[0] for node in network.float_model.graph.node}
        self._ends = {layer: outputs[layer.name] for layer in ends}
        self._expected = self._run(network.float_model, list(self._ends.values()))

    def error(self, layers: Collection[Layer], section: int) -> float:
        """The error at the ends of a section if the given layers are quantized."""
        ends = {layer: index for index, layer in enumerate(self._ends) if layer.section == section}
        if not ends:
            return 0.0
        found = self._run(self._network.quantized(layers), [self._ends[layer] for layer in ends])
        squares = []
        for place, index in enumerate(ends.values()):
            wrong = right = 0.0
            for actual, expected in zip(found, self._expected, strict=True):
                reference = expected[index].astype(np.float64)
                wrong += np.square(actual[place] - reference).sum()
                right += np.square(reference).sum()
            squares.append(wrong / right if right else wrong)
        return float(np.sqrt(np.mean(squares)))

    def _run(self, model: 'onnx.ModelProto', names: Sequence[str]) -> list[list[np.ndarray]]:
        """Tensors of a network by their names, for each image."""
        import onnx
        import onnxruntime

        given = {output.name for output in model.graph.output}
        model.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in names
            if name not in given
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads or 0
        options.add_session_config_entry('session.force_spinning_stop', '1')
        options.add_session_config_entry('session.disable_quant_qdq', '1')
        options.log_severity_level = logging.ERROR // 10 - 1
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
        return [session.run(list(names), {'images': image}) for image in self._images]
