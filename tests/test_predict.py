"""Predicting: slices, the loop over inputs, the tool as a user runs it, and all of it where there is no torch."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import cv2
import numpy as np
import pytest
from files import red_detector, strongest_channel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from repvit_mm.deploy.metadata import FileInfo
from repvit_mm.deploy.predict import FilePredictor, SlicedPredictor, predict_all, slices
from repvit_mm.deploy.prediction import Detections, LabelMap
from repvit_mm.deploy.results import H264Writer, ResultFolder
from repvit_mm.deploy.runtimes import RuntimeFileError
from repvit_mm.deploy.sources import Source, find_sources

onnx = pytest.importorskip('onnx')
ROOT = Path(__file__).parents[1]
TOOL = ROOT / 'tools/predict.py'
sys.path.append(str(TOOL.parent))
predict_tool = importlib.import_module('predict')

DETECTION = ROOT / 'configs/det/mask_rcnn_repvit_m0_6_fpn_shapes.py'
SEGMENTATION = ROOT / 'configs/seg/fpn_repvit_m0_6_shapes.py'


def picture(*patches: tuple[int, int, int, int], size: tuple[int, int] = (60, 80)) -> np.ndarray:
    """A black image with red patches at x1 y1 x2 y2."""
    image = np.zeros((*size, 3), np.uint8)
    for left, top, right, bottom in patches:
        image[top:bottom, left:right, 2] = 255
    return image


class RedPatches:
    """Finds every red patch; the larger it is, the surer."""

    task, classes, palette, score_threshold = 'detection', ('patch',), (), 0.3

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __call__(self, image: np.ndarray) -> Detections:
        self.seen.append(image.shape[:2])
        count, parts, statistics, _ = cv2.connectedComponentsWithStats((image[..., 2] > 200).astype(np.uint8))
        corners = statistics[1:, :2].astype(np.float32)
        boxes = np.concatenate([corners, corners + statistics[1:, 2:4]], 1)
        scores = (0.5 + statistics[1:, 4] / 1e5).astype(np.float32)
        order = np.argsort(-scores)
        masks = parts == np.arange(1, count)[:, None, None]
        return Detections(boxes[order], scores[order], np.zeros(count - 1, int), masks[order])


class StrongestChannel:
    """Which channel, blue, green or red, is the strongest."""

    task, classes, palette, score_threshold = 'segmentation', ('blue', 'green', 'red'), (), 0.3

    def __call__(self, image: np.ndarray) -> LabelMap:
        return LabelMap(image.argmax(2))


@given(st.integers(1, 3000), st.integers(32, 700), st.floats(0, 0.9))
def test_slices_cover_each_pixel_once(length, size, overlap):
    shared = round(size * overlap)
    cut = slices(length, size, shared)
    taken = [pixel for _, _, first, last in cut for pixel in range(first, last)]
    assert taken == list(range(length))
    for number, (start, end, first, last) in enumerate(cut):
        assert end - start == min(size, length) and 0 <= start <= first < last <= end <= length
        # What is taken keeps away from the slice's own ends, but for those of the image.
        assert number == 0 or first - start >= shared // 2
        assert number == len(cut) - 1 or end - last >= shared // 2


def test_slices_find_each_object_once():
    """Small ones in a slice and on its border, and one larger than a slice, which the whole image shows."""
    patches = [(10, 10, 20, 24), (96, 50, 110, 60), (250, 120, 262, 135), (130, 10, 290, 100)]
    image = picture(*patches, size=(150, 300))
    predictor = RedPatches()
    found = SlicedPredictor(predictor, size=100, overlap=0.2)(image)
    assert sorted(map(tuple, found.boxes.tolist())) == sorted(patches)
    assert (np.diff(found.scores) <= 0).all()
    assert set(predictor.seen) == {(100, 100), (150, 300)}
    for box, mask in zip(found.boxes.astype(int), found.masks, strict=True):
        assert np.array_equal(mask, picture(tuple(box), size=(150, 300))[..., 2] > 0)


def test_slices_find_nothing_where_nothing_is():
    found = SlicedPredictor(RedPatches(), size=100)(picture(size=(150, 300)))
    assert len(found) == 0 and found.boxes.shape == (0, 4)


def test_slices_make_one_label_map():
    image = np.random.default_rng(0).integers(0, 256, (150, 333, 3), dtype=np.uint8)
    found = SlicedPredictor(StrongestChannel(), size=64, overlap=0.3)(image)
    assert np.array_equal(found.labels, image.argmax(2))


def test_image_no_larger_than_a_slice_is_not_sliced():
    predictor = RedPatches()
    assert len(SlicedPredictor(predictor, size=100)(picture((1, 2, 30, 40), size=(90, 100)))) == 1
    assert predictor.seen == [(90, 100)]


def test_file_predicts_and_says_what(tmp_path):
    predictor = FilePredictor(red_detector(tmp_path / 'red.onnx', score_threshold=0.4), threads=1)
    assert (predictor.task, predictor.classes, predictor.score_threshold) == ('detection', ('green', 'red'), 0.4)
    assert predictor(picture((10, 20, 30, 50))).boxes.tolist() == [[10, 20, 30, 50]]


def test_backbone_alone_predicts_nothing(tmp_path, monkeypatch):
    path = strongest_channel(tmp_path / 'file.onnx')
    monkeypatch.setattr(FileInfo, 'from_json', lambda _: FileInfo('backbone', ('map0',)))
    with pytest.raises(RuntimeFileError, match='is a backbone'):
        FilePredictor(path)


@pytest.fixture
def inputs(tmp_path):
    """A folder with two images, a video of five frames, and one file of each that cannot be read."""
    folder = tmp_path / 'inputs'
    folder.mkdir()
    Image.fromarray(picture((10, 20, 30, 50))[..., ::-1]).save(folder / 'a.png')
    Image.fromarray(picture()[..., ::-1]).save(folder / 'b.png')
    with H264Writer(folder / 'film.mp4', 10) as film:
        for number in range(5):
            film.write(picture((10 + number, 20, 40, 50)))
    (folder / 'broken.png').write_text('no image')
    (folder / 'broken.mp4').write_text('no film')
    return folder


def test_everything_is_predicted_and_what_cannot_be_read_is_left_out(tmp_path, inputs):
    predictor = FilePredictor(red_detector(tmp_path / 'red.onnx', masks=True), threads=1)
    sources = find_sources([str(inputs)])
    with ResultFolder(tmp_path / 'out', predictor.task, predictor.classes, predictor.palette) as results:
        steps = list(predict_all(predictor, sources, results))
    done = [(Path(step.source.name).name, step.frame, step.frames) for step in steps if not step.problem]
    assert done == [('a.png', 0, 1), ('b.png', 0, 1), *(('film.mp4', number, 5) for number in range(5))]
    problems = [step.problem for step in steps if step.problem]
    assert len(problems) == 2 and results.skipped == problems
    assert 'broken.mp4' in problems[0] and 'broken.png' in problems[1]
    content = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert len(content['images']) == 7 and len(content['annotations']) == 6  # b.png shows nothing
    assert content['annotations'][0]['bbox'] == [10, 20, 20, 30]


@pytest.mark.parametrize(('threshold', 'found'), [(None, 1), (0.75, 1), (0.76, 0)])
def test_detections_below_the_threshold_are_left_out(tmp_path, inputs, threshold, found):
    predictor = FilePredictor(red_detector(tmp_path / 'red.onnx'), threads=1)
    with ResultFolder(tmp_path / 'out', predictor.task, predictor.classes) as results:
        list(predict_all(predictor, [Source(str(inputs / 'a.png'))], results, threshold))
    assert len(json.loads((tmp_path / 'out/predictions.json').read_text())['annotations']) == found


def test_video_may_be_cut_short(tmp_path, inputs):
    predictor = RedPatches()
    with ResultFolder(tmp_path / 'out', predictor.task, predictor.classes) as results:
        steps = list(predict_all(predictor, [Source(str(inputs / 'film.mp4'), 'video')], results, max_frames=3))
    assert len(steps) == len(predictor.seen) == 3


COMPILED = {'PYTHONDONTWRITEBYTECODE': ''}
"""Lets a Python keep what it compiles, for the next one."""


def launch(folder: Path, *arguments: str | Path, python: str | Path = sys.executable, **environment: str):
    command = [str(part) for part in (python, TOOL, *arguments)]
    variables = {**os.environ, **COMPILED, 'OMP_NUM_THREADS': '2', **environment}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=variables, check=False)


def check_output(folder: Path, done: subprocess.CompletedProcess) -> None:
    """The tool predicted on the folder ``inputs``, and said what it left out."""
    assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr
    assert done.stdout.splitlines()[-1] == 'out/index.html'
    text = ' '.join(done.stderr.split())
    assert 'warning: inputs/broken.png is no image or a damaged one: skipped' in text
    assert '2 of 5 inputs could not be read, inputs/broken.mp4' in text
    assert len(json.loads((folder / 'out/predictions.json').read_text())['images']) == 7
    assert {path.name for path in (folder / 'out/pictures').iterdir()} == {'a.png', 'b.png', 'film.mp4'}
    assert (folder / 'out/index.html').is_file()


@pytest.mark.slow
@pytest.mark.parametrize('options', [[], ['--slice', '--slice-size', '64', '--score-thr', '0.5', '--threads', '1']])
def test_tool_predicts_with_a_file(tmp_path, inputs, options):
    red_detector(tmp_path / 'red.onnx', masks=True)
    check_output(tmp_path, launch(tmp_path, 'red.onnx', 'inputs', '--out', 'out', *options))


WRONG = {
    'no such file': (['absent.onnx', 'a.png'], 'absent.onnx not found'),
    'no exported file': (['a.png', 'a.png'], 'a.png is no exported file'),
    'not made here': (['plain.onnx', 'a.png'], 'plain.onnx says nothing of its classes'),
    'damaged file': (['damaged.onnx', 'a.png'], 'damaged.onnx cannot be opened'),
    'no such input': (['red.onnx', 'absent.png'], 'absent.png not found'),
    'empty folder': (['red.onnx', 'empty'], 'empty is a folder without images'),
    'fusing a file': (['red.onnx', 'a.png', '--fuse'], '--fuse is for a config and a checkpoint'),
    'a device for a file': (['red.onnx', 'a.png', '--device', 'cpu'], '--device is for a config'),
    'score out of range': (['red.onnx', 'a.png', '--score-thr', '30'], '--score-thr 30.0: expected a number from 0'),
    'slices too small': (['red.onnx', 'a.png', '--slice', '--slice-size', '3'], '--slice-size 3: expected at least'),
    'too much overlap': (['red.onnx', 'a.png', '--slice-overlap', '1'], '--slice-overlap 1.0: expected a number'),
    'no frame': (['red.onnx', 'a.png', '--frames', '0'], '--frames 0: expected at least 1'),
    'a file for a folder': (['red.onnx', 'a.png', '--out', 'a.png'], '--out a.png is a file'),
    'nothing to predict on': ([DETECTION, 'absent.pth'], 'nothing to predict on'),
    'no such config': (['absent.py', 'absent.pth', 'a.png'], 'config absent.py not found'),
    'no such checkpoint': ([DETECTION, 'absent.pth', 'a.png'], 'checkpoint absent.pth not found'),
    'threads of a config': ([DETECTION, 'absent.pth', 'a.png', '--threads', '2'], '--threads is for an exported file'),
}


@pytest.fixture(scope='module')
def wrong_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wrong')
    Image.fromarray(picture()).save(folder / 'a.png')
    red_detector(folder / 'red.onnx')
    (folder / 'empty').mkdir()
    (folder / 'damaged.onnx').write_text('no file')
    plain = onnx.load(folder / 'red.onnx')
    del plain.metadata_props[:]
    onnx.save(plain, folder / 'plain.onnx')
    return folder


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use_gets_one_line(wrong_folder, monkeypatch, case):
    arguments, expected = WRONG[case]
    out = [] if '--out' in arguments else ['--out', 'out']
    monkeypatch.chdir(wrong_folder)
    monkeypatch.setattr(sys, 'argv', ['predict.py', *map(str, arguments), *out])
    with pytest.raises(SystemExit) as exit_:
        predict_tool.main()
    assert expected in exit_.value.code and '\n' not in exit_.value.code
    assert not (wrong_folder / 'out').exists()


@pytest.fixture(scope='module')
def bare_python(tmp_path_factory):
    """A Python with what ``pip install 'repvit_mm[runtime]'`` brings and nothing else."""
    folder = tmp_path_factory.mktemp('bare')
    venv.create(folder)
    python = folder / 'bin/python'
    # A copy: an editable install leaves links in the tree.
    source = folder / 'source'
    source.mkdir()
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'model-index.yml', 'configs', 'tools', 'repvit_mm'):
        subprocess.run(['cp', '-rL', ROOT / name, source], check=True)
    # What is imported is compiled as it is: most of it never is.
    done = pip(python, 'install', '-q', '--no-compile', f'{source}[runtime]')
    assert done.returncode == 0, done.stderr
    return python


def pip(python: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the pip of this Python for another one."""
    command = [sys.executable, '-m', 'pip', '--python', python, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_file_needs_no_torch(tmp_path, inputs, bare_python):
    listed = pip(bare_python, 'list').stdout
    assert 'onnxruntime' in listed
    assert not re.search(r'^(torch|mm\w+|openmim|onnx|pycocotools)\s', listed, re.MULTILINE), listed
    red_detector(tmp_path / 'red.onnx', masks=True)
    check_output(tmp_path, launch(tmp_path, 'red.onnx', 'inputs', '--out', 'out', python=bare_python, PYTHONPATH=''))
    done = launch(tmp_path, DETECTION, 'x.pth', 'inputs', '--out', 'other', python=bare_python, PYTHONPATH='')
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert "pip install 'torch>=" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_file_without_torch_gives_the_same_pictures(tmp_path, inputs, bare_python, task):
    make = red_detector if task == 'detection' else strongest_channel
    make(tmp_path / 'file.onnx')
    for out, python in (('here', sys.executable), ('there', bare_python)):
        launch(tmp_path, 'file.onnx', 'inputs/a.png', '--out', out, python=python, PYTHONPATH=str(ROOT))
    for name in ('pictures/a.png', *(['labels/a.png'] if task == 'segmentation' else [])):
        here, there = (np.array(Image.open(tmp_path / out / name)) for out in ('here', 'there'))
        assert np.array_equal(here, there)
    here, there = ((tmp_path / out / 'predictions.json').read_text() for out in ('here', 'there'))
    assert here == there


EXAMPLE = ROOT / 'examples/predict_onnx.py'


def test_example_is_short_and_imports_little():
    text = EXAMPLE.read_text()
    assert text.count('\n') < 60
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, 'module', None) or node.names[0].name for node in imports}
    assert names == {'json', 'sys', 'numpy', 'onnxruntime', 'PIL'}


FITS = {
    'any size': {},
    'resized': {'scale': (160, 120), 'keep_ratio': True},
    'stretched': {'scale': (160, 160)},
    'padded': {'scale': (160, 120), 'keep_ratio': True, 'sizes': ((200, 170),)},
    'halved': {'sizes': ((30, 40),)},
    'on a canvas': {'scale': (160, 120), 'keep_ratio': True, 'canvas': (200, 200), 'sizes': ((200, 200),)},
}


def run_example(python: str | Path, *arguments: Path) -> np.ndarray:
    command = [python, EXAMPLE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **COMPILED})
    assert done.returncode == 0 and not done.stderr, done.stderr
    return np.array(Image.open(arguments[-1]))


@pytest.mark.slow
@pytest.mark.parametrize('fields', FITS.values(), ids=FITS)
def test_example_draws_what_a_file_sees(tmp_path, bare_python, fields):
    image = picture((10, 20, 40, 50))
    Image.fromarray(image[..., ::-1]).save(tmp_path / 'photo.png')
    files = tmp_path / 'file.onnx', tmp_path / 'photo.png', tmp_path / 'picture.png'
    red_detector(files[0], masks=True, palette=((0, 200, 0), (0, 0, 200)), **fields)
    drawn = run_example(bare_python, *files)
    assert drawn.shape == image.shape
    touched = np.argwhere((drawn != image[..., ::-1]).any(2))
    assert np.abs(touched.min(0) - (20, 10)).max() <= 2 and touched.max(0)[1] >= 38
    assert abs(int(drawn[40, 30, 0]) - 127) <= 2 and abs(int(drawn[40, 30, 2]) - 100) <= 2  # the mask, half opaque
    assert drawn[40, 10].tolist() == [0, 0, 200]  # the box

    strongest_channel(files[0], palette=((0, 0, 200), (0, 200, 0), (200, 0, 0)), **fields)
    drawn = run_example(bare_python, *files)
    assert np.abs(drawn[25:45, 15:35].astype(int) - (127, 0, 100)).max() <= 1
