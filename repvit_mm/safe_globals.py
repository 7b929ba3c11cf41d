"""What a checkpoint may refer to, and the harmless stand-ins: none of them runs code or takes much memory.

With ``weights_only``, torch's reader calls the listed functions with arguments that the file chooses. So a function or
class that could be misused is replaced by one that does only what an honest file needs.
"""

import argparse
import datetime
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import numpy as np
from mmengine.logging import HistoryBuffer

STATISTICS = ('min', 'max', 'current', 'mean')
"""The methods of a ``HistoryBuffer`` that MMEngine's checkpoints refer to."""


def history_getattr(owner: type, name: str) -> Callable:
    """Stand-in for ``getattr``, by which MMEngine's checkpoints refer to the statistics of a ``HistoryBuffer``.

    The real ``getattr`` reaches everything: a file that may call it could do anything.
    """
    if owner is not HistoryBuffer or name not in STATISTICS:
        raise pickle.UnpicklingError(f'a checkpoint may not look up {name!r} of {owner!r}')
    return getattr(HistoryBuffer, name)


def refused_attribute(reason: str) -> str | None:
    """What :func:`history_getattr` refused, if that is why a file could not be read: torch passes its message on."""
    match = re.search(r'a checkpoint may not look up (.*)', reason)
    return f'getattr of {match[1]}' if match else None


def empty_bytes() -> bytes:
    """Stand-in for ``bytes``, by which an empty array is written; the real one takes any length."""
    return b''


def plain_dict(content: Mapping | None = None) -> dict:
    """A ``ConfigDict`` as the dict that it holds."""
    return dict(content or {})


def default_dict(factory: Any = None) -> dict:
    """A ``defaultdict`` as a plain dict; its entries follow."""
    return {}


def builtin_factory(*_: Any) -> NoReturn:
    """A builtin type as the factory of a ``defaultdict``, which is not called."""
    raise pickle.UnpicklingError('a checkpoint may name a builtin type, not call it')


def safe_globals() -> list[Any]:
    """What training metadata in checkpoints is made of, as ``torch.serialization.safe_globals`` takes it."""
    reconstruct = np.zeros(1).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in np.typecodes['All'] if code != 'O'}
    # Files written next to NumPy 1 and 2 name the same functions differently.
    functions = [
        (function, f'numpy.{core}.multiarray.{function.__name__}')
        for function in (reconstruct, scalar)
        for core in ('core', '_core')
    ]
    # Python 3.13 moved the classes of paths. None of ours touches a disk, and those of the other system can be made.
    paths = [
        (stand_in, f'{module}.{name}')
        for module in ('pathlib', 'pathlib._local')
        for stand_in, names in (
            (PurePosixPath, ('PosixPath', 'PurePosixPath')),
            (PureWindowsPath, ('WindowsPath', 'PureWindowsPath')),
        )
        for name in names
    ]
    times = [datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone]
    factories = [(builtin_factory, f'builtins.{name}') for name in ('bool', 'dict', 'float', 'int', 'list', 'str')]
    # The authors keep their command line, a Namespace.
    return [
        *(argparse.Namespace, HistoryBuffer, np.ndarray, np.dtype, *dtypes, *times),
        *functions,
        *paths,
        *factories,
        (history_getattr, 'builtins.getattr'),
        (empty_bytes, 'builtins.bytes'),
        (default_dict, 'collections.defaultdict'),
        (plain_dict, 'mmengine.config.config.ConfigDict'),
    ]
