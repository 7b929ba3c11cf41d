"""Checkpoints: reading them safely, and the tensor names of the authors and of timm in our own terms."""

import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader


class Names(NamedTuple):
    """One module's name in our tree, in the authors' and in timm's."""

    ours: str
    authors: str
    timm: str


STEM = (Names('stem.conv1', 'features.0.0', 'stem.conv1'), Names('stem.conv2', 'features.0.2', 'stem.conv2'))
BLOCK = (
    Names('token_mixer', 'token_mixer.0', 'token_mixer'),
    Names('token_mixer.conv3x3', 'token_mixer.0.conv', 'token_mixer.conv'),
    Names('token_mixer.conv1x1', 'token_mixer.0.conv1', 'token_mixer.conv1'),
    Names('se', 'token_mixer.1', 'se'),
    Names('channel_mixer.expand', 'channel_mixer.m.0', 'channel_mixer.conv1'),
    Names('channel_mixer.project', 'channel_mixer.m.2', 'channel_mixer.conv2'),
)
DOWNSAMPLE = (
    Names('spatial', 'token_mixer.0', 'spatial_downsample'),
    Names('channel', 'token_mixer.2', 'channel_downsample'),
    Names('channel_mixer.expand', 'channel_mixer.m.0', 'ffn.conv1'),
    Names('channel_mixer.project', 'channel_mixer.m.2', 'ffn.conv2'),
)
HEADS = ('classifier.', 'head.')
"""First part of the names of classification heads, the authors' and timm's."""


STATISTICS = ('min', 'max', 'current', 'mean')
"""The methods of a ``HistoryBuffer`` that MMEngine's checkpoints refer to."""


def history_getattr(owner: type, name: str) -> Callable:
    """What ``getattr`` stands for in MMEngine's checkpoints: one of the four statistics of a ``HistoryBuffer``.

    The real ``getattr`` reaches everything, so a file that may call it may do anything.
    """
    if owner is not HistoryBuffer or name not in STATISTICS:
        raise pickle.UnpicklingError(f'a checkpoint may not look up {name!r} of {owner!r}')
    return getattr(HistoryBuffer, name)


def harmless_globals() -> list:
    """What the training metadata in MMEngine's checkpoints is made of, beyond what torch itself allows."""
    reconstruct, _ = np.zeros(1).__reduce__()[:2]
    scalar, _ = np.float64(0).__reduce__()[:2]
    dtypes = {type(np.dtype(code)) for code in np.typecodes['All'] if code != 'O'}
    # Files written next to NumPy 1 and 2 name the same functions differently.
    functions = [
        (function, f'numpy.{core}.multiarray.{function.__name__}')
        for function in (reconstruct, scalar)
        for core in ('core', '_core')
    ]
    # An empty array is written with a call of bytes.
    return [bytes, HistoryBuffer, (history_getattr, 'builtins.getattr'), np.ndarray, np.dtype, *dtypes, *functions]


@CheckpointLoader.register_scheme(prefixes='', force=True)
def read_checkpoint(filename: str, map_location: Any = None) -> Any:
    """Read a checkpoint file without running anything in it; in place of MMEngine's own reader of local files.

    Args:
        filename: Path of the file.
        map_location: As in ``torch.load``.

    Raises:
        FileNotFoundError: if there is no such file.
        pickle.UnpicklingError: if it holds anything but tensors, plain containers and MMEngine's training metadata.
    """
    filename = os.path.expanduser(filename)
    if not os.path.isfile(filename):
        raise FileNotFoundError(f'checkpoint {filename} not found')
    with torch.serialization.safe_globals(harmless_globals()):
        return torch.load(filename, map_location=map_location, weights_only=True)


def unwrap(checkpoint: MutableMapping[str, Any]) -> None:
    """Replace, in place, a checkpoint that keeps its tensors under ``state_dict`` or ``model`` by these tensors."""
    for key in ('state_dict', 'model'):
        tensors = checkpoint.get(key)
        if isinstance(tensors, Mapping):
            checkpoint.clear()
            checkpoint.update(tensors)


def stage_lengths(names: Iterable[str]) -> list[int]:
    """The number of blocks of each stage, stride-2 ones counted in, that foreign RepViT tensor names speak of."""
    last, downsamples, timm = 0, set(), {}
    for name in names:
        if match := re.match(r'features\.(\d+)\.(token_mixer\.2\.)?', name):
            last = max(last, int(match[1]))
            if match[2]:
                downsamples.add(int(match[1]))
        elif match := re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', name):
            timm[int(match[1])] = max(timm.get(int(match[1]), 0), int(match[2]) + 1)
    if timm:
        # timm counts the last block of stages 0 to 2 as a part of the downsample that follows.
        return [timm[stage] + (stage > 0) + (stage < max(timm)) for stage in sorted(timm)]
    borders = [1, *sorted(downsamples), last + 1]
    return [end - start for start, end in pairwise(borders)]


def module_names(lengths: Iterable[int]) -> list[Names]:
    """The names of every module that holds tensors in a RepViT with so many blocks a stage."""
    lengths = list(lengths)
    table = list(STEM)
    flat = 0
    for stage, length in enumerate(lengths):
        for position in range(length):
            flat += 1
            downsample = stage > 0 and position == 0
            if downsample:
                timm = f'stages.{stage}.downsample'
            elif position == length - 1 and stage < len(lengths) - 1:
                timm = f'stages.{stage + 1}.downsample.pre_block'
            else:
                timm = f'stages.{stage}.blocks.{position - (stage > 0)}'
            prefix = Names(f'stages.{stage}.{position}', f'features.{flat}', timm)
            for names in DOWNSAMPLE if downsample else BLOCK:
                table.append(Names(*(f'{p}.{name}' for p, name in zip(prefix, names, strict=True))))
    return table


def translate(names: Iterable[str]) -> dict[str, str | None]:
    """Our name of each tensor of a RepViT, by the authors' names, timm's or our own; by name alone.

    Args:
        names: All tensor names of one backbone.

    Returns:
        The given names with ours; a classification head's tensor with ``None``; an unknown name with itself.
    """
    names = list(names)
    table = module_names(stage_lengths(names))
    ours = {theirs: row.ours for row in table for theirs in (row.authors, row.timm)}
    translated: dict[str, str | None] = {}
    for name in names:
        # A tensor of a ConvBN is named <module>.conv.weight here and <module>.c.weight elsewhere.
        module, _, leaf = re.sub(r'\.c\.weight$', '.conv.weight', name).rpartition('.')
        inner = ''
        while module and module not in ours:
            module, _, part = module.rpartition('.')
            inner = f'.{part}{inner}'
        if name.startswith(HEADS):
            translated[name] = None
        else:
            translated[name] = f'{ours[module]}{inner}.{leaf}' if module else name
    return translated
