"""What goes around a fault of OpenVINO's plugin for processors. Tried with OpenVINO 2026.4 and nncf 3.4.

Each of its cores puts a signal stack of its own in place, for processors with AMX, and puts the one before back when it
is destroyed. Cores that are destroyed in the order in which they were made leave a stack that is no longer there, and
the next signal with a handler ends the process: a worker process of a data loader that ends, or Ctrl-C.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openvino import Core


@cache
def openvino_core() -> 'Core':
    """The one core of this process, which is there until it ends."""
    import openvino

    return openvino.Core()


class SignalStack(ctypes.Structure):
    """Linux's ``stack_t``."""

    _fields_ = (('address', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t))


@contextmanager
def same_signal_stack() -> Iterator[None]:
    """Put this thread's signal stack back after others, as NNCF, have made and destroyed cores."""
    if not sys.platform.startswith('linux'):
        yield
        return
    call, before = ctypes.CDLL(None).sigaltstack, SignalStack()
    call(None, ctypes.byref(before))
    try:
        yield
    finally:
        call(ctypes.byref(before), None)
