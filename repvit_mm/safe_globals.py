"""What a checkpoint may refer to besides its tensors, and the harmless stand-ins: none runs code or takes much memory.

The reader calls them with arguments that the file chooses. So each does only what an honest file needs.
"""

import argparse
import datetime
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import numpy as np
from mmengine.logging import HistoryBuffer

from .unpickling import Listing, Maker, RefusedError

STATISTICS = ('min', 'max', 'current', 'mean')
"""The methods of a ``HistoryBuffer`` that MMEngine's checkpoints refer to."""


def empty_namespace() -> argparse.Namespace:
    """Stand-in for ``Namespace``: a command line, whose options follow."""
    return argparse.Namespace()


def empty_history() -> HistoryBuffer:
    """Stand-in for ``HistoryBuffer``: one whose state follows."""
    return HistoryBuffer()


HISTORY = Maker(empty_history)


def history_getattr(owner: Any, name: Any) -> Callable:
    """Stand-in for ``getattr``, by which MMEngine's checkpoints refer to the statistics of a ``HistoryBuffer``.

    The real ``getattr`` reaches everything: a file that may call it could do anything.
    """
    if owner is not HISTORY or name not in STATISTICS:
        raise RefusedError(f'getattr of {name!r}')
    return getattr(HistoryBuffer, name)


def set_attributes(value: Any, state: Any) -> None:
    """Set attributes of an instance that its class does not define."""
    plain = isinstance(state, dict) and all(isinstance(name, str) and not hasattr(type(value), name) for name in state)
    if not plain:
        raise pickle.UnpicklingError(f'the state of a {type(value).__name__} is none')
    vars(value).update(state)


def set_history(history: HistoryBuffer, state: Any) -> None:
    """Set what was logged. MMEngine also takes the statistics' functions from a file, for all buffers from then on."""
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if name != 'statistics_methods'}
    set_attributes(history, state)


def ordered_dict(items: Iterable = ()) -> OrderedDict:
    """Stand-in for ``OrderedDict``, and for ``Counter``: Python 2 wrote its items as a list."""
    return OrderedDict(items)


def encode(text: Any, encoding: Any) -> bytes:
    """Stand-in for ``_codecs.encode``, by which protocol 2 writes bytes. Other encodings may enlarge a text."""
    if not isinstance(text, str) or encoding not in ('latin1', 'latin-1'):
        raise pickle.UnpicklingError('bytes are written as no file does')
    return text.encode('latin1')


def make_bytearray(content: Any = b'', encoding: Any = 'latin1') -> bytearray:
    """Stand-in for ``bytearray``, which also takes any length."""
    return bytearray(content if isinstance(content, bytes) else encode(content, encoding))


def make_set(items: Any = ()) -> set:
    """Stand-in for ``set``."""
    if not isinstance(items, list | tuple):
        raise pickle.UnpicklingError('a set is none')
    return set(items)


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


def with_text(make: Callable[..., Any]) -> Maker:
    """The maker of a path."""

    def checked(*parts: Any) -> Any:
        if not all(isinstance(part, str) for part in parts):
            raise pickle.UnpicklingError('a path is none')
        return make(*parts)

    return Maker(checked)


# Files written next to NumPy 1 and 2 name the same functions differently.
_ARRAYS = {
    'numpy.ndarray': Maker(empty_array),
    'numpy.dtype': Maker(DType),
    **{f'numpy.{core}.multiarray._reconstruct': Maker(empty_array) for core in ('core', '_core')},
    **{f'numpy.{core}.multiarray.scalar': Maker(scalar) for core in ('core', '_core')},
}

# Python 3.13 moved the classes of paths. None of ours touches a disk, and those of the other system can be made.
_PATHS = {
    f'{module}.{prefix}{system}Path': with_text(make)
    for module in ('pathlib', 'pathlib._local')
    for system, make in (('Posix', PurePosixPath), ('Windows', PureWindowsPath))
    for prefix in ('', 'Pure')
}

_TIMES = ('datetime', 'date', 'time', 'timedelta', 'timezone')
_FACTORIES = ('bool', 'dict', 'float', 'int', 'long', 'list', 'str', 'unicode')  # Python 2's among them

METADATA = Listing(
    globals={
        **_ARRAYS,
        **_PATHS,
        **{f'datetime.{name}': Maker(getattr(datetime, name)) for name in _TIMES},
        **{f'builtins.{name}': Maker(builtin_factory) for name in _FACTORIES},
        'argparse.Namespace': Maker(empty_namespace),  # the authors keep their command line
        'mmengine.logging.history_buffer.HistoryBuffer': HISTORY,
        'mmengine.config.config.ConfigDict': Maker(plain_dict),
        'builtins.getattr': Maker(history_getattr),
        'builtins.bytes': Maker(empty_bytes),
        'builtins.bytearray': Maker(make_bytearray),
        'builtins.set': Maker(make_set),
        'builtins.complex': Maker(complex),
        'collections.defaultdict': Maker(default_dict),
        'collections.OrderedDict': Maker(ordered_dict),
        'collections.Counter': Maker(ordered_dict),
        '_codecs.encode': Maker(encode),
    },
    states={
        argparse.Namespace: set_attributes,
        HistoryBuffer: set_history,
        OrderedDict: set_attributes,  # PyTorch's state dicts have a version of each module
        DType: DType.__setstate__,
        Array: Array.__setstate__,
    },
)
"""What training metadata in checkpoints is made of."""
