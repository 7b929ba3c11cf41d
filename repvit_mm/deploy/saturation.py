"""Whether products of 8-bit numbers saturate on this processor.

Processors with VNNI, AMX or ARM's dot products add them up exactly. Others with AVX2 or AVX-512 add two of them in 16
bits first, which end at 32,767: two products of 255 and 127 are 64,770. Whether a runtime computes so is tried, on a
network of one convolution, because it depends on the runtime, too, and on what it was told to use. A runtime that does
not run this network is taken to be right.

Weights in half of their range never saturate: two products of 255 and 64 are 32,640. ONNX Runtime can also be told to
be right rather than fast: it then makes signed weights unsigned, and its kernels for those add in 32 bits.

Needs numpy, and the runtime that is asked about.
"""

import base64
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np

from ..compat.openvino import openvino_core

CHANNELS = 8
EXACT = CHANNELS * 255 * 127
"""What the network's convolution gives at each place."""
SIDE = 4

# One QLinearConv in opset 13: u8 (1, 8, 4, 4) of 255 times s8 weights (8, 8, 1, 1) of 127, scaled so that the exact sum
# is 200. It is kept as a file's bytes because the package onnx, which makes such files, is not needed to run them.
ONNX_NETWORK = (
    'c-rIOuxe-GvgTr};9}0tOXXszN-fIgVl0R7*g(AaaxT{5<is4Pq!44J5_h0aW?pJyk#l}tnGj>T7Ow!K6G(#>3j;%gy%x6slM`627b62uj@b!n',
    '4v5PSR0=W9i{<Q_g)UnD93a5R!3b2xSnlOePa%ks26{$Fj7x-rNl1W;iGvY{Ie?f2gp+`hmAE9GShyGjcmZP~M#K',
)
ONNX_EXACT = 200

ONNX_PRECISE = ('session.x64quantprecision', '1')
"""The entry of a session's options that tells ONNX Runtime to be right where its fast kernels saturate."""


@cache
def onnxruntime_saturates(precise: bool = False) -> bool:
    """Whether they do in ONNX Runtime.

    Args:
        precise: Where it is told to be right rather than fast, by ``ONNX_PRECISE``.
    """
    import onnxruntime

    network = zlib.decompress(base64.b85decode(''.join(ONNX_NETWORK)))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # none: what fails is no fault of a file
    options.intra_op_num_threads = 1
    if precise:
        options.add_session_config_entry(*ONNX_PRECISE)
    try:
        session = onnxruntime.InferenceSession(network, options, providers=['CPUExecutionProvider'])
        (output,) = session.run(None, {'x': np.full((1, CHANNELS, SIDE, SIDE), 255, np.uint8)})
    except Exception:  # ONNX Runtime raises its own kinds
        return False
    return bool((output < ONNX_EXACT - 1).any())


def compile_probe(precision: str) -> Callable[[np.ndarray], np.ndarray]:
    """The same convolution in OpenVINO, from floats to floats: ``(1, 8, 4, 4)`` each.

    Args:
        precision: ``'f32'`` for a quantized one, ``'bf16'`` for one that is not and computes in bfloat16.
    """
    import openvino
    from openvino import opset8 as operators

    def quantized(node: openvino.Node, lowest: float, highest: float) -> openvino.Node:
        limits = [operators.constant(np.float32(limit)) for limit in (lowest, highest)]
        return operators.fake_quantize(node, *limits, *limits, int(highest - lowest) + 1)

    x = operators.parameter([1, CHANNELS, SIDE, SIDE], np.float32)
    weight = operators.constant(np.full((CHANNELS, CHANNELS, 1, 1), 127, np.float32))
    operands = (x, weight) if precision == 'bf16' else (quantized(x, 0, 255), quantized(weight, -127, 127))
    y = operators.convolution(*operands, [1, 1], [0, 0], [0, 0], [1, 1])
    model = openvino.Model([operators.result(y)], [x])
    network = openvino_core().compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': precision})
    return lambda images: network(images)[network.outputs[0]]


@cache
def openvino_saturates() -> bool:
    """Whether they do in OpenVINO."""
    try:
        output = compile_probe('f32')(np.full((1, CHANNELS, SIDE, SIDE), 255, np.float32))
    except Exception:  # OpenVINO raises its own kinds
        return False
    return bool((output < 0.99 * EXACT).any())
