"""Exporting: each target's file is the model, says what it is, and is not there if anything went wrong."""

import importlib
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import slow_but
from small_models import ROOT, small_config, small_model
from test_deploy_graph import images

from repvit_mm._versions import FRAMEWORKS
from repvit_mm.deploy import coreml
from repvit_mm.deploy.export import (
    EXPORTERS,
    Exportable,
    Options,
    build_graph,
    check_options,
    export,
    trials,
    write_file,
)
from repvit_mm.deploy.graph import ExportError
from repvit_mm.deploy.load import describe, fuse_model, input_size, resizing
from repvit_mm.deploy.metadata import KEY, FileInfo
from repvit_mm.deploy.runtimes import open_file
from repvit_mm.deploy.verify import Tolerance, compare, framework_outputs

onnx = pytest.importorskip('onnx')
sys.path.append(str(ROOT / 'tools'))
tool = importlib.import_module('export')

SIZE = (64, 96)
RUNNING = [target for target, exporter in EXPORTERS.items() if exporter.runs]
STANDARD_DOMAINS = {'', 'ai.onnx'}


def make(target: str, name: str, folder: Path, family: str = 'repvit', **options):
    """Export a small model; the model, the file and the report."""
    model = fuse_model(small_model(name, family))
    chosen = Options(**{'sizes': (SIZE,)} | options)
    path = folder / f'{name}{EXPORTERS[target].suffix}'
    exportable = Exportable.prepare(model, small_config(name, family), None, target, chosen)
    return model, path, export(exportable, path, rounds=1)


def assert_is_the_model(path: Path, model, task: str, *shapes: tuple[int, int, int], tolerance=None) -> None:
    """Compare a file with the framework on other images than the exporter did."""
    runtime = open_file(path)
    for count, height, width in shapes:
        x = images(count, height, width)
        expected = framework_outputs(model, task, x)
        if task == 'detection':
            assert (expected['scores'] > 0.05).sum() > 4
        difference = compare(task, expected, runtime.run(x), tolerance or Tolerance(), 20)
        assert difference.tolerated, difference.text


def test_segmentor_in_onnx(tmp_path):
    model, path, report = make('onnx', 'semantic_fpn', tmp_path)
    assert_is_the_model(path, model, 'segmentation', (1, *SIZE), (3, *SIZE))
    assert report.bytes == path.stat().st_size
    assert '0.0000% of pixels have another label' in str(report) and 'PyTorch' in str(report)
    assert sorted(tmp_path.iterdir()) == [path], 'nothing else is left'
    graph = onnx.load(path).graph
    assert Counter(node.op_type for node in graph.node)['BatchNormalization'] == 0


@pytest.mark.parametrize('target', slow_but(['onnx'], ['onnx', 'torchscript']))
def test_logits_of_any_size(target, tmp_path):
    """Sides that are no multiples of what the network halves its images to, larger and smaller than the traced one."""
    model, path, _ = make(target, 'semantic_fpn', tmp_path, dynamic=True, logits=True)
    runtime = open_file(path)
    for shape in ((1, 50, 61), (3, 160, 33), (2, *SIZE)):
        x = images(*shape)
        expected = framework_outputs(model, 'segmentation', x, logits=True)
        assert expected['logits'].shape == (shape[0], 7, *shape[1:])
        difference = compare('segmentation', expected, runtime.run(x), Tolerance())
        assert difference.tolerated, difference.text


def test_file_says_what_it_is(tmp_path):
    _, path, _ = make('onnx', 'semantic_fpn', tmp_path)
    info = open_file(path).info
    assert info.task == 'segmentation' and info.outputs == ('labels',)
    assert info.classes[:2] == ('background', 'circle') and len(info.palette) == 7
    assert info.sizes == (SIZE,) and info.batch == 1 and info.precision == 'float32'
    assert info.mean == pytest.approx((123.675, 116.28, 103.53))
    assert info.scale == (192, 192) and info.keep_ratio and info.scale_divisor == 32
    assert {'torch', 'onnx', 'onnxruntime'} <= set(info.versions)
    assert set(info.versions) & set(FRAMEWORKS['mmengine'][0])  # a fork's under its own name
    stored = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(stored[KEY])['task'] == 'segmentation'


@pytest.mark.parametrize('name', slow_but(['retinanet'], ['retinanet', 'rtmdet']))
def test_detector_in_onnx_takes_any_size(name, tmp_path):
    model, path, _ = make('onnx', name, tmp_path, dynamic=True)
    # RTMDet takes multiples of 32 only.
    shapes = [(1, 64, 96), (2, 128, 96), (3, 64, 64)] + ([(2, 75, 94)] if name == 'retinanet' else [])
    assert_is_the_model(path, model, 'detection', *shapes)
    assert {node.domain for node in onnx.load(path).graph.node} <= STANDARD_DOMAINS
    info = open_file(path).info
    assert info.sizes == () and info.batch is None


@pytest.mark.slow
def test_anchors_of_one_size_are_constants(tmp_path):
    _, path, _ = make('onnx', 'retinanet', tmp_path)
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert operators['NonMaxSuppression'] == 1
    assert not operators['Range'] and not operators['Tile']


@pytest.mark.slow
def test_no_detection_then_many_in_one_session(tmp_path):
    model, path, _ = make('onnx', 'retinanet', tmp_path, dynamic=True)
    runtime = open_file(path)
    white = np.full((1, 3, *SIZE), 255, np.float32)
    counts = []
    for x in (images(2), white, images(1), np.concatenate([white, images(1)])):
        expected = framework_outputs(model, 'detection', x)
        found = runtime.run(x)
        np.testing.assert_array_equal(found['count'], expected['count'])
        counts += expected['count'].tolist()
    assert max(counts) == 20


@pytest.mark.slow
@pytest.mark.parametrize('name', ['retinanet', 'semantic_fpn'])
@pytest.mark.parametrize('target', RUNNING)
def test_targets(target, name, tmp_path):
    """Any size where the target has it; of the segmentor, which takes less time, a fixed one too."""
    task, family = ('segmentation', 'fastvit') if name == 'semantic_fpn' else ('detection', 'mobileone')
    sizes = {EXPORTERS[target].dynamic} if task == 'detection' else {False, EXPORTERS[target].dynamic}
    for dynamic in sizes:
        folder = tmp_path / str(dynamic)
        model, path, _ = make(target, name, folder, family, dynamic=dynamic)
        assert_is_the_model(path, model, task, (1, *SIZE), (2, *SIZE), *([(1, 201, 175)] if dynamic else []))


@pytest.mark.slow
@pytest.mark.parametrize('target', [target for target in RUNNING if EXPORTERS[target].half in ('graph', 'file')])
def test_half_precision(target, tmp_path):
    model, half, _ = make(target, 'semantic_fpn', tmp_path, half=True)
    options = Options(sizes=(SIZE,))
    exportable = Exportable.prepare(model, small_config('semantic_fpn'), None, target, options)
    whole = tmp_path / f'whole{half.suffix}'
    write_file(exportable.graph, exportable.info, target, whole, options)
    sizes = []
    for path, precision in ((whole, 'float32'), (half, 'float16')):
        assert open_file(path).info.precision == precision
        # OpenVINO keeps its weights beside the .xml file, in which each of them then needs a conversion.
        files = [file for file in tmp_path.glob(f'{path.stem}.*') if file.suffix != '.xml']
        sizes.append(sum(file.stat().st_size for file in files))
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert sizes[0] - sizes[1] > 1.6 * weights  # of 2 bytes each


@pytest.mark.slow
def test_rtmdet_in_openvino(tmp_path):
    model, path, _ = make('openvino', 'rtmdet', tmp_path, family='fastvit', dynamic=True)
    assert_is_the_model(path, model, 'detection', (1, *SIZE), (2, 128, 96))


@pytest.mark.slow
def test_backbone(tmp_path):
    model, path, _ = make('onnx', 'retinanet', tmp_path, what='backbone', dynamic=True)
    assert open_file(path).info.outputs == ('map0', 'map1', 'map2', 'map3')
    assert_is_the_model(path, model, 'backbone', (2, 75, 94))


@pytest.mark.slow
@pytest.mark.parametrize('family', ['repvit', 'fastvit'])
def test_coreml_program(family, tmp_path):
    """What can be known of a package without Apple's system."""
    coremltools = pytest.importorskip('coremltools')

    model, path, report = make('coreml', 'semantic_fpn', tmp_path, family)
    assert 'do not run on this system' in str(report)
    package = coremltools.models.MLModel(str(path), skip_model_load=True)
    spec = package.get_spec()
    found = Counter(operation.type for operation in coreml.operations(spec))
    convolutions = coreml.count_convolutions(
        build_graph(model, 'coreml', Options(sizes=(SIZE,))), torch.zeros(1, 3, *SIZE)
    )
    assert found['conv'] == convolutions > 20
    assert not found['batch_norm']
    (image,) = spec.description.input
    assert image.type.imageType.width == 96 and image.type.imageType.height == 64
    assert image.type.imageType.colorSpace == image.type.imageType.RGB
    assert FileInfo.from_json(package.user_defined_metadata[KEY]).classes[0] == 'background'


@pytest.mark.slow
def test_coreml_detector_and_several_sizes(tmp_path):
    coremltools = pytest.importorskip('coremltools')

    make('coreml', 'retinanet', tmp_path, half=True)
    sizes = (SIZE, (32, 64))
    _, path, _ = make('coreml', 'retinanet', tmp_path / 'backbone', what='backbone', sizes=sizes)
    (image,) = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec().description.input
    taken = image.type.imageType.enumeratedSizes.sizes
    assert {(size.height, size.width) for size in taken} == set(sizes)


@pytest.mark.slow
def test_coreml_normalization_is_split_exactly(tmp_path, monkeypatch):
    """What Core ML does to the image before the program, and the program, are the graph."""
    pytest.importorskip('coremltools')
    kept = {}

    class Converted:
        def __init__(self):
            self.user_defined_metadata = {}

        def get_spec(self):
            return None

        def save(self, path):
            pass

    def convert(program, inputs, **options):
        kept.update(program=program, image=inputs[0])
        return Converted()

    monkeypatch.setattr('coremltools.convert', convert)
    monkeypatch.setattr(coreml, 'operations', lambda spec: [])
    monkeypatch.setattr(coreml, 'count_convolutions', lambda *args: 0)
    graph = build_graph(fuse_model(small_model('semantic_fpn')), 'coreml', Options(sizes=(SIZE,), logits=True))
    x = torch.from_numpy(images(1))
    expected = graph(x)
    coreml.write_package(
        graph, x, replace(describe(small_config('semantic_fpn'), None, graph), sizes=(SIZE,)), tmp_path, False
    )
    image = kept['image']
    fed = x * image.scale + torch.tensor(image.bias).view(3, 1, 1)
    torch.testing.assert_close(kept['program'].module()(fed), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(graph(x), expected), 'the graph is left as it was'


def spoil(monkeypatch, target: str) -> None:
    """Let a target write another network than it is given."""
    exporter = EXPORTERS[target]

    def write(graph, batch, info, path, options):
        with torch.no_grad():
            next(module for module in graph.modules() if isinstance(module, torch.nn.Conv2d)).bias += 1.0
        exporter.write(graph, batch, info, path, options)

    monkeypatch.setitem(EXPORTERS, target, replace(exporter, write=write))


@pytest.mark.parametrize('name', slow_but(['semantic_fpn'], ['retinanet', 'semantic_fpn']))
def test_another_network_leaves_no_file(name, tmp_path, monkeypatch):
    """The twin of every comparison above."""
    spoil(monkeypatch, 'onnx')
    with pytest.raises(ExportError, match='does not compute what PyTorch does, random images'):
        make('onnx', name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_file_that_forgets_what_it_is_is_refused(tmp_path, monkeypatch):
    exporter = EXPORTERS['onnx']

    def write(graph, batch, info, path, options):
        exporter.write(graph, batch, replace(info, classes=()), path, options)

    monkeypatch.setitem(EXPORTERS, 'onnx', replace(exporter, write=write))
    with pytest.raises(ExportError, match='does not keep what it says of itself'):
        make('onnx', 'semantic_fpn', tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_old_file_stays_when_the_new_one_fails(tmp_path, monkeypatch):
    (tmp_path / 'retinanet.onnx').write_text('old')
    spoil(monkeypatch, 'onnx')
    with pytest.raises(ExportError):
        make('onnx', 'retinanet', tmp_path)
    assert (tmp_path / 'retinanet.onnx').read_text() == 'old'


def test_failing_exporter_is_reported_in_one_line(tmp_path, monkeypatch):
    def write(*args):
        raise RuntimeError('operator\nnot known')

    monkeypatch.setitem(EXPORTERS, 'onnx', replace(EXPORTERS['onnx'], write=write))
    with pytest.raises(ExportError, match='onnx cannot export this model: RuntimeError: operator not known'):
        make('onnx', 'semantic_fpn', tmp_path)


@pytest.mark.slow
def test_missing_libraries_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPORTERS, 'onnx', replace(EXPORTERS['onnx'], libraries=('no_such', 'torch', 'nor_this')))
    with pytest.raises(ExportError, match='onnx needs the package no_such and nor_this: pip install no_such nor_this'):
        make('onnx', 'semantic_fpn', tmp_path)


@pytest.mark.parametrize(
    ('target', 'path', 'options', 'reason'),
    [
        ('onnx', 'a.xml', {}, r'ends in \.onnx'),
        ('executorch', 'a.pte', dict(dynamic=True), 'images of a fixed size'),
        ('coreml', 'a.mlpackage', dict(dynamic=True), 'images of a fixed size'),
        ('executorch', 'a.pte', dict(half=True), 'take int8'),
        ('onnx', 'a.onnx', dict(sizes=((32, 32), (64, 64))), 'takes one size'),
    ],
)
def test_impossible_options_are_refused(target, path, options, reason):
    with pytest.raises(ExportError, match=reason):
        check_options(target, Path(path), Options(**options))


def test_trials():
    real = [np.zeros((3, 50, 60), np.float32), np.zeros((3, 70, 40), np.float32)]
    fixed = trials(Options(sizes=(SIZE,)), real)
    assert list(fixed) == ['2 real images', 'random images']
    assert [batch.shape for batch in fixed['2 real images']] == [(1, 3, *SIZE)] * 2
    dynamic = trials(Options(sizes=(SIZE,), dynamic=True), real)
    assert [batch.shape for batch in dynamic['2 real images']] == [(1, 3, 50, 60), (1, 3, 70, 40)]
    assert len({batch.shape for batch in dynamic['random images']}) == 2
    noise = fixed['random images'][0]
    assert 0 <= noise.min() < 60 and 200 < noise.max() <= 255 and (noise == noise.round()).all()


@pytest.mark.parametrize(
    ('config', 'size', 'fields'),
    [
        ('det/mask_rcnn_repvit_m1_1_fpn_1x_coco.py', (800, 1333), dict(scale=(1333, 800), keep_ratio=True)),
        (
            'seg/fpn_repvit_m1_1_ade20k_40k.py',
            (512, 512),
            dict(scale=(2048, 512), keep_ratio=True, scale_divisor=32),
        ),
    ],
)
def test_input_of_shipped_configs(config, size, fields):
    from mmengine.config import Config

    cfg = Config.fromfile(ROOT / 'configs' / config)
    assert input_size(cfg) == size
    assert resizing(cfg) == fields


def test_input_of_rtmdet():
    assert input_size(small_config('rtmdet')) == (640, 640)
    assert resizing(small_config('rtmdet')) == dict(
        scale=(640, 640), keep_ratio=True, canvas=(640, 640), canvas_value=114.0
    )


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> list[str]:
    """The command line's config and checkpoint, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    cfg = small_config('semantic_fpn')
    cfg.dump('small.py')
    torch.save({'meta': {}, 'state_dict': small_model('semantic_fpn').state_dict()}, 'small.pth')
    return ['small.py', 'small.pth']


def test_tool(checkpoint, capsys):
    tool.main([*checkpoint, '--to', 'onnx', '--shape', '64', '96', '--rounds', '1'])
    assert 'random images: 0.0000% of pixels' in capsys.readouterr().out
    info = open_file('work_dirs/small/small.onnx').info
    assert (info.config, info.checkpoint, len(info.sha256)) == ('small.py', 'small.pth', 64)
    with pytest.raises(SystemExit, match='is there already: --force'):
        tool.main([*checkpoint, '--to', 'onnx', '--shape', '64', '96'])


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        (['--to', 'onnx', '--out', 'a.txt'], r'ends in \.onnx'),
        pytest.param(['--to', 'executorch', '--dynamic'], 'fixed size', marks=pytest.mark.slow),
        (
            ['--to', 'onnx', '--cfg-options', 'model.decode_head.channels=16'],
            'is not of this config: .* of another shape: 36',
        ),
        pytest.param(
            ['--to', 'onnx', '--cfg-options', 'model.decode_head.type=Nothing'],
            'the model cannot be built',
            marks=pytest.mark.slow,
        ),
        (['--to', 'onnx', '--cfg-options', 'model.test_cfg.mode=slide'], 'slides over the image'),
    ],
)
def test_tool_refuses_in_one_line(checkpoint, arguments, reason):
    with pytest.raises(SystemExit, match=reason) as error:
        tool.main([*checkpoint, *arguments])
    assert '\n' not in str(error.value)
    assert not list(Path().rglob('*.onnx'))


def test_tool_refuses_a_checkpoint_that_is_not_there(checkpoint):
    with pytest.raises(SystemExit, match=r'checkpoint smal\.pth not found; the nearest is'):
        tool.main([checkpoint[0], 'smal.pth', '--to', 'onnx'])


@pytest.mark.parametrize('shape', slow_but([['16', '64']], [['64'], ['16', '64'], ['64', '64', '32']]))
def test_tool_refuses_other_shapes(checkpoint, shape, capsys):
    with pytest.raises(SystemExit) as error:
        tool.main([*checkpoint, '--to', 'onnx', '--shape', *shape])
    assert error.value.code == 2 and '--shape' in capsys.readouterr().err
