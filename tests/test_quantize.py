"""Int8 files: what computes in int8, how far they are off, and which are refused."""

import copy
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from small_models import small_config, small_model

from repvit_mm.compat.openvino import openvino_core
from repvit_mm.datasets.shapes import write_shapes
from repvit_mm.deploy.export import EXPORTERS, Exportable, Options, build_graph, quiet, random_images
from repvit_mm.deploy.graph import ExportError
from repvit_mm.deploy.load import fuse_model
from repvit_mm.deploy.metadata import KEY, FileInfo
from repvit_mm.deploy.quantize import quantize_file, write_executorch
from repvit_mm.deploy.runtimes import OnnxRuntime, RuntimeFileError, open_file

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
from repvit_mm.deploy.int8 import (  # noqa: E402
    HALF_RANGE,
    Candidate,
    Int8Options,
    Int8Report,
    check_int8,
    check_target,
    choose,
    export_int8,
    in_points,
    judge,
)
from repvit_mm.deploy.qdq import QdqNetwork, set_description  # noqa: E402
from repvit_mm.deploy.sensitivity import Sensitivity, measure  # noqa: E402
from repvit_mm.deploy.structure import Layer  # noqa: E402

SIZE = (64, 64)
OPTIONS = Options(sizes=(SIZE,), logits=True)
NEAR = 0.2
"""Relative L2 error of an int8 file's logits: a network that was not trained is off by 0.07 to 0.11 in the full range
of weights, by 0.12 to 0.15 in half of it, and by 0.45 where products saturate in OpenVINO."""

EXACT = 0.01
"""The same between a file's 8-bit arithmetic and that of the same numbers in float. Both are exact but for roundings of
float, which now and then make a number one step larger; saturation makes it 0.3."""


def calibration(count: int = 4) -> list[np.ndarray]:
    return list(random_images(count, SIZE)[:, None])


def float_file(folder: Path, target: str) -> Path:
    graph = build_graph(fuse_model(small_model('semantic_fpn')), target, OPTIONS)
    info = FileInfo('segmentation', graph.outputs, sizes=(SIZE,))
    path = folder / f'float{EXPORTERS[target].suffix}'
    with torch.no_grad(), quiet():
        EXPORTERS[target].write(graph, torch.from_numpy(random_images(1, SIZE)), info, path, OPTIONS)
    return path


@pytest.fixture(scope='module')
def onnx_file(tmp_path_factory) -> Path:
    return float_file(tmp_path_factory.mktemp('onnx'), 'onnx')


@pytest.fixture(scope='module')
def network(onnx_file) -> QdqNetwork:
    return QdqNetwork(onnx_file, calibration())


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def error_of(found: Path, expected: Path) -> float:
    """Relative L2 error of a file's logits."""
    return distance(*(open_file(path, 1).run(calibration()[0])['logits'] for path in (found, expected)))


def exact_logits(path: Path) -> np.ndarray:
    """Logits of an ONNX file whose 8-bit numbers are made float before they are multiplied, as every processor can."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry('session.disable_quant_qdq', '1')
    return onnxruntime.InferenceSession(str(path), options).run(None, {'images': calibration()[0]})[0]


def run_elsewhere(python: list[str], image: Path, files: list[Path], **variables: str) -> list[np.ndarray]:
    """Logits of some files in a process of its own, on an image ``(1, 3, H, W)`` that is saved as an array."""
    code = (
        'import sys, numpy; sys.modules["torch"] = None  # as if it were not installed: it takes long to emulate\n'
        'from repvit_mm.deploy.runtimes import open_file\n'
        'for path in sys.argv[2:]: numpy.save(path, open_file(path, 1).run(numpy.load(sys.argv[1]))["logits"])'
    )
    subprocess.run([*python, '-c', code, image, *files], env={**os.environ, **variables}, check=True)
    return [np.load(f'{path}.npy') for path in files]


def quantized_inputs(model: 'onnx.ModelProto', name: str) -> list[bool]:
    """Whether each input of a node comes from a dequantize node."""
    makers = {output: node for node in model.graph.node for output in node.output}
    (node,) = (node for node in model.graph.node if node.name == name)
    return [name in makers and makers[name].op_type == 'DequantizeLinear' for name in node.input]


class TestOnnx:
    def test_int8_is_near_float(self, onnx_file, tmp_path):
        """In half of the range no sum saturates, and the full one is run by other kernels where sums would."""
        path = tmp_path / 'int8.onnx'
        for reduce_range in (True, False):
            quantize_file(onnx_file, path, calibration(), reduce_range=reduce_range)
            exact = exact_logits(path)
            assert 0 < distance(exact, exact_logits(onnx_file)) < NEAR
            assert distance(open_file(path, 1).run(calibration()[0])['logits'], exact) < EXACT
            info = open_file(path).info
            assert info.precision == 'int8' and info.exact_products == (not reduce_range)
            plain = replace(info, precision='float32', exact_products=False, versions={})
            assert plain == open_file(onnx_file).info

    def test_half_of_the_range_takes_seven_bits(self, network):
        """So no sum of two products saturates; see test_saturation.py."""
        for reduce_range, highest in ((True, 64), (False, 127)):
            model = network.quantized(network.structure.layers, reduce_range)
            arrays = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
            weights = [array for array in arrays if array.dtype == np.int8 and array.ndim == 4]
            assert max(int(abs(weight.astype(int)).max()) for weight in weights) == highest

    def test_what_runs_here_is_right_here(self, onnx_file, tmp_path):
        """Where products saturate, half of the range is taken unless one asks for all."""
        path = tmp_path / 'int8.onnx'
        quantize_file(onnx_file, path, calibration())
        assert open_file(path).info.exact_products == (not open_file(path).saturates())
        assert 0 < error_of(path, onnx_file) < NEAR

    def test_weights_have_a_scale_for_each_channel(self, network):
        model = network.quantized(network.structure.layers)
        tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        kernels = [
            node
            for node in model.graph.node
            if node.op_type == 'DequantizeLinear' and node.input[0] in tensors and tensors[node.input[0]].ndim == 4
        ]
        assert len(kernels) == sum(layer.kind == 'conv' for layer in network.structure.layers)
        for node in kernels:
            kernel, scale = (tensors[name] for name in node.input[:2])
            assert kernel.dtype == np.int8 and scale.shape == kernel.shape[:1]

    def test_activations_are_unsigned(self, network):
        """ONNX Runtime has no fast kernel for signed ones."""
        model = network.quantized(network.structure.layers)
        tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        zeros = [tensors[node.input[2]] for node in model.graph.node if node.op_type == 'QuantizeLinear']
        assert len(zeros) > 20 and all(zero.dtype == np.uint8 for zero in zeros)

    def test_chosen_layers_stay_in_float(self, network):
        convs = [layer for layer in network.structure.layers if layer.kind == 'conv']
        model = network.quantized([layer for layer in network.structure.layers if layer is not convs[0]])
        assert not any(quantized_inputs(model, convs[0].name))
        assert all(all(quantized_inputs(model, conv.name)[:2]) for conv in convs[1:])

    def test_gelu_is_one_node(self, network):
        operators = [node.op_type for node in network.float_model.graph.node]
        assert 'Gelu' in operators and 'Erf' not in operators

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which('qemu-x86_64') is None, reason='needs qemu-x86_64')
    def test_without_vnni(self, onnx_file, tmp_path):
        """On an emulated processor: ONNX Runtime cannot be told to leave instructions alone."""
        files = {name: tmp_path / f'{name}.onnx' for name in ('full', 'half', 'kept')}
        for name, path in files.items():
            quantize_file(onnx_file, path, calibration(), reduce_range=name == 'half')
        model = onnx.load(files['kept'])  # as if it had been the better one there
        set_description(model, KEY, replace(open_file(files['kept']).info, exact_products=False).to_json())
        onnx.save(model, files['kept'])
        np.save(tmp_path / 'image.npy', calibration()[0])
        python = ['qemu-x86_64', '-cpu', 'Haswell', sys.executable]
        found = run_elsewhere(python, tmp_path / 'image.npy', list(files.values()))
        errors = {
            name: distance(logits, exact_logits(path))
            for (name, path), logits in zip(files.items(), found, strict=True)
        }
        assert max(errors['full'], errors['half']) < EXACT < 0.1 < errors['kept']

    def test_what_cannot_be_quantized_is_refused(self, onnx_file, tmp_path):
        quantize_file(onnx_file, tmp_path / 'int8.onnx', calibration())
        with pytest.raises(RuntimeFileError, match='it is in int8 already'):
            quantize_file(tmp_path / 'int8.onnx', tmp_path / 'again.onnx', calibration())
        with pytest.raises(RuntimeFileError, match=r'expected a name that ends in \.onnx or \.xml'):
            quantize_file(tmp_path / 'model.pt', tmp_path / 'int8.pt', calibration())


@pytest.mark.slow
class TestSensitivity:
    def test_a_channel_out_of_all_proportion_stays_in_float(self, onnx_file, tmp_path):
        """One that nothing takes notice of changes no float map, but leaves the others few of the 256 values."""
        model = onnx.load(onnx_file)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        module = 'model.backbone.stages.2.1.channel_mixer'
        for name, place, value in (
            (f'{module}.expand.bias', 0, 1e4),
            (f'{module}.project.weight', (slice(None), 0), 0.0),
        ):
            array = onnx.numpy_helper.to_array(tensors[name]).copy()
            array[place] = value
            tensors[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
        path = tmp_path / 'planted.onnx'
        onnx.save(model, path)

        found = measure(QdqNetwork(path, calibration()), calibration(), 1)
        kept = {layer.module for layer in found.float_layers}
        assert {'backbone.stages.2.1.channel_mixer.expand', 'backbone.stages.2.1.channel_mixer.project'} <= kept
        first = found.kept[0]
        assert first.after < 0.2 < first.before and first.alone > 10 * np.median(list(found.alone.values()))
        assert f'stays in float: {first}' in str(found)

    def test_each_layer_is_measured(self, network):
        found = measure(network, calibration(), 1)
        assert list(found.alone) == list(network.structure.layers)
        assert all(0 <= error < 0.5 for error in found.alone.values()) and max(found.alone.values()) > 0


@pytest.mark.slow
def test_openvino_is_near_float_and_keeps_chosen_layers(network, tmp_path):
    pytest.importorskip('openvino')
    pytest.importorskip('nncf')
    path = float_file(tmp_path, 'openvino')
    kept = next(layer for layer in network.structure.layers if layer.module.endswith('stem.conv2'))
    quantize_file(path, tmp_path / 'int8.xml', calibration(), [kept])
    assert 0 < error_of(tmp_path / 'int8.xml', path) < NEAR
    assert open_file(path).saturates() != open_file(tmp_path / 'int8.xml').info.exact_products
    model = openvino_core().read_model(tmp_path / 'int8.xml')
    convs = [op for op in model.get_ordered_ops() if 'Convolution' in op.get_type_name()]
    # NNCF itself leaves squeeze-and-excitation in float.
    floats = {op.get_friendly_name() for op in convs if op.input_value(1).get_node().get_type_name() == 'Constant'}
    assert {name for name in floats if '/se/' not in name} == {f'{kept.name}/WithoutBiases'}
    for op in convs:
        if op.get_friendly_name() not in floats:
            assert op.input_value(0).get_node().get_type_name() == 'FakeQuantize'
            scale = op.input_value(1).get_node().input_value(1)
            assert scale.get_shape()[0] > 1 or op.get_output_shape(0)[1] == 1, 'one scale for all channels'


@pytest.mark.slow
def test_openvino_computes_the_same_in_half_of_the_range_without_vnni(tmp_path):
    """Its library oneDNN may be told to leave newer instructions alone."""
    pytest.importorskip('openvino')
    pytest.importorskip('nncf')
    goal = tmp_path / 'int8.xml'
    quantize_file(float_file(tmp_path, 'openvino'), goal, calibration(), reduce_range=True)
    np.save(tmp_path / 'image.npy', calibration()[0])
    found = run_elsewhere([sys.executable], tmp_path / 'image.npy', [goal], ONEDNN_MAX_CPU_ISA='AVX2')
    assert distance(found[0], open_file(goal, 1).run(calibration()[0])['logits']) < EXACT


@pytest.mark.slow
def test_openvino_computes_in_bfloat16_where_the_processor_does(tmp_path):
    pytest.importorskip('openvino')
    from repvit_mm.deploy.int8 import _tell_bfloat16
    from repvit_mm.deploy.runtimes import has_bfloat16

    path, goal = float_file(tmp_path, 'openvino'), tmp_path / 'bf16.xml'
    assert _tell_bfloat16(path, goal, open_file(path).info) == has_bfloat16()
    if not has_bfloat16():
        pytest.skip('the processor has no bfloat16')
    assert open_file(goal).info.precision == 'bfloat16'
    assert 1e-4 < error_of(goal, path) < 0.05


@pytest.mark.slow
def test_executorch_is_near_float(tmp_path, onnx_file):
    """Beside the float file of ONNX, which takes a fraction of the time to write."""
    pytest.importorskip('executorch')
    pytest.importorskip('torchao')
    goal = tmp_path / 'int8.pte'
    graph = build_graph(fuse_model(small_model('semantic_fpn')), 'executorch', OPTIONS)
    write_executorch(graph, goal, open_file(onnx_file).info, calibration())
    assert 0.01 < error_of(goal, onnx_file) < NEAR
    assert goal.stat().st_size < 0.7 * onnx_file.stat().st_size and open_file(goal).info.precision == 'int8'


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Config:
    """A small segmentor's config on a few images."""
    folder = tmp_path_factory.mktemp('shapes')
    write_shapes(folder, train=4, val=3, size=64, seed=0)
    cfg = small_config('semantic_fpn')
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(folder / Path(loader.dataset.data_root).relative_to('data/shapes'))
        loader.num_workers, loader.persistent_workers = 0, False
    return cfg


@pytest.mark.slow
class TestBothRanges:
    """Where products saturate, files of both ranges are made."""

    def export(self, cfg: Config, path: Path, **options: object) -> Int8Report:
        exportable = Exportable.prepare(fuse_model(small_model('semantic_fpn')), cfg, None, 'onnx', OPTIONS)
        return export_int8(exportable, path, cfg, Int8Options(4, max_drop=100.0, **options), rounds=0)

    @pytest.fixture
    def measured(self, monkeypatch) -> dict[str, float]:
        """What the metric says of each file, in the order in which they are tested."""
        values = {'float32': 50.0, 'int8': 48.0, HALF_RANGE: 49.5}
        names = iter([])

        def evaluate(cfg: Config, path: Path) -> dict[str, float]:
            nonlocal names
            names = iter(values) if path.parent.name == 'float32' else names
            name = next(names)
            assert path.parent.name == name
            return {'mIoU': values[name]}

        monkeypatch.setattr('repvit_mm.deploy.int8.evaluate', evaluate)
        return values

    @pytest.fixture
    def saturating(self, monkeypatch) -> None:
        monkeypatch.setattr(OnnxRuntime, 'saturates', classmethod(lambda cls: True))

    @pytest.mark.parametrize(('full', 'kept'), [(48.0, HALF_RANGE), (49.9, 'int8')])
    def test_the_better_one_is_kept(self, shapes, tmp_path, measured, saturating, full, kept):
        measured['int8'] = full
        found = self.export(shapes, tmp_path / 'a.onnx')
        assert {candidate.precision for candidate in found.candidates} == {'float32', 'int8', HALF_RANGE}
        assert found.candidates[-1].precision == kept and f'{kept} is kept, the better one by the metric' in str(found)
        info = open_file(tmp_path / 'a.onnx').info
        assert info.precision == 'int8' and not info.exact_products, 'it was measured here'
        largest = 64 if kept == HALF_RANGE else 127
        arrays = map(onnx.numpy_helper.to_array, onnx.load(tmp_path / 'a.onnx').graph.initializer)
        weights = [array for array in arrays if array.dtype == np.int8 and array.ndim == 4]
        assert max(int(abs(weight.astype(int)).max()) for weight in weights) == largest
        assert f'"precision": "{kept}"' in (tmp_path / 'a.onnx.int8.json').read_text()

    def test_without_a_metric_half_of_the_range_is_kept(self, shapes, tmp_path, saturating):
        cfg = copy.deepcopy(shapes)
        cfg.test_dataloader.dataset.data_root = str(tmp_path / 'nowhere')
        found = self.export(cfg, tmp_path / 'a.onnx')
        assert found.candidates[-1].precision == HALF_RANGE
        assert 'which is right on every processor' in str(found) and 'the metric was not measured' in str(found)

    def test_what_would_be_accepted_is_chosen(self):
        """Not the one that is better on average if it loses too much of one metric."""
        reference = {'bbox_mAP': 50.0, 'segm_mAP': 50.0}
        points = {
            'int8': {'bbox_mAP': 50.2, 'segm_mAP': 48.8},
            HALF_RANGE: {'bbox_mAP': 49.2, 'segm_mAP': 49.2},
        }
        assert choose(reference, points) == HALF_RANGE
        points['int8']['segm_mAP'] = 49.2
        assert choose(reference, points) == 'int8', 'the larger sum, where the larger loss is the same'
        for nan in points['int8']:
            assert choose(reference, {**points, 'int8': {**points['int8'], nan: float('nan')}}) == HALF_RANGE
        assert choose(reference, {name: reference for name in points}) == 'int8'
        assert choose({}, {name: {} for name in points}) == HALF_RANGE

    def test_what_is_asked_for_is_made_alone(self, shapes, tmp_path, saturating):
        found = self.export(shapes, tmp_path / 'a.onnx', reduce_range=True)
        assert [candidate.precision for candidate in found.candidates] == ['float32', HALF_RANGE]

    def test_exact_products_need_one_file_which_says_so(self, shapes, tmp_path, monkeypatch):
        monkeypatch.setattr(OnnxRuntime, 'saturates', classmethod(lambda cls: False))
        found = self.export(shapes, tmp_path / 'a.onnx')
        assert [candidate.precision for candidate in found.candidates] == ['float32', 'int8']
        assert open_file(tmp_path / 'a.onnx').info.exact_products
        assert '--reduce-range makes a file for every processor' in str(found)


class Outputs:
    """A file's outputs, of which each run gives the next image's."""

    def __init__(self, task: str, **outputs: np.ndarray) -> None:
        self.info, self.outputs, self.place = FileInfo(task, tuple(outputs)), outputs, 0

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        start, self.place = self.place, self.place + len(images)
        return {name: array[start : self.place] for name, array in self.outputs.items()}


class TestBrokenFiles:
    """Only they are refused before the metric is known."""

    IMAGES = tuple(np.zeros((1, 3, 8, 8), np.float32) for _ in range(2))

    def detections(self, boxes: np.ndarray, scores: np.ndarray) -> Outputs:
        labels = np.where(scores > 0, 1, -1)
        return Outputs('detection', boxes=boxes, scores=scores, labels=labels, count=(scores > 0).sum(1))

    def test_one_weak_detection_of_three_does_not_decide(self):
        boxes = np.random.default_rng(0).uniform(0, 100, (2, 3, 4)).astype(np.float32)
        scores = np.array([[0.9, 0.8, 0.75], [0.9, 0.7, 0.0]], np.float32)
        other = scores.copy()
        other[0, 2] = 0.0
        found = check_int8(self.detections(boxes, scores), self.detections(boxes + 0.4, other), self.IMAGES)
        assert found.tolerated and '1 have no counterpart' in found.text

    def test_the_only_detection_does_not_decide(self):
        boxes, scores = np.ones((2, 1, 4), np.float32), np.array([[0.4], [0.0]], np.float32)
        found = check_int8(self.detections(boxes, scores), self.detections(boxes, 0 * scores), self.IMAGES)
        assert found.tolerated and found.text.startswith('0 detections differ') and '1 have no' in found.text

    def test_images_of_several_sizes_count_as_one(self):
        """In one image all detections are lost, in the other none."""
        boxes = np.random.default_rng(0).uniform(0, 100, (2, 12, 4)).astype(np.float32)
        scores = np.where(np.arange(12) < [[4], [12]], 0.8, 0.0).astype(np.float32)
        images = [np.zeros((1, 3, side, side), np.float32) for side in (8, 16)]
        other = scores * [[0], [1]]
        found = check_int8(self.detections(boxes, scores), self.detections(boxes, other), images)
        assert found.tolerated and found.text.startswith('12 detections') and '4 have no counterpart' in found.text

    @pytest.mark.parametrize('broken', ['nothing', 'elsewhere', 'nan'])
    def test_detector(self, broken):
        boxes = np.random.default_rng(0).uniform(0, 100, (2, 5, 4)).astype(np.float32)
        scores = np.full((2, 5), 0.8, np.float32)
        wrong = {
            'nothing': (boxes, 0 * scores),
            'elsewhere': (boxes + 50, scores),
            'nan': (boxes * np.float32('nan'), scores),
        }
        alone = {'nothing': 10, 'elsewhere': 20, 'nan': 20}[broken]
        with pytest.raises(ExportError, match=rf'file: 0 detections differ .* {alone} have no counterpart'):
            check_int8(self.detections(boxes, scores), self.detections(*wrong[broken]), self.IMAGES)

    def test_segmentor(self):
        labels = np.random.default_rng(0).integers(0, 5, (2, 8, 8))
        some = np.where(np.random.default_rng(1).random(labels.shape) < 0.2, 0, labels)
        right, near, wrong = (Outputs('segmentation', labels=found) for found in (labels, some, 0 * labels))
        assert check_int8(right, near, self.IMAGES).tolerated
        right.place = 0
        share = f'{(labels != 0).mean():.4%}'
        with pytest.raises(ExportError, match=f'too far off the float file: {share} of pixels have another label'):
            check_int8(right, wrong, self.IMAGES)

    @pytest.mark.parametrize(('task', 'tolerated'), [('segmentation', True), ('backbone', False)])
    def test_saturated_logits_are_judged_by_the_metric(self, task, tolerated):
        """A backbone's maps have none."""
        right = np.random.default_rng(0).normal(size=(2, 3, 8, 8))
        noise = np.random.default_rng(1).normal(size=right.shape)
        name = 'logits' if task == 'segmentation' else 'map0'
        for other, accepted in ((right + 0.5 * noise, tolerated), (0 * right, False), (noise, False)):
            files = [Outputs(task, **{name: found}) for found in (right, other)]
            if accepted:
                assert check_int8(*files, self.IMAGES).tolerated
            else:
                with pytest.raises(ExportError, match='too far off the float file: relative L2 error'):
                    check_int8(*files, self.IMAGES)


def report(before: float, after: float) -> Int8Report:
    candidates = [Candidate('float32', 4, {'mIoU': before}), Candidate('int8', 1, {'mIoU': after})]
    return Int8Report(Path('a.xml'), candidates, Sensitivity({}, {}, (), 4), (), 4)


class TestJudging:
    def test_within_the_limit(self):
        judge(report(85.0, 84.2), 1.0)

    @pytest.mark.parametrize('after', [83.9, float('nan')])
    def test_what_loses_too_much_is_refused(self, after):
        with pytest.raises(ExportError, match=r'points of mIoU .* more than --max-drop 1.*or take --reduce-range'):
            judge(report(85.0, after), 1.0, advise_half=True)
        with pytest.raises(ExportError, match=r'points of mIoU .* more than --max-drop 1.* by --float-layers$'):
            judge(report(85.0, after), 1.0)

    def test_metrics_in_points(self):
        metrics = {'coco/bbox_mAP': 0.546, 'coco/bbox_mAP_50': 0.865, 'coco/segm_mAP': 0.604}
        assert in_points(metrics) == pytest.approx({'bbox_mAP': 54.6, 'segm_mAP': 60.4})
        assert in_points({'mIoU': 85.89, 'aAcc': 98.06}) == {'mIoU': 85.89}

    def test_table_says_the_difference(self):
        assert '84.20 (-0.80)' in str(report(85.0, 84.2))

    def test_report_counts_the_layers_that_are_named(self):
        text = 'layers stay in float because they are named'
        layers = tuple(Layer(name, 'conv', f'neck.{name}') for name in 'ab')
        plain = report(85.0, 84.2)
        assert text not in str(plain)
        assert f'2 {text}' in str(replace(plain, float_layers=layers))


@pytest.mark.parametrize(
    ('target', 'options', 'message'),
    [
        ('coreml', {}, '--int8: coreml has none here'),
        ('onnx', {'half': True}, '--int8 starts from float32: leave --half out'),
        ('openvino', {'bf16': True}, '--int8 starts from float32: leave --bf16 out'),
    ],
)
def test_what_cannot_become_int8(target, options, message):
    with pytest.raises(ExportError, match=message):
        check_target(target, Path('a' + EXPORTERS[target].suffix), replace(OPTIONS, **options))


def test_detectors_have_no_int8_for_executorch(tmp_path):
    pytest.importorskip('executorch')
    pytest.importorskip('torchao')
    model, cfg = fuse_model(small_model('retinanet')), small_config('retinanet')
    exportable = Exportable.prepare(model, cfg, None, 'executorch', Options(sizes=(SIZE,)))
    path = tmp_path / 'folder' / 'a.pte'
    with pytest.raises(ExportError, match='takes segmentors and backbones'):
        export_int8(exportable, path, cfg, Int8Options())
    with pytest.raises(ExportError, match='products do not saturate in executorch'):
        export_int8(exportable, path, cfg, Int8Options(reduce_range=True))
    assert not path.parent.exists()
