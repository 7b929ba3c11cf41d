"""The framework versions that this package works beside: the first of each is one that the tests run on."""

import sys
from importlib import metadata
from importlib.util import find_spec

# Module -> (names it is distributed under, first version that works, first that does not).
FRAMEWORKS = {
    # requirements/oldest.txt has the first three. torch 2.6 is the first that reads with weights_only=True and an
    # allow-list under names of our choice; beside it mmcv's operators compile from 2.1 on.
    'torch': (('torch',), '2.0.0', '3.0.0'),
    'mmengine': (('mmengine', 'mmengine-lite', 'onedl-mmengine'), '0.7.0', '1.0.0'),
    'mmcv': (('mmcv', 'mmcv-full', 'mmcv-lite', 'onedl-mmcv'), '2.0.0', '3.0.0'),
    # These two are not imported without mmcv's operators: requirements/openmmlab.txt has them.
    'mmdet': (('mmdet', 'onedl-mmdetection'), '3.0.0', '4.0.0'),
    'mmseg': (('mmsegmentation', 'onedl-mmsegmentation'), '1.0.0', '2.0.0'),
}

DISTRIBUTIONS = tuple(name for names, *_ in FRAMEWORKS.values() for name in names)
"""The names of all of them, those of the forks among them."""

NEEDED = ('torch', 'mmengine')
"""Without these an exported file can be run, and nothing else."""


def missing_frameworks() -> list[str]:
    """Those of :data:`NEEDED` that are not installed, with the versions wanted, as pip takes them."""
    missing = [module for module in NEEDED if find_spec(module) is None]
    return [f'{module}>={first},<{beyond}' for module in missing for _, first, beyond in [FRAMEWORKS[module]]]


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: '2.1.0rc1' -> (2, 1, 0)."""
    numbers = []
    for part in f'{version}.0.0'.split('.')[:3]:
        digits = part[: len(part) - len(part.lstrip('0123456789'))]
        numbers.append(int(digits or 0))
    return tuple(numbers)


def is_between(version: str, first: str, beyond: str) -> bool:
    """Whether a version is at least ``first`` and below ``beyond``."""
    return _release(first) <= _release(version) < _release(beyond)


def installed_version(module: str, distributions: tuple[str, ...]) -> str | None:
    """Version of a module that is imported already or else installed; never imports it."""
    version = getattr(sys.modules.get(module), '__version__', None)
    for distribution in distributions:
        if version is not None:
            break
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return version


def check_frameworks() -> None:
    """Check that the OpenMMLab libraries on this machine are of the MMEngine era.

    Raises:
        ImportError: if a library is of another era, with the versions wanted.
    """
    for module, (distributions, first, beyond) in FRAMEWORKS.items():
        version = installed_version(module, distributions)
        if version is not None and not is_between(version, first, beyond):
            raise ImportError(
                f'repvit_mm needs {module}>={first},<{beyond} but finds {module} {version}: install a matching version'
            )
