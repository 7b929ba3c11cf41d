"""Look at a config's data before training on it: python tools/check_data.py CONFIG."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import _first  # noqa: F401
import cv2
from _launch import Parser, add_config_options, check_data, read_config, start
from mmengine.config import Config
from rich.console import Console
from rich.progress import track
from rich.table import Table

from repvit_mm.data_check import Report, check_config
from repvit_mm.data_check.paths import SPLITS
from repvit_mm.data_check.report import count
from repvit_mm.data_check.sheet import contact_sheet
from repvit_mm.files import write_whole
from repvit_mm.messages import one_line


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Look at a config's data sets: counts, classes, sizes, whatever would stop or ruin a run, and a "
        'picture of what the model will see. The exit status is 1 if something would.'
    )
    parser.add_argument('config', help='config file, e.g. configs/det/mask_rcnn_repvit_m0_9_custom.py')
    parser.add_argument('--splits', nargs='+', choices=SPLITS, default=SPLITS, help='default: all')
    parser.add_argument(
        '--quick', action='store_true', help='read annotations and headers only, as tools/train.py does by itself'
    )
    parser.add_argument(
        '--out',
        type=Path,
        help='the contact sheet, a PNG of training images after augmentation with their ground truth '
        '(default: work_dirs/<config>/data.png)',
    )
    parser.add_argument(
        '--images', type=int, default=16, metavar='N', help='images on the contact sheet; 0 makes none (default: 16)'
    )
    add_config_options(parser)
    args = parser.parse_args(argv)
    if args.images < 0:
        parser.error('--images: at least 0')
    if args.out and args.out.suffix.lower() != '.png':
        parser.error(f'--out {args.out}: expected a name that ends in .png')
    return args


def progress(items: Iterable, title: str) -> Iterable:
    """A progress bar on stderr, so that it does not mix with the report."""
    return track(items, title, console=Console(stderr=True), transient=True)


def class_table(report: Report) -> Table:
    """The class balance."""
    table = Table('class', 'images', report.unit, 'share')
    for column in table.columns[1:]:
        column.justify = 'right'
    total = sum(report.amounts.values()) or 1
    for index, name in enumerate(report.classes):
        amount = report.amounts[index]
        table.add_row(str(name), f'{report.images_with[index]:,}', f'{amount:,}', f'{amount / total:.1%}')
    return table


def show(report: Report, console: Console) -> None:
    """Print what was found in a data set."""
    console.rule(f'{report.name} ({report.kind})', align='left')
    if report.images:
        console.print(report.summary(), highlight=False, markup=False)
    if report.amounts and not isinstance(report.classes, str):
        console.print(class_table(report))
    for finding in report.findings:
        style = 'red' if finding.level == 'error' else 'yellow'
        console.print(f'{finding.level}: {finding.text}', style=style, markup=False, highlight=False, soft_wrap=True)


def draw(cfg: Config, path: Path, images: int) -> None:
    """Write the contact sheet; exits with one line if the pipeline fails."""
    try:
        sheet = contact_sheet(cfg, images=images)
    except Exception as error:  # anything can go wrong in a pipeline
        sys.exit(f'no contact sheet: the training pipeline fails: {one_line(error)}')
    try:
        write_whole(path, cv2.imencode('.png', sheet)[1].tobytes())
    except OSError as error:
        sys.exit(f'{path} cannot be written: {one_line(error)}')
    print(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Look at the data."""
    args = parse_args(argv)
    cfg = read_config(Path(args.config), args.cfg_options)
    check_data(cfg, *args.splits)
    console = Console()
    reports = check_config(cfg, args.splits, args.quick, progress)
    if not reports:
        sys.exit(f'config {args.config} has no data set of {", ".join(args.splits)}')
    for report in reports:
        show(report, console)
    errors = sum(len(report.errors) for report in reports)
    warned = sum(len(report.warnings) for report in reports)
    unreadable = any(not report.images for report in reports)
    if args.images and cfg.get('train_dataloader') and not unreadable:
        draw(cfg, args.out or Path('work_dirs', Path(args.config).stem, 'data.png'), args.images)
    print(f'{count(len(reports), "data set")}: {count(errors, "error")}, {count(warned, "warning")}')
    if errors:
        sys.exit(1)


if __name__ == '__main__':
    start(main)
