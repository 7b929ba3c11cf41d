"""The tensor names of the authors' RepViT and of timm's, and our own."""

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple


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

WHOSE = {'ours': 'our', 'authors': "the authors'", 'timm': "timm's"}
"""How a convention is called in a sentence."""


def origin_of(names: Iterable[str]) -> str | None:
    """Whose names a RepViT's tensors have: ``'ours'``, ``'authors'`` or ``'timm'``; ``None`` if it is no RepViT."""
    for name in names:
        if re.match(r'features\.\d+\.', name):
            return 'authors'
        if re.match(r'stages\.\d+\.(blocks|downsample)\.', name):
            return 'timm'
        if re.match(r'stages\.\d+\.\d+\.', name):
            return 'ours'
    return None


def stage_lengths(names: Iterable[str]) -> list[int]:
    """The number of blocks of each stage, stride-2 ones counted in, that the tensor names of a RepViT speak of."""
    last, downsamples = 0, set()
    timm: dict[int, int] = {}
    ours: dict[int, int] = {}
    for name in names:
        if match := re.match(r'features\.(\d+)\.(token_mixer\.2\.)?', name):
            last = max(last, int(match[1]))
            if match[2]:
                downsamples.add(int(match[1]))
        elif match := re.match(r'stages\.(\d+)\.(blocks\.)?(\d+)\.', name):
            lengths = timm if match[2] else ours
            lengths[int(match[1])] = max(lengths.get(int(match[1]), 0), int(match[3]) + 1)
    if timm:
        # timm counts the last block of stages 0 to 2 as a part of the downsample that follows.
        return [timm[stage] + (stage > 0) + (stage < max(timm)) for stage in sorted(timm)]
    if ours:
        return [ours[stage] for stage in sorted(ours)]
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


def translate(names: Iterable[str], to: str = 'ours') -> dict[str, str | None]:
    """The names of a RepViT's tensors in another convention; by the names alone.

    Args:
        names: All tensor names of one backbone, in any one convention.
        to: ``'ours'``, ``'authors'`` or ``'timm'``.

    Returns:
        The given names with the new ones; a classification head's tensor with ``None``; a name outside every known
        module with itself.
    """
    names = list(names)
    origin = origin_of(names)
    if origin is None:
        return {name: name for name in names}
    table = {getattr(row, origin): getattr(row, to) for row in module_names(stage_lengths(names))}
    return {name: None if name.startswith(HEADS) else rename(name, table, to) for name in names}


def rename(name: str, table: dict[str, str], to: str) -> str:
    """One tensor's new name, by the longest module name in ``table`` that it begins with."""
    # A tensor of a ConvBN is named <module>.conv.weight here and <module>.c.weight elsewhere.
    module, _, leaf = re.sub(r'\.c\.weight$', '.conv.weight', name).rpartition('.')
    inner = ''
    while module and module not in table:
        module, _, part = module.rpartition('.')
        inner = f'.{part}{inner}'
    if not module:
        return name
    renamed = f'{table[module]}{inner}.{leaf}'
    return renamed if to == 'ours' else re.sub(r'\.conv\.weight$', '.c.weight', renamed)


def backbone_prefix(names: Iterable[str]) -> str | None:
    """What stands before the tensor names of the RepViT in a whole model: ``''``, ``'backbone.'``, ``'module.'``, ...

    Returns:
        The prefix, the shortest one if a file holds several networks (a student and its teacher, say); ``None`` if it
        holds none.
    """
    first = re.compile(r'(|.*\.)(?:features\.0\.0|stem\.conv1)\.')
    found = {match[1] for name in names if (match := first.match(name))}
    return min(found, key=len) if found else None
