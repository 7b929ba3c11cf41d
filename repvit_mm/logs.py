"""The logs of training runs, and their picture. Needs neither torch nor MMEngine."""

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import write_whole

NOT_DRAWN = ('iter', 'epoch', 'step', 'time', 'data_time', 'memory', 'eta')
"""Quantities that a log holds beside what is drawn."""

LOGARITHMIC = 1000
"""A loss is drawn on a logarithmic axis if its largest value is so many times its smallest."""


class LogError(ValueError):
    """A run cannot be read; the message is one line that says why."""


@dataclass
class Run:
    """What a training run logged.

    Args:
        name: What to call it.
        series: Name of a quantity -> iteration -> value. Losses and rates are averages of the logging interval.
        metrics: The quantities that validation gave.
    """

    name: str
    series: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    metrics: set[str] = field(default_factory=set)


def read_run(folder: Path) -> Run:
    """Read a run's work folder.

    A resumed run has a log for each start. Where two logs cover the same iterations, the later one counts.

    Args:
        folder: The work folder, the folder of one start in it, or a ``scalars.json``.

    Raises:
        LogError: if there is no log of MMEngine's, or if a log is empty.
    """
    files = [folder] if folder.is_file() else sorted(folder.glob('**/vis_data/scalars.json'))
    if not files:
        raise LogError(
            f'{folder} holds no log: expected the work folder of a training run (with */vis_data/scalars.json)'
        )
    run = Run(folder.stem if folder.is_file() else folder.resolve().name)
    for file in files:
        entries = list(entries_of(file))
        starts = [entry['iter'] for entry in entries if 'iter' in entry]
        if starts:  # what was logged after the checkpoint that this start went on from
            for values in run.series.values():
                for iteration in [iteration for iteration in values if iteration >= starts[0]]:
                    del values[iteration]
        add_entries(run, entries)
    if not run.series:
        raise LogError(f'{folder}: its log is empty')
    return run


def entries_of(file: Path) -> Iterable[Mapping[str, Any]]:
    """The lines of a log; a last line that a killed run left unfinished is skipped.

    Raises:
        LogError: if the file cannot be read or is no log.
    """
    try:
        lines = file.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(f'{file} cannot be read: {error}') from None
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            if number == len(lines):
                return
            raise LogError(f'{file}: line {number} is not JSON') from None
        if not isinstance(entry, dict):
            raise LogError(f'{file}: line {number} is no entry of a log')
        yield entry


def add_entries(run: Run, entries: Iterable[Mapping[str, Any]]) -> None:
    """Add a log's entries. An entry of validation belongs to the last training entry before it."""
    iteration = 0
    for entry in entries:
        trains = 'iter' in entry
        iteration = int(entry['iter']) if trains else max(iteration, int(entry.get('step', 0)))
        for name, value in entry.items():
            if name.endswith(NOT_DRAWN) or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            run.series[name][iteration] = float(value)
            if not trains:
                run.metrics.add(name)


def panels_of(runs: Sequence[Run]) -> list[str]:
    """The quantities to draw: the loss, its parts, the learning rate, the metrics."""
    names = list(dict.fromkeys(name for run in runs for name in run.series))
    metrics = {name for run in runs for name in run.metrics}

    def kind(name: str) -> int:
        if name in metrics:
            return 3
        return 0 if name == 'loss' else 1 if 'loss' in name else 2

    drawn = [name for name in names if name in metrics or 'loss' in name or name in ('lr', 'grad_norm')]
    return sorted(drawn, key=kind)


def draw_runs(runs: Sequence[Run], path: Path, metrics: Sequence[str] = ()) -> None:
    """Draw losses, learning rate and metrics of runs over their iterations into one PNG.

    Args:
        runs: The runs, each in a colour of its own.
        path: The file, which is written whole or not at all.
        metrics: Draw only those metrics whose names contain one of these; all if empty.

    Raises:
        LogError: if there is nothing to draw.
        OSError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    evaluated = {name for run in runs for name in run.metrics}
    panels = [
        name
        for name in panels_of(runs)
        if name not in evaluated or not metrics or any(part in name for part in metrics)
    ]
    if not panels:
        raise LogError('the logs hold neither a loss nor a metric')
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows + 0.5), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    end = max(iteration for run in runs for name in panels for iteration in run.series.get(name, ()))
    for axis, name in zip(axes, panels, strict=False):
        for index, run in enumerate(runs):
            values = sorted(run.series.get(name, {}).items())
            if values:
                marker = 'o' if name in evaluated or len(values) == 1 else None
                axis.plot(*zip(*values, strict=True), color=f'C{index}', marker=marker, markersize=4, label=run.name)
        drawn = [value for run in runs for value in run.series.get(name, {}).values()]
        if 'loss' in name and min(drawn) > 0 and max(drawn) > LOGARITHMIC * min(drawn):
            axis.set_yscale('log')
        axis.set_title(name, fontsize=10)
        axis.set_xlabel('iteration', fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.set_xlim(0, end * 1.05)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc='outside upper center', ncols=min(4, len(lines)), fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format='png', dpi=110)
    write_whole(path, png.getvalue())
