"""Train, test, fuse, export and test again on the shapes data set: python tools/demo.py (or: make demo)."""

import math
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

from repvit_mm.compat.pytorch import multiplies_bfloat16
from repvit_mm.deploy.benchmark.models import FORMS, build, measure_model
from repvit_mm.deploy.load import input_size
from repvit_mm.deploy.picture import montage
from repvit_mm.files import write_whole
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
class Column:
    """A form of a trained network.

    Args:
        heading: What the table calls it.
        route: What the benchmark calls it.
        test: Options of ``tools/test.py``.
        export: Options of ``tools/export.py`` that make its file, and the file's suffix; empty if torch runs it.
        may_lose: How many points a figure may lie below the unfused network's.
        may_gain: How many it may lie above.
    """

    heading: str
    route: str
    test: tuple[str, ...] = ()
    export: tuple[str, ...] = ()
    suffix: str = ''
    may_lose: float = 0.15  # MMDetection rounds to a tenth
    may_gain: float = 0.15


BFLOAT16 = ('--dtype', 'bfloat16')
ROUNDED = dict(may_lose=0.35, may_gain=math.inf)

BRANCHES = tuple(f'model.backbone.{option}={value}' for option, value in FORMS['plain'].items())

ALL_COLUMNS = (
    Column('branch by branch', 'plain', ('--cfg-options', *BRANCHES)),
    Column('unfused', 'folded'),
    Column('fused', 'fused', ('--fuse',)),
    Column('fused, bfloat16', 'fused_bf16', ('--fuse', *BFLOAT16), **ROUNDED),
    Column('compiled, bfloat16', 'compiled_bf16', ('--fuse', '--compile', *BFLOAT16), **ROUNDED),
    Column('ONNX', 'onnxruntime', export=('--to', 'onnx'), suffix='.onnx'),
    Column('OpenVINO bfloat16', 'openvino_bf16', export=('--to', 'openvino', '--bf16'), suffix='.xml', **ROUNDED),
    # The exporter itself refuses a file that loses more than a point.
    Column(
        'OpenVINO int8',
        'openvino_int8',
        export=('--to', 'openvino', '--int8'),
        suffix='.xml',
        may_lose=math.inf,
        may_gain=math.inf,
    ),
)
COLUMNS = tuple(column for column in ALL_COLUMNS if multiplies_bfloat16() or 'bf16' not in column.route)
"""What is measured on this processor."""


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
    """What was measured of a task.

    Args:
        metrics: Label -> a percentage for each column.
        blocks: How many blocks fusing turned into one convolution each.
        sizes: Size of each column's file in MB, if it has one.
        rows: What the benchmark gives for each column.
    """

    metrics: dict[str, list[float]] = field(default_factory=dict)
    blocks: int = 0
    sizes: list[float | None] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


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


def measure(task: Task, checkpoint: Path, folder: Path) -> Outcome:
    """Test, export and time every form of a trained network.

    Args:
        task: The task.
        checkpoint: Its checkpoint.
        folder: For files and logs.
    """
    outcome = Outcome()
    files: dict[str, Path] = {}
    for column in COLUMNS:
        tested = checkpoint
        if column.export:
            tested = files[column.route] = folder / f'{column.route}{column.suffix}'
            out = ('--out', tested, '--force', '--rounds', '0')
            run_tool('export.py', task.config, checkpoint, *column.export, *out)
        metrics = run_test(task.config, tested, folder / column.route, *column.test)
        for label, (name, factor) in task.metrics.items():
            outcome.metrics.setdefault(label, []).append(factor * metrics[name])
        parts = (tested, tested.with_suffix('.bin')) if column.export else ()
        outcome.sizes.append(sum(part.stat().st_size for part in parts if part.exists()) / 1e6 or None)
    cfg = read_config(task.config, {})
    model = build(cfg, str(checkpoint))
    outcome.blocks = len(reparam_blocks(model))
    routes = [column.route for column in COLUMNS]
    cpu = torch.device('cpu')
    outcome.rows = measure_model(task.name, model, cfg, routes, 1, input_size(cfg), ROUNDS, cpu, {}, files)
    return outcome


def report(outcomes: dict[str, Outcome]) -> None:
    """Print the table and leave it in the demo's folder."""
    table = Table(title='RepViT-M0.6 on shapes, trained from scratch')
    table.add_column('')
    for column in COLUMNS:
        table.add_column(column.heading, justify='right')
    for name, outcome in outcomes.items():
        for label, values in outcome.metrics.items():
            table.add_row(label, *(f'{value:.1f}' for value in values))
        fused = [str(outcome.blocks) if column.route == 'fused' else '' for column in COLUMNS]
        table.add_row(f'{name}: blocks fused', *fused)
        table.add_row(f'{name}: parameters', *(f'{row["parameters"]:,}' for row in outcome.rows))
        table.add_row(f'{name}: file, MB', *(f'{size:.1f}' if size else '' for size in outcome.sizes))
        table.add_row(f'{name}: ms an image', *(f'{row["ms"]:.1f}' for row in outcome.rows))
        table.add_row(f'{name}: times the first', *(f'{row["times_first"]:.2f}' for row in outcome.rows))
        memory = [row.get('process_bytes') for row in outcome.rows]
        cells = [f'{number / 2**20:.0f}' if number else '' for number in memory]
        table.add_row(f'{name}: memory of the process, MiB', *cells, end_section=True)
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / 'table.txt').open('w') as file:
        for console in (Console(width=max(Console().width, 150)), Console(file=file, width=150)):
            console.print(table)
    print(f'pictures, ground truth beside prediction: {OUT}/*/pictures')
    print(f'predictions of both models: {OUT}/predictions.jpg, {OUT}/*/predictions/index.html')


def shortcomings(outcomes: dict[str, Outcome]) -> list[str]:
    """What went wrong: figures below what training has to reach, and figures that fusing or exporting changed."""
    found = []
    for task in TASKS:
        for label, values in outcomes[task.name].metrics.items():
            unfused = values[1]
            for column, value in zip(COLUMNS, values, strict=True):
                if not -column.may_lose < value - unfused < column.may_gain:
                    found.append(f'{label} is {unfused:.2f} unfused and {value:.2f} {column.heading}')
            if not unfused >= task.wanted.get(label, 0):
                found.append(f'{label} is {unfused:.1f}, wanted {task.wanted[label]}')
    return found


def main() -> None:
    """Run the demo."""
    outcomes: dict[str, Outcome] = {}
    rows: list[list[Path]] = []
    try:
        run_tool('make_shapes.py')
        for task in TASKS:
            folder = OUT / task.name
            checkpoint = train(task, folder)
            draw(task, checkpoint, folder)
            rows.append(predict(task, checkpoint, folder))
            outcomes[task.name] = measure(task, checkpoint, folder)
    except ToolError as error:
        sys.exit(f'the demo stops here: {error}')
    draw_both(rows)
    report(outcomes)
    if found := shortcomings(outcomes):
        sys.exit('the demo did not reach what it should: ' + '; '.join(found))


if __name__ == '__main__':
    start(main)
