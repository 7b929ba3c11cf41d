"""What tests of exported detectors share: operators in ONNX Runtime."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repvit_mm.compat.pytorch import export_onnx

onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnx')


class Operator:
    """A function of tensors as an ONNX file in ONNX Runtime: called with tensors, it returns tensors.

    Args:
        function: From tensors to one tensor or a tuple of them.
        example: What to trace it with.
        path: A file that may be written.
        dynamic: For each input its dimensions of any size.
    """

    def __init__(
        self, function: Callable, example: Sequence[Tensor], path: Path, dynamic: Sequence[Sequence[int]]
    ) -> None:
        names = [f'input{index}' for index in range(len(example))]
        axes = {name: {dim: f'{name}_{dim}' for dim in dims} for name, dims in zip(names, dynamic, strict=True)}
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter('ignore')
            export_onnx(
                _Function(function),
                tuple(example),
                str(path),
                input_names=names,
                dynamic_axes=axes,
                opset_version=17,
            )
        self.session = onnxruntime.InferenceSession(str(path), _options(), providers=['CPUExecutionProvider'])

    def __call__(self, *inputs: Tensor) -> Tensor | list[Tensor]:
        feeds = {node.name: x.numpy() for node, x in zip(self.session.get_inputs(), inputs, strict=True)}
        outputs = [torch.from_numpy(output) for output in self.session.run(None, feeds)]
        return outputs if len(outputs) > 1 else outputs[0]


class _Function(nn.Module):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _options() -> 'onnxruntime.SessionOptions':
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def assert_same(found: Tensor | np.ndarray, expected: Tensor | np.ndarray, tolerance: float = 1e-5) -> None:
    """Equal but for rounding: relative to the largest element."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    assert found.shape == expected.shape, f'{tuple(found.shape)} instead of {tuple(expected.shape)}'
    scale = max(expected.abs().max().item(), 1) if expected.numel() else 1
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)
