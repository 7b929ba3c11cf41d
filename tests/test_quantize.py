"""Int8 files: what computes in int8, how far they are off, and which are refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import small_config, small_model

from repvit_mm.deploy.export import EXPORTERS, Exportable, Options, build_graph, quiet, random_images
from repvit_mm.deploy.graph import ExportError
from repvit_mm.deploy.load import fuse_model
from repvit_mm.deploy.metadata import FileInfo
from repvit_mm.deploy.quantize import quantize_file, write_executorch
from repvit_mm.deploy.runtimes import RuntimeFileError, open_file

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
from repvit_mm.deploy.int8 import (  # noqa: E402
    Candidate,
    Int8Options,
    Int8Report,
    check_target,
    export_int8,
    in_points,
    judge,
)
from repvit_mm.deploy.qdq import QdqNetwork  # noqa: E402
from repvit_mm.deploy.sensitivity import Sensitivity, measure  # noqa: E402
from repvit_mm.deploy.structure import Layer  # noqa: E402

SIZE = (64, 64)
OPTIONS = Options(sizes=(SIZE,), logits=True)
NEAR = 0.2
"""Relative L2 error of an int8 file's logits: a network that was not trained is off by 0.06 to 0.11."""


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


def error_of(found: Path, expected: Path) -> float:
    """Relative L2 error of a file's logits."""
    found, expected = (open_file(path, 1).run(calibration()[0])['logits'] for path in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def quantized_inputs(model: 'onnx.ModelProto', name: str) -> list[bool]:
    """Whether each input of a node comes from a dequantize node."""
    makers = {output: node for node in model.graph.node for output in node.output}
    (node,) = (node for node in model.graph.node if node.name == name)
    return [name in makers and makers[name].op_type == 'DequantizeLinear' for name in node.input]


class TestOnnx:
    def test_int8_is_near_float(self, onnx_file, tmp_path):
        quantize_file(onnx_file, tmp_path / 'int8.onnx', calibration())
        assert 0 < error_of(tmp_path / 'int8.onnx', onnx_file) < NEAR
        infos = [open_file(path).info for path in (onnx_file, tmp_path / 'int8.onnx')]
        assert infos[1].precision == 'int8' and replace(infos[1], precision='float32', versions={}) == infos[0]

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
    openvino = pytest.importorskip('openvino')
    pytest.importorskip('nncf')
    path = float_file(tmp_path, 'openvino')
    kept = next(layer for layer in network.structure.layers if layer.module.endswith('stem.conv2'))
    quantize_file(path, tmp_path / 'int8.xml', calibration(), [kept])
    assert 0 < error_of(tmp_path / 'int8.xml', path) < NEAR
    model = openvino.Core().read_model(tmp_path / 'int8.xml')
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
def test_openvino_computes_in_bfloat16_where_the_processor_does(tmp_path):
    openvino = pytest.importorskip('openvino')
    from repvit_mm.deploy.int8 import _tell_bfloat16
    from repvit_mm.deploy.runtimes import has_bfloat16

    path, goal = float_file(tmp_path, 'openvino'), tmp_path / 'bf16.xml'
    assert _tell_bfloat16(path, goal, open_file(path).info) == has_bfloat16(openvino)
    if not has_bfloat16(openvino):
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


def report(before: float, after: float) -> Int8Report:
    candidates = [Candidate('float32', 4, {'mIoU': before}), Candidate('int8', 1, {'mIoU': after})]
    return Int8Report(Path('a.xml'), candidates, Sensitivity({}, {}, (), 4), (), 4)


class TestJudging:
    def test_within_the_limit(self):
        judge(report(85.0, 84.2), 1.0)

    @pytest.mark.parametrize('after', [83.9, float('nan')])
    def test_what_loses_too_much_is_refused(self, after):
        with pytest.raises(ExportError, match=r'points of mIoU .* more than --max-drop 1'):
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
    assert not path.parent.exists()
