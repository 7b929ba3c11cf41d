"""Launchers that run other launchers."""

import importlib
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

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


def outcome(folder: Path, unfused: float, **others: float) -> 'demo.Outcome':
    """The same figure in all forms but for some."""
    forms = (*demo.ESSENTIALS, *demo.EXTRAS)
    found = demo.Outcome(Path('iter_1.pth'), blocks=56)
    for form in forms:
        found.points[form.route] = {'mIoU': others.get(form.route, unfused)}
        found.rows[form.route] = {'ms': 1.0, 'times_first': 0.25}
        if form.export:
            found.files[form.route] = folder / form.route
            found.files[form.route].write_bytes(bytes(11_600_000))
    return found


@pytest.fixture
def segmentation(tmp_path, monkeypatch) -> Path:
    """The demo's folder, where the demo has that task alone."""
    monkeypatch.setattr(demo, 'OUT', tmp_path)
    monkeypatch.setattr(demo, 'TASKS', demo.TASKS[1:])
    return tmp_path


def test_demo_tells_what_fusing_and_exporting_changed(segmentation):
    good = outcome(segmentation, 85.9, fused=86.0, openvino_int8=60.0)
    assert demo.shortcomings({'segmentation': good}) == []
    bad = outcome(segmentation, 85.9, plain=85.7, fused=86.1, onnxruntime=85.6)
    assert demo.shortcomings({'segmentation': bad}) == [
        'mIoU is 85.90 unfused and 85.70 branch by branch',
        'mIoU is 85.90 unfused and 86.10 fused',
        'mIoU is 85.90 unfused and 85.60 ONNX',
    ]
    assert demo.shortcomings({'segmentation': outcome(segmentation, 79.0)}) == ['mIoU is 79.0, wanted 80']


def test_demo_has_a_row_for_each_form_and_says_why_one_is_refused(segmentation, capsys):
    found = outcome(segmentation, 85.9, openvino_int8=84.5)
    demo.report({'segmentation': found})
    shown, written = capsys.readouterr().out, (segmentation / 'table.txt').read_text()
    rows = {line.split('│')[1].strip(): line for line in written.splitlines() if line.count('│') > 3}
    assert all(form.heading in rows for form in (*demo.ESSENTIALS, *demo.EXTRAS))
    assert '85.9' in rows['ONNX'] and '11.6' in rows['ONNX'] and '0.25' in rows['ONNX']
    assert 'segmentation, OpenVINO int8: mIoU changes by -1.4' in shown and 'refused' not in shown
    for of in (found.points, found.files, found.rows):
        del of['openvino_int8']
    found.refused['openvino_int8'] = 'int8 loses 3.32 points of mIoU'
    demo.report({'segmentation': found})
    shown = capsys.readouterr().out
    assert 'refused' in shown and 'segmentation, OpenVINO int8: int8 loses 3.32 points of mIoU' in shown


def test_demo_does_not_end_because_of_an_extra(tools, segmentation, monkeypatch):
    """It has its picture before the first of them."""
    calls = []

    def run_tool(name: str, *arguments: object) -> None:
        calls.append(name)
        if name == 'export.py' and '--int8' in arguments:
            raise _launch.ToolError('int8 loses 3.32 points of mIoU')

    monkeypatch.setattr(demo, 'check_dtype', lambda *arguments: '')
    monkeypatch.setattr(demo, 'run_tool', run_tool)
    monkeypatch.setattr(demo, 'run_test', lambda *arguments: {'mIoU': 85.9})
    monkeypatch.setattr(demo, 'train', lambda task, folder: Path('iter_1.pth'))
    monkeypatch.setattr(demo, 'draw_both', lambda rows: calls.append('picture'))
    monkeypatch.setattr(demo, 'time_forms', lambda task, outcome: None)
    reported = {}
    monkeypatch.setattr(demo, 'report', reported.update)
    demo.main()
    assert reported['segmentation'].refused == {'openvino_int8': 'int8 loses 3.32 points of mIoU'}
    extras = [form for form in demo.EXTRAS if form.export]
    assert calls.index('picture') == len(calls) - len(extras) - 1
    assert reported['segmentation'].points.keys() == {
        form.route for form in (*demo.ESSENTIALS, *demo.EXTRAS) if form.route != 'openvino_int8'
    }


def test_demo_says_what_the_processor_does_not_multiply(segmentation, monkeypatch, capsys):
    monkeypatch.setattr(demo, 'check_dtype', lambda *arguments: 'it has no bfloat16')
    measured = []
    monkeypatch.setattr(demo, 'measure', lambda task, form, outcome: measured.append(form.route))
    found = outcome(segmentation, 85.9)
    for form in demo.EXTRAS:
        for of in (found.points, found.files, found.rows):
            of.pop(form.route, None)
        demo.measure_extra(demo.TASKS[0], form, found)
    assert measured == ['openvino_int8']
    demo.report({'segmentation': found})
    reason = 'segmentation, fused, bfloat16; compiled, bfloat16; OpenVINO bfloat16: it has no bfloat16'
    assert reason in capsys.readouterr().out.splitlines()


def test_demo_does_not_end_because_of_a_clock(segmentation, monkeypatch, capsys):
    def measure_model(*arguments: object) -> None:
        raise demo.WorkerError('its process ended with status 9')

    monkeypatch.setattr(demo, 'read_config', lambda *arguments: None)
    monkeypatch.setattr(demo, 'build', lambda *arguments: torch.nn.Identity())
    monkeypatch.setattr(demo, 'input_size', lambda cfg: (192, 192))
    monkeypatch.setattr(demo, 'measure_model', measure_model)
    found = outcome(segmentation, 85.9)
    demo.time_forms(demo.TASKS[0], found)
    assert not found.rows and found.points
    demo.report({'segmentation': found})
    shown = capsys.readouterr().out
    assert 'OpenVINO int8: not timed: its process ended with status 9' in shown and shown.count('not timed') == 1
