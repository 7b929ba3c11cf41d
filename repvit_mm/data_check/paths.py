"""Where a config looks for its data."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import ConfigDict

from ..deploy.load import plain_datasets

SPLITS = ('train', 'val', 'test')


def datasets_of(cfg: Mapping[str, Any], split: str) -> Iterator[tuple[str, Any]]:
    """The plain data sets of a split, each with its name in the config; none without a data loader for the split."""
    loader = cfg.get(f'{split}_dataloader')
    if loader:
        yield from plain_datasets(loader['dataset'], f'{split}_dataloader.dataset')


def evaluators_of(cfg: Mapping[str, Any], split: str) -> list[ConfigDict]:
    """The metrics of a split, of which there may be one or several; training has none."""
    found = cfg.get(f'{split}_evaluator') or [] if split != 'train' else []
    return found if isinstance(found, list) else [found]


def wanted_paths(cfg: Mapping[str, Any], *splits: str) -> Iterator[tuple[str, str]]:
    """The files and folders that the splits' data sets and metrics read.

    Args:
        cfg: The config.
        splits: Some of :data:`SPLITS`; those that the config does not have are skipped.

    Yields:
        The name of the setting, and the path.
    """
    for split in splits:
        for name, dataset in datasets_of(cfg, split):
            root = dataset.get('data_root') or ''
            prefixes = dataset.get('data_prefix') or {}
            for key, path in [('ann_file', dataset.get('ann_file')), *prefixes.items()]:
                if path:
                    field = key if key == 'ann_file' else f'data_prefix.{key}'
                    yield f'{name}.{field}', os.path.join(root, path)
        for evaluator in evaluators_of(cfg, split):
            if evaluator.get('ann_file'):
                yield f'{split}_evaluator.ann_file', evaluator['ann_file']


def is_there(path: str) -> bool:
    """Whether a file or folder is there; one behind an address is assumed to be."""
    return '://' in path or os.path.exists(path)
