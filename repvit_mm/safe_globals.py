"""What a checkpoint may refer to, and the harmless stand-ins: none of them runs code or takes much memory.

With ``weights_only``, torch's reader calls the listed functions with arguments that the file chooses. So a function or
class that could be misused is replaced by one that does only what an honest file needs.
"""

import argparse
import datetime
import math
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


class DType:
    """Stand-in for ``np.dtype``: a type of numbers or text, and its byte order.

    NumPy's own crashes on a state that is damaged.

    Args:
        code: As NumPy writes it, ``'f8'`` or ``'U2'``.
    """

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not (isinstance(code, str) and re.fullmatch(r'[biufcSU]\d{1,6}', code)):
            raise pickle.UnpicklingError(f'a checkpoint may not hold arrays of type {str(code)[:20]!r}')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        """Take the byte order, the second item. The other items repeat what the code says."""
        if state[1] not in ('<', '>', '|', '='):
            raise pickle.UnpicklingError('the byte order of an array is none')
        self.dtype = self.dtype.newbyteorder(state[1])

    def __reduce__(self) -> tuple:
        return self.dtype.__reduce__()


class Array(np.ndarray):
    """An array whose state is checked before NumPy takes it; elsewhere one like any other."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        is_shape = isinstance(shape, tuple) and all(type(length) is int and length >= 0 for length in shape)
        if not (is_shape and len(shape) <= 32 and type(dtype) is DType and type(content) is bytes):
            raise pickle.UnpicklingError('an array is described by something else than shape, type and bytes')
        if math.prod(shape) * dtype.dtype.itemsize != len(content):
            raise pickle.UnpicklingError(f'an array of shape {shape} and {dtype.dtype} has {len(content)} bytes')
        super().__setstate__((1, shape, dtype.dtype, fortran is True, content))

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Write it as NumPy's own."""
        return self.view(np.ndarray).__reduce_ex__(protocol)


def empty_array(*_: Any) -> Array:
    """Stand-in for ``_reconstruct``: the array whose state follows."""
    return np.ndarray.__new__(Array, 0)


def scalar(dtype: DType, content: bytes) -> np.generic:
    """Stand-in for NumPy's function that makes a scalar of its bytes."""
    if not (type(dtype) is DType and type(content) is bytes and len(content) == dtype.dtype.itemsize):
        raise pickle.UnpicklingError('a number is described by something else than its type and bytes')
    return np.frombuffer(content, dtype.dtype)[0]


def safe_globals() -> list[Any]:
    """What training metadata in checkpoints is made of, as ``torch.serialization.safe_globals`` takes it."""
    # Files written next to NumPy 1 and 2 name the same functions differently.
    arrays = [
        (Array, 'numpy.ndarray'),
        (DType, 'numpy.dtype'),
        *((empty_array, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
        *((scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
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
        *(argparse.Namespace, HistoryBuffer, *times),
        *arrays,
        *paths,
        *factories,
        (history_getattr, 'builtins.getattr'),
        (empty_bytes, 'builtins.bytes'),
        (default_dict, 'collections.defaultdict'),
        (plain_dict, 'mmengine.config.config.ConfigDict'),
    ]
