"""Train, test, fuse, export and test again on the shapes data set: python tools/demo.py (or: make demo).

What has to work comes first: the network as it was trained, branch by branch and fused, one exported file, a picture of
predictions. Further forms of it come behind that. One that cannot be had on this machine is a row that says why.
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _first  # noqa: F401
import cv2
import torch
from _launch import TOOLS, ToolError, read_config, run_test, run_tool, start
from rich.console import Console
from rich.table import Table

from repvit_mm.deploy.benchmark.models import FORMS, build, measure_model
from repvit_mm.deploy.benchmark.routes import LeftOut
from repvit_mm.deploy.benchmark.worker import WorkerError
from repvit_mm.deploy.load import input_size
from repvit_mm.deploy.picture import montage
from repvit_mm.files import write_whole
from repvit_mm.precision import check_dtype
from repvit_mm.reparam import reparam_blocks

CONFIGS = TOOLS.parent / 'configs'
IMAGES = Path('data/shapes/coco/val2017')
OUT = Path('work_dirs/demo')
PICTURES = 8
"""Validation images whose predictions are drawn beside the ground truth."""
SHOWN = 4
"""Validation images in the picture of both tasks."""
SCORE = '0.6'
"""The least score of a detection in that picture."""
ROUNDS = 20
"""How often each form of a network is timed."""


@dataclass(frozen=True)
class Form:
    """A form of a trained network.

    Args:
        heading: What the table calls it.
        route: What the benchmark calls it.
        test: Options of ``tools/test.py``.
        export: Options of ``tools/export.py`` that make its file, and the file's suffix; empty if torch runs it.
    """

    heading: str
    route: str
    test: tuple[str, ...] = ()
    export: tuple[str, ...] = ()
    suffix: str = ''


BRANCHES = tuple(f'model.backbone.{option}={value}' for option, value in FORMS['plain'].items())
BFLOAT16 = ('--dtype', 'bfloat16')

UNFUSED = Form('unfused', 'folded')
ESSENTIALS = (
    Form('branch by branch', 'plain', ('--cfg-options', *BRANCHES)),
    UNFUSED,
    Form('fused', 'fused', ('--fuse',)),
    Form('ONNX', 'onnxruntime', export=('--to', 'onnx'), suffix='.onnx'),
)
"""Forms that have to give the same metrics."""
EXTRAS = (
    Form('fused, bfloat16', 'fused_bf16', ('--fuse', *BFLOAT16)),
    Form('compiled, bfloat16', 'compiled_bf16', ('--fuse', '--compile', *BFLOAT16)),
    Form('OpenVINO bfloat16', 'openvino_bf16', export=('--to', 'openvino', '--bf16'), suffix='.xml'),
    Form('OpenVINO int8', 'openvino_int8', export=('--to', 'openvino', '--int8'), suffix='.xml'),
)
"""Forms of less precision."""
SAME = 0.15
"""By how many points the metrics of two equal forms may differ: MMDetection rounds to a tenth."""


@dataclass(frozen=True)
class Task:
    """One config of the demo.

    Args:
        name: Name of its folder.
        config: Path of the config.
        metrics: What the table shows: its label -> the metric's name and the factor that makes it a percentage.
        wanted: Label -> the percentage that training has to reach.
    """

    name: str
    config: Path
    metrics: dict[str, tuple[str, float]]
    wanted: dict[str, float]


@dataclass
class Outcome:
    """What became of a task.

    Args:
        checkpoint: What training left.
        points: Route -> label of each metric -> a percentage.
        files: Route -> its exported file.
        refused: Route -> why that form could not be had.
        blocks: How many blocks fusing turned into one convolution each.
        rows: Route -> what the benchmark gives.
    """

    checkpoint: Path
    points: dict[str, dict[str, float]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    blocks: int = 0
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)


TASKS = (
    Task(
        'detection',
        CONFIGS / 'det/mask_rcnn_repvit_m0_6_fpn_shapes.py',
        {
            'box AP': ('coco/bbox_mAP', 100),
            'box AP50': ('coco/bbox_mAP_50', 100),
            'mask AP': ('coco/segm_mAP', 100),
            'mask AP50': ('coco/segm_mAP_50', 100),
        },
        {'box AP50': 80, 'mask AP50': 80},
    ),
    Task('segmentation', CONFIGS / 'seg/fpn_repvit_m0_6_shapes.py', {'mIoU': ('mIoU', 1)}, {'mIoU': 80}),
)


def train(task: Task, folder: Path) -> Path:
    """Train; returns the checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
    run_tool('train.py', task.config, '--work-dir', folder, '--seed', '0')
    return Path((folder / 'last_checkpoint').read_text())


def draw(task: Task, checkpoint: Path, folder: Path) -> None:
    """Pictures of the fused network's predictions beside the ground truth."""
    few = f'test_dataloader.dataset.indices={PICTURES}'
    show = ['--show-dir', folder / 'pictures', '--cfg-options', few]
    run_test(task.config, checkpoint, folder / 'few', '--fuse', *show)


def predict(task: Task, checkpoint: Path, folder: Path) -> list[Path]:
    """Predict on a few validation images with ``tools/predict.py``; returns the pictures."""
    images = sorted(IMAGES.glob('*.jpg'))[:SHOWN]
    options = ('--fuse', '--score-thr', SCORE, '--out', folder / 'predictions')
    run_tool('predict.py', task.config, checkpoint, *images, *options)
    return [folder / 'predictions/pictures' / f'{image.stem}.png' for image in images]


def draw_both(rows: list[list[Path]]) -> None:
    """Write ``predictions.jpg``: a row of pictures for each task."""
    picture = montage([[cv2.imread(str(path)) for path in row] for row in rows])
    write_whole(OUT / 'predictions.jpg', cv2.imencode('.jpg', picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())


def measure(task: Task, form: Form, outcome: Outcome) -> None:
    """Export a form if it is a file, and test it.

    Raises:
        ToolError: if one of the two fails.
    """
    folder = OUT / task.name
    tested = outcome.checkpoint
    if form.export:
        tested = folder / f'{form.route}{form.suffix}'
        out = ('--out', tested, '--force', '--rounds', '0')
        run_tool('export.py', task.config, outcome.checkpoint, *form.export, *out)
    metrics = run_test(task.config, tested, folder / form.route, *form.test)
    outcome.points[form.route] = {label: factor * metrics[name] for label, (name, factor) in task.metrics.items()}
    if form.export:
        outcome.files[form.route] = tested


def measure_extra(task: Task, form: Form, outcome: Outcome) -> None:
    """The same, but what fails is noted, and what would be slower on this processor."""
    if form.route.endswith('_bf16') and (reason := check_dtype('bfloat16', 'cpu')):
        outcome.refused[form.route] = reason
        return
    try:
        measure(task, form, outcome)
    except ToolError as error:
        outcome.refused[form.route] = str(error)


def time_forms(task: Task, outcome: Outcome) -> None:
    """Time all forms that were had, in turns; what cannot be timed is noted."""
    cfg = read_config(task.config, {})
    model = build(cfg, str(outcome.checkpoint))
    outcome.blocks = len(reparam_blocks(model))
    left_out: dict[str, str] = {}
    routes, cpu = list(outcome.points), torch.device('cpu')
    try:
        rows = measure_model(task.name, model, cfg, routes, 1, input_size(cfg), ROUNDS, cpu, left_out, outcome.files)
    except (LeftOut, WorkerError) as error:
        rows, left_out = [], {f'{task.name} {route}': str(error) for route in routes}
    outcome.rows = {row['route']: row for row in rows}
    for name, reason in left_out.items():
        outcome.refused[name.removeprefix(f'{task.name} ')] = f'not timed: {reason}'


def table_of(task: Task, outcome: Outcome) -> Table:
    """A row for each form."""
    table = Table(title=f'{task.name}: RepViT-M0.6 on shapes, trained from scratch, {outcome.blocks} blocks fused')
    table.add_column('', no_wrap=True)
    for heading in (*task.metrics, 'file, MB', 'ms an image', 'times the first', 'memory of the process, MiB'):
        table.add_column(heading, justify='right')
    for form in (*ESSENTIALS, *EXTRAS):
        points, file, row = (getattr(outcome, of).get(form.route) for of in ('points', 'files', 'rows'))
        cells = [f'{points[label]:.1f}' if points else '' for label in task.metrics]
        parts = (file, file.with_suffix('.bin')) if file else ()
        size = sum(part.stat().st_size for part in parts if part.exists())
        cells.append(f'{size / 1e6:.1f}' if size else '')
        cells += [f'{row["ms"]:.1f}', f'{row["times_first"]:.2f}'] if row else ['', '']
        memory = (row or {}).get('process_bytes')
        cells.append(f'{memory / 2**20:.0f}' if memory else '')
        table.add_row(form.heading, *(cells if points else ['refused', *cells[1:]]))
    return table


def remarks(task: Task, outcome: Outcome) -> list[str]:
    """A line for each reason why forms could not be had, and for each form that differs from the unfused network."""
    headings: dict[str, list[str]] = {}
    for form in (*ESSENTIALS, *EXTRAS):
        if form.route in outcome.refused:
            headings.setdefault(outcome.refused[form.route], []).append(form.heading)
    lines = [f'{task.name}, {"; ".join(names)}: {reason}' for reason, names in headings.items()]
    for form in EXTRAS:
        for label, value in outcome.points.get(form.route, {}).items():
            if not abs(change := value - outcome.points[UNFUSED.route][label]) < 1:
                lines.append(f'{task.name}, {form.heading}: {label} changes by {change:+.1f}')
    return lines


def report(outcomes: dict[str, Outcome]) -> None:
    """Print the tables and leave them in the demo's folder."""
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / 'table.txt').open('w') as file:
        for console in (Console(width=max(Console().width, 120)), Console(file=file, width=120)):
            for task in TASKS:
                console.print(table_of(task, outcomes[task.name]))
                for line in remarks(task, outcomes[task.name]):
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
    print(f'pictures, ground truth beside prediction: {OUT}/*/pictures')
    print(f'predictions of both models: {OUT}/predictions.jpg, {OUT}/*/predictions/index.html')


def shortcomings(outcomes: dict[str, Outcome]) -> list[str]:
    """What went wrong: figures below what training has to reach, and figures that fusing or exporting changed."""
    found = []
    for task in TASKS:
        points = outcomes[task.name].points
        unfused = points[UNFUSED.route]
        for label, value in unfused.items():
            for form in ESSENTIALS:
                if not abs(points[form.route][label] - value) < SAME:
                    found.append(f'{label} is {value:.2f} unfused and {points[form.route][label]:.2f} {form.heading}')
            if not value >= task.wanted.get(label, 0):
                found.append(f'{label} is {value:.1f}, wanted {task.wanted[label]}')
    return found


def main() -> None:
    """Run the demo."""
    outcomes: dict[str, Outcome] = {}
    rows: list[list[Path]] = []
    try:
        run_tool('make_shapes.py')
        for task in TASKS:
            folder = OUT / task.name
            outcome = outcomes[task.name] = Outcome(train(task, folder))
            for form in ESSENTIALS:
                measure(task, form, outcome)
            draw(task, outcome.checkpoint, folder)
            rows.append(predict(task, outcome.checkpoint, folder))
    except ToolError as error:
        sys.exit(f'the demo stops here: {error}')
    draw_both(rows)
    if found := shortcomings(outcomes):
        sys.exit('the demo did not reach what it should: ' + '; '.join(found))
    for task in TASKS:
        for form in EXTRAS:
            measure_extra(task, form, outcomes[task.name])
        time_forms(task, outcomes[task.name])
    report(outcomes)


if __name__ == '__main__':
    start(main)
