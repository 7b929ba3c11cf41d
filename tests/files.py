"""Exported files made by hand, which see what anybody can check. Needs no torch."""

from pathlib import Path
from typing import Any

import pytest

from repvit_mm.deploy.metadata import KEY, FileInfo

onnx = pytest.importorskip('onnx')

RED_DETECTOR = """
<ir_version: 9, opset_import: ["": 18]>
red_detector (float[{batch}, 3, {height}, {width}] images) => ({outputs})
<float bright = {{127}}, int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] y = {{2}}, int64[1] x = {{3}},
 int64[3] image = {{1, 2, 3}}, float[1, 2] best = {{0.75, 0}}, int64[1, 2] class = {{1, -1}}>
{{
    red = Slice(images, zero, one, one)
    seen = Greater(red, bright)
    mask = Cast<to = 1>(seen)
    columns = ReduceMax<keepdims = 0>(mask, y)
    rows = ReduceMax<keepdims = 0>(mask, x)
    left = ArgMax<axis = 2, keepdims = 0>(columns)
    top = ArgMax<axis = 2, keepdims = 0>(rows)
    last_column = ArgMax<axis = 2, keepdims = 0, select_last_index = 1>(columns)
    last_row = ArgMax<axis = 2, keepdims = 0, select_last_index = 1>(rows)
    right = Add(last_column, one)
    bottom = Add(last_row, one)
    edges = Concat<axis = 1>(left, top, right, bottom)
    box = Cast<to = 1>(edges)
    box_row = Unsqueeze(box, one)
    boxes = Concat<axis = 1>(box_row, box_row)
    found = ReduceMax<keepdims = 0>(mask, image)
    count = Cast<to = 7>(found)
    found_row = Unsqueeze(found, one)
    scores = Mul(found_row, best)
    count_row = Unsqueeze(count, one)
    labels = Mul(count_row, class)
    {masks}
}}
"""

FULL_MASKS = """
    sides = Constant<value = int64[2] {7, 7}>()
    score_shape = Shape(scores)
    mask_shape = Concat<axis = 0>(score_shape, sides)
    masks = ConstantOfShape<value = float[1] {1}>(mask_shape)
"""
"""Each box is filled."""

STRONGEST_CHANNEL = """
<ir_version: 9, opset_import: ["": 18]>
strongest_channel (float[{batch}, 3, {height}, {width}] images) => ({outputs})
{{
    {result}
}}
"""


def red_detector(path: Path, masks: bool = False, **fields: Any) -> Path:
    """Write a detector of one thing: the box around all that is bright red, of class 1 and score 0.75, if there is any.

    Its output has room for two detections, of which the second is filling. ``fields`` are those of ``FileInfo``.
    """
    kinds = {'boxes': 'float[B, 2, 4]', 'scores': 'float[B, 2]', 'labels': 'int64[B, 2]', 'count': 'int64[B]'}
    if masks:
        kinds['masks'] = 'float[B, 2, 7, 7]'
    info = FileInfo(
        'detection', tuple(kinds), **{'classes': ('green', 'red'), 'palette': ((0, 200, 0), (200, 0, 0)), **fields}
    )
    return save(path, RED_DETECTOR, info, kinds, masks=FULL_MASKS if masks else '')


def strongest_channel(path: Path, logits: bool = False, **fields: Any) -> Path:
    """Write a segmentor of three classes: which of red, green and blue is the strongest at a pixel."""
    colors = {'classes': ('red', 'green', 'blue'), 'palette': ((200, 0, 0), (0, 200, 0), (0, 0, 200))}
    info = FileInfo('segmentation', ('logits' if logits else 'labels',), **{**colors, **fields})
    if logits:
        return save(path, STRONGEST_CHANNEL, info, {'logits': 'float[B, 3, Y, X]'}, result='logits = Identity(images)')
    result = 'labels = ArgMax<axis = 1, keepdims = 0>(images)'
    return save(path, STRONGEST_CHANNEL, info, {'labels': 'int64[B, Y, X]'}, result=result)


def save(path: Path, text: str, info: FileInfo, kinds: dict[str, str], **parts: str) -> Path:
    """Write a model of ONNX's text format as a file with its description."""
    height, width = info.sizes[0] if len(info.sizes) == 1 else ('H', 'W')
    outputs = ', '.join(f'{kind} {name}' for name, kind in kinds.items())
    model = onnx.parser.parse_model(
        text.format(batch=info.batch or 'N', height=height, width=width, outputs=outputs, **parts)
    )
    onnx.helper.set_model_props(model, {KEY: info.to_json()})
    onnx.save(model, path)
    return path
