"""Train, test, fuse and test again on the shapes data set: python tools/demo.py (or: make demo)."""

import copy
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from _launch import TOOLS, ToolError, build_runner, run_test, run_tool
from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from torch import nn

from repvit_mm import switch_to_deploy
from repvit_mm.reparam import reparam_blocks

CONFIGS = TOOLS.parent / 'configs'
OUT = Path('work_dirs/demo')
PICTURES = 8
"""Validation images of which pictures are made."""
TIMED = 20
"""Validation images on which the networks are timed."""


@dataclass(frozen=True)
class Task:
    """One config of the demo.

    Args:
        name: Name of its folder.
        config: Path of the config.
        metrics: What the table shows: its label -> the metric's name and the factor that makes it a percentage.
        wanted: Label -> the percentage that training is to reach.
    """

    name: str
    config: Path
    metrics: dict[str, tuple[str, float]]
    wanted: dict[str, float]


@dataclass
class Outcome:
    """What was measured, unfused and fused: percentages by label, then size and speed."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    blocks: int = 0
    parameters: list[int] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)


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


def time_networks(networks: list[nn.Module], batches: list[dict]) -> list[float]:
    """Median milliseconds an image of each network, interleaved image by image."""
    times: list[list[float]] = [[] for _ in networks]
    with torch.no_grad():
        for batch in batches:
            for network, seconds in zip(networks, times, strict=True):
                batch_of_its_own = copy.deepcopy(batch)
                start = time.perf_counter()
                network.test_step(batch_of_its_own)
                seconds.append(time.perf_counter() - start)
    return [1000 * median(seconds) for seconds in times]


def measure(task: Task, checkpoint: Path, folder: Path, outcome: Outcome) -> None:
    """Blocks, parameters and speed, unfused and fused."""
    cfg = Config.fromfile(task.config)
    cfg.merge_from_dict(dict(work_dir=str(folder), log_level='WARNING'))
    runner = build_runner(cfg)
    runner.load_checkpoint(str(checkpoint))
    unfused = runner.model.eval()
    fused = switch_to_deploy(copy.deepcopy(unfused))
    outcome.blocks = len(reparam_blocks(unfused))
    outcome.parameters = [sum(p.numel() for p in model.parameters()) for model in (unfused, fused)]
    batches = [batch for batch, _ in zip(runner.build_dataloader(cfg.test_dataloader), range(TIMED), strict=False)]
    time_networks([unfused, fused], batches[:3])  # the first runs choose kernels
    outcome.milliseconds = time_networks([unfused, fused], batches)


def run(task: Task) -> Outcome:
    """Train, test, fuse, test again, take pictures and measure."""
    folder = OUT / task.name
    shutil.rmtree(folder, ignore_errors=True)
    run_tool('train.py', task.config, '--work-dir', folder, '--seed', '0')
    checkpoint = Path((folder / 'last_checkpoint').read_text())
    before = run_test(task.config, checkpoint, folder / 'unfused')
    after = run_test(task.config, checkpoint, folder / 'fused', '--fuse')
    few = f'test_dataloader.dataset.indices={PICTURES}'
    show = ['--show-dir', folder / 'pictures', '--cfg-options', few]
    run_test(task.config, checkpoint, folder / 'few', '--fuse', *show)
    outcome = Outcome()
    for label, (name, factor) in task.metrics.items():
        outcome.metrics[label] = [factor * before[name], factor * after[name]]
    measure(task, checkpoint, folder / 'speed', outcome)
    return outcome


def report(outcomes: dict[str, Outcome]) -> None:
    """Print the table and leave it in the demo's folder."""
    table = Table(title='RepViT-M0.6 on shapes, trained from scratch')
    for heading in ('', 'unfused', 'fused'):
        table.add_column(heading, justify='right' if heading else 'left')
    for name, outcome in outcomes.items():
        for label, values in outcome.metrics.items():
            table.add_row(label, *(f'{value:.1f}' for value in values))
        table.add_row(f'{name}: blocks fused', '', str(outcome.blocks))
        table.add_row(f'{name}: parameters', *(f'{number:,}' for number in outcome.parameters))
        table.add_row(f'{name}: ms an image', *(f'{number:.1f}' for number in outcome.milliseconds), end_section=True)
    Console().print(table)
    with (OUT / 'table.txt').open('w') as file:
        Console(file=file).print(table)
    print(f'pictures, ground truth beside prediction: {OUT}/*/pictures')


def shortcomings(outcomes: dict[str, Outcome]) -> list[str]:
    """What is not as it should be: figures below what training is to reach, or changed by fusing."""
    found = []
    for task in TASKS:
        for label, (before, after) in outcomes[task.name].metrics.items():
            if abs(before - after) > 0.1:
                found.append(f'{label} is {before:.2f} unfused and {after:.2f} fused')
            if before < task.wanted.get(label, 0):
                found.append(f'{label} is {before:.1f}, wanted {task.wanted[label]}')
    return found


def main() -> None:
    """Run the demo."""
    try:
        run_tool('make_shapes.py')
        outcomes = {task.name: run(task) for task in TASKS}
    except ToolError as error:
        sys.exit(f'the demo stops here: {error}')
    report(outcomes)
    if found := shortcomings(outcomes):
        sys.exit('the demo did not reach what it should: ' + '; '.join(found))


if __name__ == '__main__':
    main()
