"""Launchers that run other launchers."""

import importlib
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from repvit_mm.compat.pytorch import multiplies_bfloat16

sys.path.append(str(Path(__file__).parents[1] / 'tools'))
_launch, demo = map(importlib.import_module, ('_launch', 'demo'))


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """A folder in the place of ``tools/``."""
    monkeypatch.setattr(_launch, 'TOOLS', tmp_path)
    return tmp_path


def test_output_is_shown(tools, capfd):
    (tools / 'tool.py').write_text("import sys\nprint('out', *sys.argv[1:])\nprint('err', file=sys.stderr)\n")
    _launch.run_tool('tool.py', '--option', Path('a/b'))
    out, err = capfd.readouterr()
    assert out == f'+ python {tools}/tool.py --option a/b\nout --option a/b\n' and err == 'err\n'


@pytest.mark.parametrize(
    ('program', 'message'),
    [
        ("import sys\nprint('a warning', file=sys.stderr)\nsys.exit('no room\\n\\n')", r'^no room$'),
        ('raise SystemExit(3)', r'^tools/tool\.py ended with status 3$'),
    ],
)
def test_failure_is_told_by_its_last_line(tools, program, message):
    (tools / 'tool.py').write_text(program)
    with pytest.raises(_launch.ToolError, match=message):
        _launch.run_tool('tool.py')


def test_demo_stops_where_a_launcher_fails(tools):
    (tools / 'make_shapes.py').write_text("raise SystemExit('no room')")
    with pytest.raises(SystemExit, match=r'^the demo stops here: no room$'):
        demo.main()


def test_demo_draws_a_row_for_each_task(tools, tmp_path, monkeypatch):
    (tools / 'predict.py').write_text(
        'import sys, cv2\n'
        'from pathlib import Path\n'
        '*images, fuse, score, _, out, folder = sys.argv[3:]\n'
        "assert (fuse, score, out) == ('--fuse', '--score-thr', '--out')\n"
        "Path(folder, 'pictures').mkdir(parents=True)\n"
        'for image in map(Path, images):\n'
        "    cv2.imwrite(f'{folder}/pictures/{image.stem}.png', 255 - cv2.imread(str(image)))\n"
    )
    monkeypatch.setattr(demo, 'IMAGES', tmp_path / 'images')
    monkeypatch.setattr(demo, 'OUT', tmp_path / 'out')
    demo.IMAGES.mkdir()
    for number in range(6):
        cv2.imwrite(str(demo.IMAGES / f'{number}.jpg'), np.full((960, 960, 3), 40 * number, np.uint8))
    rows = [demo.predict(task, Path('epoch_1.pth'), demo.OUT / task.name) for task in demo.TASKS]
    demo.draw_both(rows)
    shown = cv2.imread(str(demo.OUT / 'predictions.jpg'))[180::364, 180::364]
    assert np.abs(shown - np.array([255, 215, 175, 135])[None, :, None]).max() <= 2


def outcome(unfused: float, **others: float) -> 'demo.Outcome':
    """The same figure in all columns but for some."""
    routes = [column.route for column in demo.COLUMNS]
    row = {'parameters': 1, 'ms': 1.0, 'times_first': 1.0}
    values = [others.get(route, unfused) for route in routes]
    return demo.Outcome(
        {'mIoU': values}, 56, [11.6 if column.export else None for column in demo.COLUMNS], [row] * len(routes)
    )


def test_demo_tells_what_fusing_and_exporting_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, 'OUT', tmp_path)
    monkeypatch.setattr(demo, 'TASKS', demo.TASKS[1:])
    monkeypatch.setattr(demo, 'COLUMNS', demo.ALL_COLUMNS)
    good = {'segmentation': outcome(85.9, fused_bf16=85.6, openvino_bf16=86.4, openvino_int8=85.2)}
    demo.report(good)
    assert '11.6' in capsys.readouterr().out and 'OpenVINO int8' in (tmp_path / 'table.txt').read_text()
    assert demo.shortcomings(good) == []
    assert demo.shortcomings({'segmentation': outcome(85.9, fused=86.1, onnxruntime=85.6, compiled_bf16=85.5)}) == [
        'mIoU is 85.90 unfused and 86.10 fused',
        'mIoU is 85.90 unfused and 85.50 compiled, bfloat16',
        'mIoU is 85.90 unfused and 85.60 ONNX',
    ]
    assert demo.shortcomings({'segmentation': outcome(79.0)}) == ['mIoU is 79.0, wanted 80']


def test_demo_leaves_out_what_the_processor_does_not_multiply():
    routes = [column.route for column in demo.COLUMNS]
    assert ('fused_bf16' in routes) == multiplies_bfloat16() and 'openvino_int8' in routes
