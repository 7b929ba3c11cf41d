"""Exports a fused model in int8; the file is kept only if the config's metric accepts it."""

import copy
import io
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import track

from .._versions import too_old
from ..compat.openvino import openvino_core
from ..messages import one_line
from .evaluate import MismatchError, put_file
from .export import Exportable, Options, build_graph, check_libraries, check_options, export, write_file
from .graph import ExportError
from .load import plain_datasets, test_dataset
from .metadata import KEY, FileInfo
from .prediction import fit_image
from .quantize import SATURATING, write_executorch, write_onnx, write_openvino
from .runtimes import RUNTIMES, Runtime, RuntimeFileError, has_bfloat16, join, open_file
from .sensitivity import Sensitivity, measure
from .structure import Layer
from .timing import Spread, interleave
from .verify import TOLERANCES, Difference, compare

MEASURING = ('onnx', 'onnxruntime', 'ml_dtypes')
"""The distributions that measure sensitivity for every target. onnx before 1.19 does not bring the last one along."""

LIBRARIES = {
    'onnx': MEASURING,
    'openvino': (*MEASURING, 'openvino', 'nncf'),
    'executorch': (*MEASURING, 'executorch', 'torchao'),
}
"""Target that supports int8 -> the distributions that it needs."""

HALF_RANGE = 'int8, half range'
"""What the report calls a file whose weights take half of their range; the other one is ``'int8'``."""

TRIED_ON = 4
"""How many images of the test data set an int8 file's outputs are compared on."""

LOGITS = 0.7
"""Largest relative L2 error of a segmentor's logits, which its metric judges: zeros are off by 1, noise by more."""


@dataclass(frozen=True)
class Int8Options:
    """How to quantize.

    Args:
        images: How many images of the training data set to calibrate on.
        max_drop: A file that loses more points of AP or mIoU is refused.
        float_layers: Layers whose module's name contains one of these stay in float, whatever was measured.
        reduce_range: Whether to keep weights in half of their range, for processors on which products saturate. If
            not, and if they do so here, files of both ranges are made and the better one is kept.
    """

    images: int = 128
    max_drop: float = 1.0
    float_layers: tuple[str, ...] = ()
    reduce_range: bool = False


@dataclass
class Candidate:
    """A file of one precision.

    Args:
        precision: What it computes in.
        bytes: Its size, including files that belong to it.
        points: Name of a metric -> its value in points; empty if it was not measured.
        time: Seconds for an image, if it was timed.
    """

    precision: str
    bytes: int
    points: Mapping[str, float] = field(default_factory=dict)
    time: Spread | None = None


@dataclass
class Int8Report:
    """The outcome of an int8 export.

    Args:
        path: The file.
        candidates: The float file first, the int8 file last.
        sensitivity: What was measured layer by layer.
        float_layers: The layers that stay in float.
        images: How many images it was calibrated on.
        difference: How much the int8 file's outputs differ from the float file's.
        notes: Further remarks, one line each.
    """

    path: Path
    candidates: list[Candidate]
    sensitivity: Sensitivity
    float_layers: tuple[Layer, ...]
    images: int
    difference: Difference | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        first = self.candidates[0]
        rows = [['', *first.points, 'MB', *(['ms', 'speed'] if first.time else [])]]
        for candidate in self.candidates:
            row = [candidate.precision]
            row += [f'{value:.2f} ({value - first.points[name]:+.2f})' for name, value in candidate.points.items()]
            row.append(f'{candidate.bytes / 1e6:.1f}')
            if candidate.time and first.time:
                row += [f'{1000 * candidate.time.median:.1f}', f'{first.time.median / candidate.time.median:.2f}']
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ['  '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines = [f'{self.path}: int8, calibrated on {self.images} images', str(self.sensitivity)]
        if named := set(self.float_layers) - set(self.sensitivity.float_layers):
            lines.append(f'{len(named)} layers stay in float because they are named')
        lines += table
        if self.difference:
            lines.append(f'against the float file: {self.difference.text}')
        return '\n'.join(lines + self.notes)

    def to_json(self) -> str:
        """Everything as a dictionary, including each layer's error."""
        layers = [
            {'layer': layer.module, 'kind': layer.kind, 'alone': error, 'float': layer in self.float_layers}
            for layer, error in self.sensitivity.alone.items()
        ]
        content = {
            'images': self.images,
            'candidates': [asdict(candidate) for candidate in self.candidates],
            'kept': [str(kept) for kept in self.sensitivity.kept],
            'layers': layers,
        }
        return json.dumps(content, indent=2) + '\n'


def export_int8(
    exportable: Exportable,
    path: Path,
    cfg: Config,
    int8: Int8Options,
    images: Sequence[np.ndarray] = (),
    rounds: int = 5,
) -> Int8Report:
    """Export in float, quantize, measure both by the config's metric, and put the int8 file in its place.

    What was measured is written to ``FILE.int8.json``. For OpenVINO bfloat16 is measured as well, if the processor
    multiplies it.

    Args:
        exportable: What to export; its target is a key of ``LIBRARIES``.
        path: Where the file shall lie.
        cfg: The config, for its data sets and its metric.
        int8: How to quantize.
        images: Real images that the float file is compared with PyTorch on.
        rounds: How often the files are timed in turns; 0 does not time them.

    Raises:
        ExportError: if the target has no int8, a library or the images to calibrate on are missing, or the file loses
            more than ``int8.max_drop``. No file is left then.
    """
    graph, target = exportable.graph, exportable.target
    check_target(target, path, exportable.options)
    if int8.reduce_range and target not in SATURATING:
        raise ExportError(f'--reduce-range: products do not saturate in {target}, leave it out')
    if target == 'executorch' and graph.task == 'detection':
        raise ExportError(
            '--int8 for executorch takes segmentors and backbones: its quantizer makes the indices of boxes float, '
            'take --to onnx or --to openvino'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.', dir=path.parent) as scratch:
        saturates = RUNTIMES[path.suffix].saturates()
        variants = [HALF_RANGE] if int8.reduce_range else ['int8', HALF_RANGE] if saturates else ['int8']
        folders = {name: Path(scratch, name) for name in ('float32', 'bfloat16', *variants)}
        for folder in folders.values():
            folder.mkdir()
        files = {name: folder / path.name for name, folder in folders.items()}
        export(exportable, files['float32'], images, rounds=0)
        info = open_file(files['float32']).info
        calibration = calibration_images(cfg, info, int8.images)
        # Where products saturate, a file of the full range is kept only if it is the better one even so.
        exact = target in SATURATING and not saturates
        infos = {name: replace(info, exact_products=exact and name == 'int8') for name in variants}
        try:
            sensitivity, kept = _quantize(exportable, info, files, infos, int8.float_layers, calibration)
            runs = {name: open_file(files[name], torch.get_num_threads()) for name in ('float32', *variants)}
        except (RuntimeFileError, ExportError) as error:
            raise ExportError(str(error)) from error
        except Exception as error:  # quantizers raise anything
            raise ExportError(f'{target} cannot hold this model in int8: {one_line(error, 300)}') from error
        report = Int8Report(path, [], sensitivity, kept, len(calibration))
        tried = dataset_images(test_dataset(cfg), cfg, info, TRIED_ON) or calibration[:TRIED_ON]
        if target == 'openvino' and _tell_bfloat16(files['float32'], files['bfloat16'], info):
            runs = {
                'float32': runs['float32'],
                'bfloat16': open_file(files['bfloat16'], torch.get_num_threads()),
            } | runs
        points = {name: _points(cfg, files[name], info, report) for name in runs}
        chosen = choose(points['float32'], {name: points[name] for name in variants})
        report.difference = check_int8(runs['float32'], runs[chosen], tried, graph.limit)
        times = {}
        if rounds:
            turns = {name: lambda run=run: run.run(tried[0]) for name, run in runs.items()}
            times = interleave(turns, rounds, torch.device('cpu'), 'timing')
        for name in sorted(runs, key=chosen.__eq__):  # it comes last
            size = sum(file.stat().st_size for file in folders[name].iterdir())
            report.candidates.append(Candidate(name, size, points[name], times.get(name)))
        if saturates:
            report.notes.append(about_saturation(variants, chosen, bool(points[chosen])))
        elif infos[chosen].exact_products:
            report.notes.append('made for processors with VNNI or AMX: --reduce-range makes a file for every processor')
        judge(report, int8.max_drop, advise_half=target in SATURATING and HALF_RANGE not in variants)
        for file in sorted(folders[chosen].iterdir(), key=lambda file: file == files[chosen]):
            file.replace(path.parent / file.name)
        path.with_name(f'{path.name}.int8.json').write_text(report.to_json())
    return report


def check_target(target: str, path: Path, options: Options) -> None:
    """Refuse what cannot become int8, before anything is computed.

    Raises:
        ExportError: that says what to do instead.
    """
    if target not in LIBRARIES:
        raise ExportError(f'--int8: {target} has none here, expected one of {", ".join(LIBRARIES)}')
    if options.precision != 'float32':
        raise ExportError(f'--int8 starts from float32: leave {"--bf16" if options.bf16 else "--half"} out')
    check_options(target, path, options)
    # NNCF cannot be imported beside an older one.
    if target == 'openvino' and (reason := too_old('--int8 for openvino', '2.6')):
        raise ExportError(reason)
    check_libraries(f'--int8 for {target}', LIBRARIES[target])


def _quantize(
    exportable: Exportable,
    info: FileInfo,
    files: Mapping[str, Path],
    infos: Mapping[str, FileInfo],
    float_layers: Sequence[str],
    calibration: Sequence[np.ndarray],
) -> tuple[Sensitivity, tuple[Layer, ...]]:
    """Write an int8 file for each of ``infos``; what was measured, and the layers kept in float.

    ``info`` is what the float file says of itself.
    """
    from .qdq import QdqNetwork

    target, options = exportable.target, exportable.options
    with tempfile.TemporaryDirectory() as scratch:
        source = files['float32']
        if target != 'onnx':
            source = Path(scratch, 'model.onnx')
            write_file(build_graph(exportable.model, 'onnx', options), info, 'onnx', source, options)
        network = QdqNetwork(source, calibration)
    sensitivity = measure(network, calibration, torch.get_num_threads())
    chosen = set(sensitivity.float_layers)
    kept = tuple(
        layer
        for layer in network.structure.layers
        if layer in chosen or any(name in layer.module for name in float_layers)
    )
    for name, described in infos.items():
        reduce_range = name == HALF_RANGE
        if target == 'onnx':
            write_onnx(network, files[name], described, kept, reduce_range)
        elif target == 'openvino':
            write_openvino(files['float32'], files[name], described, calibration, kept, reduce_range)
        else:
            write_executorch(exportable.graph, files[name], described, calibration, kept)
    return sensitivity, kept


def choose(reference: Mapping[str, float], points: Mapping[str, Mapping[str, float]]) -> str:
    """Which of some int8 files to keep: the one whose metrics lose least, the first of equals.

    If any of them may be kept, the chosen one may: what :func:`judge` looks at is the largest loss of a file.

    Args:
        reference: The float file's metrics in points.
        points: Name of a file -> its metrics. Where none was measured, half of the range is right everywhere.
    """
    if HALF_RANGE in points and not points[HALF_RANGE]:
        return HALF_RANGE

    def losses(name: str) -> tuple[float, float]:
        differences = [reference[metric] - value for metric, value in points[name].items()]
        found = np.nan_to_num(differences, nan=np.inf)
        return found.max(initial=-np.inf), found.sum()

    return min(points, key=losses)


def about_saturation(variants: Sequence[str], chosen: str, measured: bool) -> str:
    """A line for the report where products saturate."""
    line = 'without VNNI, which this processor lacks, int8 products saturate'
    if len(variants) == 1:
        return f'{line}: weights take half of their range, as asked for'
    reason = 'the better one by the metric' if measured else 'which is right on every processor'
    return f'{line}: files with the full and with half of the range of weights were made, {chosen} is kept, {reason}'


def check_int8(
    reference: Runtime, runtime: Runtime, images: Sequence[np.ndarray], limit: int | None = None
) -> Difference:
    """Compare an int8 file with its float file on real images, not on noise: it was calibrated on real ones.

    That only finds broken files. How good one is, only the metric can tell.

    Args:
        reference: The float file.
        runtime: The int8 file.
        images: Batches ``(N, 3, H, W)``; all of them count as one.
        limit: How many detections of an image there can be.

    Raises:
        ExportError: if they differ by more than int8 can explain.
    """
    task, tolerance = reference.info.task, TOLERANCES['int8']
    if task == 'segmentation':
        tolerance = replace(tolerance, maps=LOGITS)
    difference = compare(task, *(_together(run, images) for run in (reference, runtime)), tolerance, limit)
    if not difference.tolerated:
        raise ExportError(f'the int8 file is too far off the float file: {difference.text}')
    return difference


def _together(runtime: Runtime, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """What a file gives for some batches: detections one image after the other, maps and labels one place after it."""
    found = [runtime.run(batch) for batch in images]
    outputs = {name: [part[name] for part in found] for name in found[0]}
    if runtime.info.task != 'detection':
        return {name: np.concatenate([part.ravel() for part in parts]) for name, parts in outputs.items()}
    joined = {name: join(name, parts) for name, parts in outputs.items()}
    return {**joined, 'masks': joined['masks'] >= 0.5} if 'masks' in joined else joined


def judge(report: Int8Report, max_drop: float, advise_half: bool = False) -> None:
    """Refuse an int8 file that loses more than it may.

    Args:
        report: The files and their metrics.
        max_drop: How many points any of them may be lower.
        advise_half: Whether half of the range of weights might help and was not tried.

    Raises:
        ExportError: if one of its metrics does, or is not a number.
    """
    first, last = report.candidates[0], report.candidates[-1]
    for name, value in first.points.items():
        drop = value - last.points[name]
        if not drop <= max_drop:
            advice = 'calibrate on more images, or keep layers in float by --float-layers'
            if advise_half:
                advice += ', or take --reduce-range, half of the range of weights, which processors without VNNI need'
            raise ExportError(
                f'int8 loses {drop:.2f} points of {name} ({value:.2f} to {last.points[name]:.2f}), more than '
                f'--max-drop {max_drop:g}: {advice}'
            )


def calibration_images(cfg: Config, info: FileInfo, count: int) -> list[np.ndarray]:
    """Images to calibrate on, as a file takes them: from the training data set, or else from the test data set.

    Args:
        cfg: The config.
        info: What the file says of itself.
        count: How many, spread evenly over the data set.

    Returns:
        Batches of one, ``(1, 3, H, W)``, float32, RGB, from 0 to 255.

    Raises:
        ExportError: if there are none.
    """
    training = (cfg.get('train_dataloader') or {}).get('dataset') or {}
    for dataset in (next(plain_datasets(training))[1], test_dataset(cfg)):
        if images := dataset_images(dataset, cfg, info, count):
            return images
    raise ExportError(
        '--int8 calibrates on images of the training data set or the test data set, and neither can be read: '
        'set another path with --cfg-options'
    )


def dataset_images(dataset: Any, cfg: Config, info: FileInfo, count: int) -> list[np.ndarray]:
    """Images of a data set, spread evenly over it, as a file takes them; none if it cannot be read."""
    steps = test_dataset(cfg).get('pipeline')
    if not dataset or not steps:
        return []
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    try:
        # How images are loaded is the same in training and test; how they are resized and flipped is not.
        built = DATASETS.build({**dataset, 'pipeline': steps[:1], 'test_mode': True})
        places = np.unique(np.linspace(0, len(built) - 1, min(count, len(built))).astype(int))
        return [fit_image(built[int(place)]['img'], info).pixels[None] for place in places]
    except Exception:  # a data set that is not there may fail in any way
        return []


def evaluate(cfg: Config, path: Path) -> dict[str, float]:
    """Test an exported file on a config's test data set.

    Returns:
        Name of each metric -> its value, as MMEngine's evaluator gives them.

    Raises:
        MismatchError: if the file cannot stand in for the config's network.
    """
    cfg = copy.deepcopy(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    put_file(cfg, str(path))
    model = MODELS.build(cfg.model)
    loader = Runner.build_dataloader(cfg.test_dataloader)
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    console = Console(stderr=True)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):  # pycocotools prints
            for batch in track(
                loader, path.parent.name, console=console, transient=True, disable=not console.is_terminal
            ):
                evaluator.process(data_samples=model.test_step(batch), data_batch=batch)
            return evaluator.evaluate(len(loader.dataset))
    finally:
        logging.disable(disabled)


def in_points(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that judge a model as a whole, in points: mAP, which frameworks give as a share, and mIoU."""
    names = {name: name.rpartition('/')[2] for name in metrics}
    return {
        short: float(metrics[name]) * (1 if short == 'mIoU' else 100)
        for name, short in names.items()
        if short == 'mIoU' or short.endswith('mAP')
    }


def _points(cfg: Config, path: Path, info: FileInfo, report: Int8Report) -> dict[str, float]:
    """What a file reaches on the test data set in points; empty, with a note, if that cannot be measured."""
    if info.task == 'backbone':
        reason = 'a backbone has none'
    else:
        try:
            return in_points(evaluate(cfg, path))
        except MismatchError as error:
            raise ExportError(str(error)) from error
        except FileNotFoundError as error:
            reason = str(error)
    note = f'the metric was not measured, so --max-drop was not checked: {reason}'
    if note not in report.notes:
        report.notes.append(note)
    return {}


def _tell_bfloat16(source: Path, goal: Path, info: FileInfo) -> bool:
    """Write a float OpenVINO file that says to be run in bfloat16; ``False`` if the processor does not multiply it."""
    import openvino

    if not has_bfloat16():
        return False
    model = openvino_core().read_model(source)
    model.set_rt_info(replace(info, precision='bfloat16').to_json(), [KEY])
    openvino.save_model(model, goal, compress_to_fp16=False)
    return True
