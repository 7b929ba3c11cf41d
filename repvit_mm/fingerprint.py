"""Whether a resumed run learns from the annotations that it has begun with."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def fingerprints(dataset: Any) -> dict[str, str]:
    """A digest of the annotations of each plain data set of MMEngine's kind inside a data set.

    Args:
        dataset: A data set, or a wrapper such as ``RepeatDataset`` or ``ConcatDataset``.

    Returns:
        The path of an annotation file -> the SHA-256 of its content. Without such a file the data set has label maps:
        their folder -> the SHA-256 of their names and sizes.
    """
    found = {}
    for plain in datasets_within(dataset):
        path = getattr(plain, 'ann_file', '')
        if path and os.path.isfile(path):
            found[path] = digest_of(Path(path))
        elif folder := (getattr(plain, 'data_prefix', None) or {}).get('seg_map_path'):
            digest = hashlib.sha256()
            for label_map in label_maps(plain):
                digest.update(f'{label_map.name} {label_map.stat().st_size}\n'.encode())
            found[folder] = digest.hexdigest()
    return found


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, however large."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def datasets_within(dataset: Any) -> Iterator[Any]:
    """The data sets inside wrappers."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset
    else:
        for child in inner:
            yield from datasets_within(child)


def label_maps(dataset: Any) -> Iterator[Path]:
    """The label maps of a data set that are files here."""
    for index in range(len(dataset)):
        path = Path(dataset.get_data_info(index).get('seg_map_path') or '')
        if path.is_file():
            yield path


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """The paths whose content has changed. Data that were only moved count as unchanged."""
    if len(before) != len(now):
        return list(now)
    return [path for path, old, new in zip(now, before.values(), now.values(), strict=True) if old != new]
