"""Whole models whose backbone and neck run compiled where they are evaluated."""

import importlib
import os
import shutil

import torch
from torch import nn

from ._versions import too_old
from .precision import parts_of


class CompilerError(RuntimeError):
    """``torch.compile`` lacks what it needs; the message is one line that says what to install."""


def check_compiler(device: str) -> None:
    """Check that ``torch.compile`` finds the compiler that it needs.

    Args:
        device: A device type, as ``mmengine.device.get_device`` gives it.

    Raises:
        CompilerError: with a torch before 2.6, without Triton for a GPU, without a C++ compiler for a CPU.
    """
    if reason := too_old('torch.compile', '2.6'):
        raise CompilerError(reason)
    if device == 'cuda':
        try:
            importlib.import_module('triton')
        except Exception as error:  # a library that does not fit torch may fail in any way
            raise CompilerError(f'torch.compile needs Triton on a GPU: {error}') from None
    elif device == 'cpu' and not shutil.which(os.environ.get('CXX', 'g++')):
        raise CompilerError('torch.compile needs a C++ compiler: install g++, or name one in CXX')


def compile_networks(model: nn.Module, dynamic: bool | None = None) -> nn.Module:
    """Let the backbone and the neck of a whole model run compiled, in place.

    Each is compiled when it first runs. Heads are left alone: what they do behind their convolutions depends on the
    numbers of boxes.

    Args:
        model: A detector or a segmentor in ``eval`` mode. Compilers gain most on a fused one.
        dynamic: As in ``torch.compile``: by default the first size is compiled for itself, any other for all sizes.

    Returns:
        The same model.

    Raises:
        CompilerError: if there is no compiler.
    """
    check_compiler(next(model.parameters()).device.type)
    # torch compiles one function a few times only and then, without a word, no more.
    torch.compiler.reset()
    for name, part in parts_of(model):
        if name in ('backbone', 'neck'):
            part.compile(dynamic=dynamic)
    return model
