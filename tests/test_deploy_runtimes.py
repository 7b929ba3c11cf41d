"""What a file says of itself, and how files are opened and run; exporting them is tested elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repvit_mm.deploy import runtimes
from repvit_mm.deploy.metadata import KEY, FileInfo, MetadataError
from repvit_mm.deploy.runtimes import RUNTIMES, RuntimeFileError, open_file, preprocess

onnx = pytest.importorskip('onnx')

ROOT = Path(__file__).parents[1]
INFO = FileInfo(
    task='segmentation',
    outputs=('logits',),
    classes=('sky', 'sea'),
    palette=((0, 0, 255), (0, 128, 128)),
    batch=None,
    mean=(1.0, 2.0, 3.0),
    std=(4.0, 5.0, 6.0),
    divisor=32,
    scale=(2048, 512),
    keep_ratio=True,
    sha256='ab' * 32,
    versions={'torch': '2.13.0'},
)

sides = st.integers(1, 10_000)
infos = st.builds(
    FileInfo,
    task=st.sampled_from(['detection', 'segmentation', 'backbone']),
    outputs=st.tuples(st.text()),
    classes=st.lists(st.text(), max_size=3).map(tuple),
    palette=st.lists(st.tuples(*[st.integers(0, 255)] * 3), max_size=3).map(tuple),
    sizes=st.lists(st.tuples(sides, sides), max_size=3).map(tuple),
    batch=st.none() | st.integers(1, 8),
    mean=st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3),
    scale=st.none() | st.tuples(sides, sides),
    versions=st.dictionaries(st.text(), st.text(), max_size=2),
)


def add_one(path: Path, info: FileInfo | str | None, *outputs: str, batch: int | str = 'n') -> Path:
    """An ONNX file that adds 1 to an image, under the name of each of its outputs."""
    shape = [batch, 3, 'h', 'w']
    one = onnx.helper.make_tensor('one', onnx.TensorProto.FLOAT, [], [1.0])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node('Add', ['images', 'one'], [name]) for name in outputs],
        'add',
        [onnx.helper.make_tensor_value_info('images', onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in outputs],
        [one],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 17)], ir_version=8)
    if info is not None:
        onnx.helper.set_model_props(model, {KEY: info if isinstance(info, str) else info.to_json()})
    onnx.save(model, path)
    return path


@given(infos)
def test_description_survives_json(info):
    assert FileInfo.from_json(info.to_json()) == info
    assert FileInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info


def test_description_of_a_later_version_is_read():
    assert FileInfo.from_dict(INFO.to_dict() | {'new': 1}) == INFO


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('', 'no JSON'),
        ('[]', 'no JSON object'),
        ('{}', "missing .* 'task' and 'outputs'"),
        ('{"task": "magic", "outputs": []}', "task is 'magic': expected one of detection"),
    ],
)
def test_what_is_no_description_is_refused(text, reason, tmp_path):
    with pytest.raises(MetadataError, match=reason):
        FileInfo.from_json(text)
    if text:
        with pytest.raises(RuntimeFileError, match=reason):
            open_file(add_one(tmp_path / 'file.onnx', text, 'logits'))


def test_default_size():
    assert FileInfo('backbone', (), sizes=((64, 96), (32, 32))).size == (64, 96)
    assert FileInfo('backbone', ()).size is None


def test_run_names_the_outputs(tmp_path):
    info = FileInfo('backbone', ('map1', 'map0'), batch=None)
    runtime = open_file(add_one(tmp_path / 'file.onnx', info, 'map1', 'map0'), threads=1)
    assert runtime.info == info
    images = np.random.default_rng(0).random((2, 3, 4, 5))  # in float64, which is no reason to refuse them
    outputs = runtime.run(images)
    assert list(outputs) == ['map1', 'map0']
    np.testing.assert_array_equal(outputs['map0'], images.astype(np.float32) + 1)


def test_batches_are_divided(tmp_path):
    runtime = open_file(add_one(tmp_path / 'one.onnx', FileInfo('backbone', ('map0',)), 'map0', batch=1))
    images = np.random.default_rng(0).random((3, 3, 4, 5), np.float32)
    np.testing.assert_array_equal(runtime.run(images)['map0'], images + 1)
    pairs = open_file(add_one(tmp_path / 'two.onnx', FileInfo('backbone', ('map0',), batch=2), 'map0', batch=2))
    with pytest.raises(RuntimeFileError, match='takes 2 images at once, not 3'):
        pairs.run(images)


def test_shorter_lists_of_detections_are_filled_up():
    lists = [np.full((1, count), 7, np.int64) for count in (0, 3, 2)]
    np.testing.assert_array_equal(runtimes.join('labels', lists), [[-1, -1, -1], [7, 7, 7], [7, 7, -1]])
    np.testing.assert_array_equal(runtimes.join('scores', lists), [[0, 0, 0], [7, 7, 7], [7, 7, 0]])
    masks = [np.ones((1, count, 2, 2), bool) for count in (1, 2)]
    assert runtimes.join('masks', masks).sum() == 12
    assert runtimes.join('boxes', [np.ones((1, count, 4)) for count in (1, 2)]).shape == (2, 2, 4)


def test_images_are_normalized_and_padded_for_a_file_that_does_not(tmp_path):
    info = FileInfo('backbone', ('map0',), mean=INFO.mean, std=INFO.std, divisor=32, preprocessing_inside=False)
    runtime = open_file(add_one(tmp_path / 'file.onnx', info, 'map0', batch=1))
    images = np.random.default_rng(0).random((1, 3, 33, 64), np.float32)
    found = runtime.run(images)['map0'] - 1
    assert found.shape == (1, 3, 64, 64)
    assert not found[:, :, 33:].any()
    np.testing.assert_allclose(found[0, 2, :33], (images[0, 2] - 3) / 6, atol=1e-6)
    assert preprocess(images[:, :, :32], info).shape == (1, 3, 32, 64), 'multiples are not padded'


@pytest.mark.parametrize('shape', [(3, 4, 5), (1, 1, 4, 5), (0, 3, 4, 5), (1, 3, 0, 5)])
def test_what_is_no_batch_of_images_is_refused(shape, tmp_path):
    runtime = open_file(add_one(tmp_path / 'file.onnx', INFO, 'logits'))
    with pytest.raises(RuntimeFileError, match=r'takes images \(N, 3, H, W\), not an array of shape'):
        runtime.run(np.zeros(shape))


def test_another_size_is_refused(tmp_path):
    info = FileInfo('backbone', ('map0',), sizes=((64, 96), (32, 32)))
    runtime = open_file(add_one(tmp_path / 'file.onnx', info, 'map0'))
    assert runtime.run(np.zeros((1, 3, 32, 32)))['map0'].shape == (1, 3, 32, 32)
    with pytest.raises(RuntimeFileError, match=r'images of 64x96 or 32x32 pixels \(height x width\), not 96x64'):
        runtime.run(np.zeros((1, 3, 96, 64)))


@pytest.mark.parametrize('suffix', RUNTIMES)
def test_damaged_files_are_refused_in_one_line(suffix, tmp_path):
    if suffix == '.pte':
        pytest.importorskip('executorch')
    path = tmp_path / f'file{suffix}'
    path.write_bytes(b'not at all')
    path.with_suffix('.bin').write_bytes(b'')
    with pytest.raises(RuntimeFileError, match=r'cannot be opened by') as error:
        open_file(path)
    assert '\n' not in str(error.value)


def test_files_that_are_none_of_ours_are_refused(tmp_path):
    with pytest.raises(RuntimeFileError, match='says nothing of its classes'):
        open_file(add_one(tmp_path / 'file.onnx', None, 'logits'))
    with pytest.raises(RuntimeFileError, match='not found'):
        open_file(tmp_path / 'none.onnx')
    with pytest.raises(RuntimeFileError, match=r'expected a name that ends in \.onnx'):
        open_file(tmp_path / 'file.pth')
    with pytest.raises(RuntimeFileError, match='macOS'):
        open_file(tmp_path / 'file.mlpackage')
    (tmp_path / 'file.xml').write_text('<xml/>')
    with pytest.raises(RuntimeFileError, match=r'has no file\.bin beside it'):
        open_file(tmp_path / 'file.xml')


def test_missing_library_is_named(tmp_path, monkeypatch):
    path = add_one(tmp_path / 'file.onnx', INFO, 'logits')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(RuntimeFileError, match='needs the package onnxruntime: pip install onnxruntime'):
        open_file(path)


def test_no_library_is_imported_before_a_file_is_opened():
    program = (
        'import sys, types; package = types.ModuleType("repvit_mm"); '
        f'package.__path__ = [{str(ROOT / "repvit_mm")!r}]; sys.modules["repvit_mm"] = package; '
        'import repvit_mm.deploy.runtimes; '
        'print(*sorted({"torch", "mmengine", "onnxruntime", "openvino", "executorch"} & set(sys.modules)))'
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
