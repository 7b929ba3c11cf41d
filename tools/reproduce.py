"""Test the released models and compare with their published figures: python tools/reproduce.py."""

import argparse
import difflib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import _first  # noqa: F401
import yaml
from _launch import TOOLS, Parser, ToolError, run_test, start
from rich.console import Console
from rich.table import Table

from repvit_mm.checkpoint import CheckpointError, cached, download
from repvit_mm.imagenet import RELEASED, Classifier, ImageNetError, check_needs, measure_top1
from repvit_mm.messages import one_line

METRICS = {'box AP': ('coco/bbox_mAP', 100), 'mask AP': ('coco/segm_mAP', 100), 'mIoU': ('mIoU', 1)}
"""Metric in the model index -> its name in a test run, and the factor that makes that a percentage."""
TOLERANCE = 0.1
"""Largest difference, in points, that counts as reproduced: what the published figures are rounded to."""


@dataclass(frozen=True)
class Entry:
    """A model that has weights and published figures.

    Args:
        name: Its name.
        weights: Address of its checkpoint.
        published: Metric -> percentage.
        config: Path of its config; ``None`` for a classifier.
        classifier: The classifier, if it is one.
    """

    name: str
    weights: str
    published: dict[str, float]
    config: Path | None = None
    classifier: Classifier | None = None

    @property
    def file(self) -> str:
        """Where its checkpoint lies below a folder of checkpoints."""
        return self.classifier.file if self.classifier else self.weights.rpartition('/')[2]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description='Test the released detectors, segmentors and classifiers, fused, and compare with their published '
        'figures. Run it where data/coco, data/ade and data/imagenet are. Classifiers need MMPretrain.'
    )
    parser.add_argument('names', nargs='*', metavar='NAME', help='models (default: all that were released)')
    parser.add_argument('--folder', type=Path, help='where the checkpoints lie (default: they are downloaded once)')
    parser.add_argument('--index', type=Path, help="model index (default: this project's, and the classifiers)")
    parser.add_argument(
        '--imagenet', type=Path, default=Path('data/imagenet'), help="ImageNet's folder (default: %(default)s)"
    )
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/reproduce'), help='folder for logs (default: %(default)s)'
    )
    return parser.parse_args(argv)


def read_index(path: Path) -> dict[str, Entry]:
    """The models of an index that have weights and published figures, by name; exits with one line if it has none."""
    found = {}
    try:
        for metafile in yaml.safe_load(path.read_text())['Import']:
            for model in yaml.safe_load((path.parent / metafile).read_text())['Models']:
                if 'Weights' in model and 'Results' in model:
                    published = {metric: v for result in model['Results'] for metric, v in result['Metrics'].items()}
                    config = path.parent / model['Config']
                    found[model['Name']] = Entry(model['Name'], model['Weights'], published, config)
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        sys.exit(f'model index {path} cannot be read: {one_line(error)}')
    if not found:
        sys.exit(f'model index {path} lists no model with Weights and Results')
    return found


def classifiers() -> dict[str, Entry]:
    """The released classifiers, by name."""
    return {model.name: Entry(model.name, model.weights, {'top-1': model.top1}, classifier=model) for model in RELEASED}


def choose(entries: dict[str, Entry], names: Sequence[str]) -> list[Entry]:
    """The named models, all without names; exits with one line on an unknown name."""
    for name in names:
        if name not in entries:
            nearest = difflib.get_close_matches(name, entries, n=1, cutoff=0)[0]
            sys.exit(f'{name}: no model with weights and results; the nearest is {nearest}')
    return [entries[name] for name in names or entries]


def fetch(entry: Entry, folder: Path | None) -> Path:
    """Where a model's checkpoint lies; it is downloaded unless a folder is given.

    Raises:
        CheckpointError: if it cannot be had.
    """
    path = (folder or cached(entry.weights).parent) / entry.file
    if folder is None:
        return download(entry.weights, str(path.parent))
    if not path.is_file():
        raise CheckpointError(f'checkpoint {path} not found; it is at {entry.weights}')
    return path


def test(entry: Entry, args: argparse.Namespace) -> dict[str, float]:
    """The metrics of a model, fused, in percent.

    Raises:
        CheckpointError: if its checkpoint cannot be had or does not fit.
        ImageNetError, ToolError: if the test fails.
    """
    folder = args.work_dir / entry.name
    if entry.classifier:
        check_needs(args.imagenet)  # before anything is fetched
        return {'top-1': measure_top1(entry.classifier, fetch(entry, args.folder), args.imagenet, folder)}
    scalars = run_test(entry.config, fetch(entry, args.folder), folder, '--fuse')
    return {metric: factor * scalars[name] for metric, (name, factor) in METRICS.items() if name in scalars}


def compare(entry: Entry, measured: dict[str, float], table: Table) -> list[str]:
    """Put a model's figures into the table, and return what to say of each that is not reproduced."""
    shortcomings = []
    for metric, published in entry.published.items():
        value = measured.get(metric, math.nan)
        difference = round(value - published, 2)  # measured to two digits: 39.9 - 39.8 is no more than 0.1
        reproduced = abs(difference) <= TOLERANCE  # and not a number is not
        figures = ('-', '-') if math.isnan(value) else (f'{value:.2f}', f'{difference:+.2f}')
        table.add_row(entry.name, metric, f'{published:.1f}', *figures, 'yes' if reproduced else 'no')
        if not reproduced:
            shortcomings.append(f'{metric} is {figures[0]}, published {published:.1f}')
    return shortcomings


def main(argv: Sequence[str] | None = None) -> None:
    """Test the models one after the other and print the table."""
    args = parse_args(argv)
    table = Table(title='Released models, tested fused with the shipped configs, in percent')
    table.add_column('model', overflow='fold')
    table.add_column('metric')
    for heading in ('published', 'measured', 'difference', 'reproduced'):
        table.add_column(heading, justify='right')
    entries = read_index(args.index or TOOLS.parent / 'model-index.yml') | ({} if args.index else classifiers())
    shortcomings: dict[str, list[str]] = {}  # several models may lack the same
    for entry in choose(entries, args.names):
        try:
            found = compare(entry, test(entry, args), table)
        except (CheckpointError, ImageNetError, ToolError) as error:
            compare(entry, {}, table)
            found = [str(error)]
        for shortcoming in found:
            shortcomings.setdefault(shortcoming, []).append(entry.name)
    Console().print(table)
    if shortcomings:
        sys.exit('\n'.join(f'{", ".join(names)}: {shortcoming}' for shortcoming, names in shortcomings.items()))


if __name__ == '__main__':
    start(main)
