"""The framework versions that this package works beside, and which of them do not fit each other."""

import sys
from importlib import metadata
from importlib.util import find_spec

# Module -> (names it is distributed under, first version that works, first that does not). The tests run on a release
# of each first version: requirements/oldest.txt names them.
FRAMEWORKS = {
    'torch': (('torch',), '2.0.0', '3.0.0'),
    'mmengine': (('mmengine', 'mmengine-lite', 'onedl-mmengine'), '0.7.0', '1.0.0'),
    'mmcv': (('mmcv', 'mmcv-full', 'mmcv-lite', 'onedl-mmcv'), '2.0.0', '3.0.0'),
    'mmdet': (('mmdet', 'onedl-mmdetection'), '3.0.0', '4.0.0'),
    'mmseg': (('mmsegmentation', 'onedl-mmsegmentation'), '1.0.0', '2.0.0'),
}

TOO_NEW = (
    ('mmcv', '2.1.0', 'mmdet', '3.2.0'),
    ('mmcv', '2.1.0', 'mmsegmentation', '1.2.0'),
    ('mmcv', '2.1.0', 'mmyolo', None),
    ('mmcv', '2.2.0', 'mmdet', None),
    ('mmcv', '2.2.0', 'mmsegmentation', None),
    ('numpy', '2.0.0', 'torch', '2.3.0'),
    ('yapf', '0.40.2', 'mmengine', '0.10.1'),
)
"""Of two distributions: from this version on, the first needs the second from that version on; ``None``: no version."""

MMCV_WHEELS = {'2.0': ('cpu', 'cu117', 'cu118'), '2.1': ('cpu', 'cu118', 'cu121')}
"""torch -> builds of it that mmcv 2.1.0 is published for, with its operators. Those for later ones are of mmcv 2.2."""

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


def too_old(purpose: str, first: str) -> str:
    """Why the installed torch is too old for a purpose, in one line; empty if it is not.

    Args:
        purpose: What the user asked for.
        first: The first version of torch that it was tried with.
    """
    version = installed_version('torch', FRAMEWORKS['torch'][0]) or '0'
    if is_between(version, first, FRAMEWORKS['torch'][2]):
        return ''
    return f'{purpose} needs torch {first} or later, this is torch {version}'


def mmyolo_problem() -> str:
    """Why MMYOLO cannot be used here, in one line; empty if it can.

    Its last release is 0.6.0. Importing it beside an mmcv that it does not know raises an AssertionError.
    """
    version, mmcv = installed_version('mmyolo', ('mmyolo',)), installed_version('mmcv', FRAMEWORKS['mmcv'][0])
    fits = is_between(mmcv or '0', '2.0.0', '2.1.0')
    if version and fits:
        return ''
    problem = '' if version else 'MMYOLO is not installed: pip install mmyolo==0.6.0; '
    if not fits:
        found = f'this is mmcv {mmcv}' if mmcv else 'there is none'
        problem += f'MMYOLO {version or "0.6.0"} needs an mmcv from 2.0 and below 2.1, {found}; '
    return f'{problem}`make setup STACK=oldest` makes an environment with both'


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
