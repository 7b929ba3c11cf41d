"""Times several candidates in turns, so that changes in the machine's speed affect all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track

Run = Callable[[], Any]


class Spread(NamedTuple):
    """Median and quartiles of a sample."""

    median: float
    lower: float
    upper: float


def spread(sample: Sequence[float]) -> Spread:
    """Median and quartiles; a sample of one is all three."""
    if len(sample) == 1:
        return Spread(*sample * 3)
    lower, median, upper = statistics.quantiles(sample, n=4, method='inclusive')
    return Spread(median, lower, upper)


def interleave(
    candidates: Mapping[str, Run],
    rounds: int,
    device: torch.device,
    label: str = '',
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Spread]:
    """Time candidates in turns, so that changes in the machine's speed affect all of them alike.

    In each round every candidate has one turn, and each round begins with another candidate. A turn is two runs, of
    which the second is timed: the first brings the candidate's weights back into the caches and lets the threads of
    the one before go to sleep. A round that is not counted comes first and chooses kernels.

    Args:
        candidates: Name -> what to run.
        rounds: Counted rounds.
        device: Where it computes; queued work is waited for.
        label: What the progress bar says.
        clock: Gives seconds.

    Returns:
        Name -> seconds of one run.
    """
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    console = Console(stderr=True)
    for turn in track(range(-1, rounds), label, console=console, transient=True, disable=not console.is_terminal):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            candidates[name]()
            wait()
            start = clock()
            candidates[name]()
            wait()
            if turn >= 0:
                seconds[name].append(clock() - start)
    return {name: spread(sample) for name, sample in seconds.items()}
