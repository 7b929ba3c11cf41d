"""Exports a fused model to a file that runs elsewhere; the file is kept only if it computes what the model does."""

import copy
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import Tensor, nn

from .._versions import too_old
from ..compat.pytorch import any_row_count, export_onnx
from ..messages import one_line
from .graph import ExportError, Graph, backbone_graph, graph_of
from .load import Checkpoint, describe, versions
from .masks import pasted
from .metadata import KEY, FileInfo
from .operators import Suppress, suppress_by_loop, suppress_by_onnx, suppress_by_scan
from .runtimes import INFO_FILE, RuntimeFileError, open_file
from .timing import Spread, interleave
from .verify import TOLERANCES, Difference, compare, framework_outputs, largest

OPSET = 17
"""Opset of ONNX files. Every current runtime reads it, and since opset 16 RoiAlign computes what mmcv's does."""

What = Literal['model', 'backbone']


@dataclass(frozen=True)
class Options:
    """How to export.

    Args:
        what: The whole model, or its backbone.
        sizes: Heights and widths in pixels that the file takes, the default one first.
        dynamic: Whether it takes any number of images of any size; then it is tried with the default size.
        half: Whether to store the weights in half precision.
        bf16: Whether the file is run in bfloat16 on processors that multiply it.
        logits: Whether a segmentor gives logits instead of labels.
        opset: The opset of an ONNX file.
    """

    what: What = 'model'
    sizes: tuple[tuple[int, int], ...] = ((512, 512),)
    dynamic: bool = False
    half: bool = False
    bf16: bool = False
    logits: bool = False
    opset: int = OPSET

    @property
    def precision(self) -> str:
        """The precision of the file, as its description names it."""
        return 'bfloat16' if self.bf16 else 'float16' if self.half else 'float32'


Run = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Images ``(N, 3, H, W)`` to outputs by name."""

Write = Callable[[Graph, Tensor, FileInfo, Path, Options], None]
"""Writes a graph to a file; the tensor is a batch of images to trace it with."""


@dataclass(frozen=True)
class Exporter:
    """A kind of file.

    Args:
        suffix: The suffix of its name.
        write: The function that writes it.
        libraries: The distributions that are needed to make it.
        suppress: Returns the implementation of non-maximum suppression that the format can represent.
        dynamic: Whether it can take images of any size.
        several_sizes: Whether it can take images of several given sizes.
        half: What half precision means: ``'graph'`` for a network that computes in it, ``'file'`` if the writer handles
            it; any other text is the reason why there is none.
        runs: Whether the file can be run, and compared, on this system.
        torch: The first version of torch that writes it.
    """

    suffix: str
    write: Write
    libraries: tuple[str, ...] = ()
    suppress: Callable[[], Suppress] = lambda: suppress_by_loop
    dynamic: bool = True
    several_sizes: bool = False
    half: str = 'graph'
    runs: bool = True
    torch: str = '2.0'


@dataclass
class Report:
    """The outcome of an export.

    Args:
        path: The file.
        bytes: Its size, including files that belong to it.
        differences: Kind of input -> how much the file's outputs differ from the framework's.
        times: ``'pytorch'`` and ``'file'`` -> seconds for an image; empty if the file does not run here.
        notes: Further remarks, one line each.
    """

    path: Path
    bytes: int
    differences: dict[str, Difference] = field(default_factory=dict)
    times: dict[str, Spread] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f'{self.path}: {self.bytes / 1e6:.1f} MB']
        lines += [f'against PyTorch, {what}: {difference.text}' for what, difference in self.differences.items()]
        if self.times:
            shown = {name: f'{1000 * time.median:.1f} ms' for name, time in self.times.items()}
            lines.append(f'PyTorch {shown["pytorch"]}, this file {shown["file"]} an image, medians')
        return '\n'.join(lines + self.notes)


def write_onnx(graph: Graph, images: Tensor, info: FileInfo, path: Path, options: Options) -> None:
    """An ONNX file of standard operators."""
    import onnx

    axes = None
    if options.dynamic:
        axes = {'images': {0: 'batch', 2: 'height', 3: 'width'}} | {name: {0: 'batch'} for name in graph.outputs}
    export_onnx(
        graph,
        (images,),
        str(path),
        input_names=['images'],
        output_names=list(graph.outputs),
        dynamic_axes=axes,
        opset_version=options.opset,
    )
    model = onnx.load(path)
    onnx.checker.check_model(model)
    onnx.helper.set_model_props(model, {KEY: info.to_json()})
    onnx.save(model, path)


def write_openvino(graph: Graph, images: Tensor, info: FileInfo, path: Path, options: Options) -> None:
    """An OpenVINO model, an ``.xml`` file and a ``.bin`` file with the weights, by way of an ONNX file."""
    import openvino

    with tempfile.TemporaryDirectory() as scratch:
        onnx_path = Path(scratch, 'model.onnx')
        write_onnx(graph, images, info, onnx_path, options)
        model = openvino.convert_model(onnx_path)
        model.set_rt_info(info.to_json(), [KEY])
        openvino.save_model(model, path, compress_to_fp16=options.half)


def write_torchscript(graph: Graph, images: Tensor, info: FileInfo, path: Path, options: Options) -> None:
    """A traced and frozen program of ``torch.jit``."""
    traced = torch.jit.freeze(torch.jit.trace(graph, images, check_trace=False))
    content = io.BytesIO()  # on a full disk torch's own writer ends the process
    torch.jit.save(traced, content, _extra_files={INFO_FILE: info.to_json()})
    path.write_bytes(content.getvalue())


def write_torch_export(graph: Graph, images: Tensor, info: FileInfo, path: Path, options: Options) -> None:
    """A program of ``torch.export``."""
    program = exported_program(graph, images, options)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={INFO_FILE: info.to_json()})
    path.write_bytes(content.getvalue())


def write_executorch(graph: Graph, images: Tensor, info: FileInfo, path: Path, options: Options) -> None:
    """An ExecuTorch program whose convolutions are XNNPACK's."""
    lower_executorch(exported_program(graph, images, options), info, path)


def lower_executorch(program: 'torch.export.ExportedProgram', info: FileInfo, path: Path) -> None:
    """Write a program for ExecuTorch; XNNPACK computes everything that it supports."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    # A program keeps its description in a method that returns a constant.
    edge = to_edge_transform_and_lower(
        program, partitioner=[XnnpackPartitioner()], constant_methods={KEY: info.to_json()}
    )
    path.write_bytes(edge.to_executorch().buffer)


def exported_program(graph: Graph, images: Tensor, options: Options) -> 'torch.export.ExportedProgram':
    """A graph as ``torch.export`` gives it."""
    check_torch('torch_export')
    any_size = torch.export.Dim.AUTO
    shapes = ({0: any_size, 2: any_size, 3: any_size},) if options.dynamic else None
    # torch caches loops. A cached loop of other sizes would decide which sizes of this one may vary.
    torch.compiler.reset()
    with any_row_count(options.dynamic):
        return torch.export.export(graph, (images,), dynamic_shapes=shapes)


def write_coreml(graph: Graph, images: Tensor, info: FileInfo, path: Path, options: Options) -> None:
    """A Core ML package, checked by the structure of its program."""
    from .coreml import write_package

    write_package(graph, images, info, path, options.half)


EXPORTERS: dict[str, Exporter] = {
    'onnx': Exporter('.onnx', write_onnx, ('onnx', 'onnxruntime'), lambda: suppress_by_onnx),
    'openvino': Exporter('.xml', write_openvino, ('onnx', 'openvino'), lambda: suppress_by_onnx, half='file'),
    'torchscript': Exporter('.pt', write_torchscript, suppress=lambda: torch.jit.script(suppress_by_loop)),
    'torch_export': Exporter('.pt2', write_torch_export, suppress=lambda: suppress_by_scan, torch='2.6'),
    'executorch': Exporter(
        '.pte',
        write_executorch,
        ('executorch',),
        lambda: suppress_by_scan,
        dynamic=False,
        half='XNNPACK saves nothing by half precision: take int8',
        torch='2.6',
    ),
    'coreml': Exporter(
        '.mlpackage',
        write_coreml,
        ('coremltools',),
        dynamic=False,
        several_sizes=True,
        half='file',
        runs=False,
        torch='2.6',
    ),
}
"""Name of a target -> how to export to it."""


def check_options(target: str, path: Path, options: Options) -> None:
    """Refuse options that a target does not support, before anything is computed.

    Raises:
        ExportError: that says what to do instead.
    """
    exporter = EXPORTERS[target]
    check_torch(target, options.half)
    if path.suffix != exporter.suffix:
        raise ExportError(f'{path}: a file for {target} has a name that ends in {exporter.suffix}')
    if options.dynamic and not exporter.dynamic:
        raise ExportError(f'{target} files take images of a fixed size: give the size instead of --dynamic')
    if len(options.sizes) > 1 and not exporter.several_sizes:
        raise ExportError(f'a {target} file takes one size, or any with --dynamic, not {len(options.sizes)} sizes')
    if options.half and exporter.half not in ('graph', 'file'):
        raise ExportError(f'--half: {exporter.half}')
    if options.bf16 and target != 'openvino':
        raise ExportError(f'--bf16 is for --to openvino: a file for {target} cannot ask for it')
    check_libraries(target, exporter.libraries)


def check_torch(target: str, half: bool = False) -> None:
    """Refuse what needs a newer torch.

    Args:
        target: A key of ``EXPORTERS``.
        half: Whether it shall be in half precision.

    Raises:
        ExportError: that names the first version.
    """
    exporter = EXPORTERS[target]
    reason = too_old(f'--to {target}', exporter.torch)
    if half and exporter.half == 'graph':
        reason = reason or too_old('--half', '2.6')  # older ones have no convolution in float16 on a CPU
    if reason:
        raise ExportError(reason)


def check_libraries(purpose: str, libraries: Sequence[str]) -> None:
    """Refuse what needs distributions that are not installed.

    Raises:
        ExportError: that names all of them.
    """
    if missing := [library for library in libraries if not versions([library])]:
        kept = ' "numpy<2"' if np.__version__.startswith('1.') else ''  # else pip may replace the one that is there
        names = ' and '.join(missing)
        raise ExportError(f'{purpose} needs the package {names}: pip install {" ".join(missing)}{kept}')


@dataclass(frozen=True)
class Exportable:
    """A fused model, made ready for a target.

    Args:
        model: The fused model; what it predicts by its own framework is what the file must predict.
        graph: The model's graph for the target.
        info: What the file says of itself; sizes, precision and versions are filled in as it is written.
        target: A key of ``EXPORTERS``.
        options: How to export; the graph is built for them.
    """

    model: nn.Module
    graph: Graph
    info: FileInfo
    target: str
    options: Options

    @classmethod
    def prepare(
        cls, model: nn.Module, cfg: Config, checkpoint: str | Path | Checkpoint | None, target: str, options: Options
    ) -> 'Exportable':
        """Make a fused model ready.

        Args:
            model: The fused model, which is left as it is.
            cfg: Its config.
            checkpoint: Whose weights it has; ``None`` if they are random.
            target: A key of ``EXPORTERS``.
            options: How to export.

        Raises:
            ExportError: if the model is of a kind that cannot be exported.
        """
        graph = build_graph(model, target, options)
        return cls(model, graph, describe(cfg, checkpoint, graph), target, options)


def build_graph(model: nn.Module, target: str, options: Options) -> Graph:
    """The graph that is exported, made of a copy of a fused model.

    Raises:
        ExportError: if the model is of a kind that cannot be exported, or torch is too old.
    """
    check_torch(target, options.half)
    exporter = EXPORTERS[target]
    twin = copy.deepcopy(model).requires_grad_(False)
    if options.half and exporter.half == 'graph':
        twin.half()
    whole_model = options.what == 'model'
    graph = graph_of(twin, options.logits, exporter.suppress()) if whole_model else backbone_graph(twin)
    graph.size = None if options.dynamic else options.sizes[0]
    return graph.eval()


def export(exportable: Exportable, path: Path, images: Sequence[np.ndarray] = (), rounds: int = 5) -> Report:
    """Write a file, compare it with the model in its own runtime, and only then put it in its place.

    Args:
        exportable: What to export.
        path: Where the file shall lie.
        images: Real images ``(3, H, W)``, RGB, values from 0 to 255, for the comparison beside random ones.
        rounds: How often model and file are timed, taking turns; 0 does not time them.

    Raises:
        ExportError: if the target's library is missing or fails, or if the file and the model disagree by more than
            ``TOLERANCES``. No file is left then.
    """
    graph, target, options = exportable.graph, exportable.target, exportable.options
    check_options(target, path, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.', dir=path.parent) as scratch:
        part = Path(scratch, path.name)
        info = write_file(graph, exportable.info, target, part, options)
        report = Report(path, sum(file.stat().st_size for file in Path(scratch).rglob('*') if file.is_file()))
        if EXPORTERS[target].runs:
            run = open_exported(part, info)
            report.differences = check_outputs(exportable, run, images)
            if rounds:
                report.times = compare_times(exportable, run, images, rounds)
        else:
            report.differences = check_outputs(exportable, partial(graph_outputs, graph), images)
            report.notes.append(f'{target} files do not run on this system: compared was what went into the converter')
        # Files that belong to it are moved first, so that it is never there without them.
        for file in sorted(Path(scratch).iterdir(), key=lambda file: file == part):
            goal = path.parent / file.name
            if goal.is_dir():
                shutil.rmtree(goal)
            file.replace(goal)
    return report


def write_file(graph: Graph, info: FileInfo, target: str, path: Path, options: Options, batch: int = 1) -> FileInfo:
    """Write a graph to a file, without checking what the file computes.

    Args:
        graph: The graph.
        info: The file's description; sizes, precision and versions are filled in here.
        target: A name in ``EXPORTERS``.
        path: The file.
        options: The same as the graph's.
        batch: How many images a file of a fixed size takes at once.

    Returns:
        The complete description.

    Raises:
        ExportError: if the target's library is missing or fails.
    """
    exporter = EXPORTERS[target]
    check_libraries(target, exporter.libraries)
    info = replace(
        info,
        sizes=() if options.dynamic else options.sizes,
        batch=None if options.dynamic else batch,
        precision=options.precision,
        versions=info.versions | versions(exporter.libraries),
    )
    # Two images if their number may vary: torch.export would take a one for a constant.
    images = torch.from_numpy(random_images(2 if options.dynamic else batch, options.sizes[0]))
    try:
        with torch.no_grad(), quiet():
            exporter.write(graph, images, info, path, options)
    except ExportError:
        raise
    except Exception as error:  # exporters raise anything
        raise ExportError(f'{target} cannot export this model: {one_line(error, 300)}') from error
    return info


def open_exported(path: Path, info: FileInfo) -> Run:
    """Open a file that was just written in its own runtime.

    Raises:
        ExportError: if it cannot be opened, or if its description is another one.
    """
    try:
        runtime = open_file(path, torch.get_num_threads())
    except RuntimeFileError as error:
        raise ExportError(str(error)) from error
    if runtime.info != info:
        raise ExportError(f'{path.name} does not keep what it says of itself')
    return lambda images: pasted(runtime.run(images), images.shape[-2:], info.mask_threshold)


@torch.inference_mode()
def graph_outputs(graph: Graph, images: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs of a graph run by PyTorch, in the form of a file's outputs."""
    outputs = graph(torch.from_numpy(images))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {name: output.numpy() for name, output in zip(graph.outputs, outputs, strict=True)}


def check_outputs(exportable: Exportable, run: Run, images: Sequence[np.ndarray]) -> dict[str, Difference]:
    """Compare a file's outputs with what the model predicts by its own framework.

    Returns:
        Kind of input -> the largest difference.

    Raises:
        ExportError: if they differ by more than is tolerated.
    """
    graph, options = exportable.graph, exportable.options
    found = {}
    for what, batches in trials(options, images).items():
        try:
            differences = [
                compare(
                    graph.task,
                    framework_outputs(exportable.model, graph.task, batch, options.logits),
                    run(batch),
                    TOLERANCES[options.precision],
                    graph.limit,
                )
                for batch in batches
            ]
        except RuntimeFileError as error:
            raise ExportError(f'the file does not run, {what}: {error}') from error
        found[what] = largest(differences)
        if not found[what].tolerated:
            raise ExportError(f'the file does not compute what PyTorch does, {what}: {found[what].text}')
    return found


def compare_times(exportable: Exportable, run: Run, images: Sequence[np.ndarray], rounds: int) -> dict[str, Spread]:
    """Seconds that the model and a file take for one image, measured in turns."""
    options = exportable.options
    batch = next(iter(trials(options, images[:1]).values()))[0]
    candidates = {
        'pytorch': lambda: framework_outputs(exportable.model, exportable.graph.task, batch, options.logits),
        'file': lambda: run(batch),
    }
    return interleave(candidates, rounds, torch.device('cpu'), 'timing')


def trials(options: Options, images: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Batches to compare a file on, by kind of input; real images come first if there are any.

    A file of a fixed size gets the real images resized. A file of any size gets them as they are, and also random
    images in a batch of two of another size.
    """
    found = {}
    if images:
        found[f'{len(images)} real images'] = [
            image[None] if options.dynamic else resized(image, options.sizes[0]) for image in images
        ]
    batches = [random_images(1, options.sizes[0])]
    if options.dynamic:
        height, width = options.sizes[0]
        # Height and width swapped, in multiples of the largest stride.
        batches.append(random_images(2, (-(-width // 32) * 32, (height // 32 + 1) * 32)))
    return found | {'random images': batches}


def random_images(count: int, size: tuple[int, int]) -> np.ndarray:
    """Coarse and fine noise, ``(N, 3, H, W)`` from 0 to 255: to a network, images of only fine noise look alike."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(count, 3, *size)
    for side in (2, 8, 32):
        noise = torch.rand(count, 3, side, side, generator=generator)
        images += F.interpolate(noise, size=size, mode='bilinear')
    images += torch.rand(images.shape, generator=generator)
    return (images / 4 * 255).round().numpy()


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image ``(3, H, W)`` in another size, as a batch of one."""
    batch = torch.from_numpy(image)[None]
    return F.interpolate(batch, size=size, mode='bilinear', antialias=True).round().clamp(0, 255).numpy()


@contextmanager
def quiet() -> Iterator[None]:
    """Within the context exporters do not warn: of sizes that become constants, their own age, untested versions."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
