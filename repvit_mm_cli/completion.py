"""Completion of ``repvit-mm`` in a shell, written by shtab from the launchers' own parsers."""

import argparse
import contextlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from unittest import mock

SHELLS = ('bash', 'zsh', 'tcsh')


class _Found(BaseException):
    """Carries a launcher's parser out of it; no ``except Exception`` in between stops it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def _interrupt(parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
    raise _Found(parser)


def parser_of(launcher: Path) -> argparse.ArgumentParser | None:
    """A launcher's parser, found by running it until it parses its arguments; ``None`` if it fails before that."""
    if 'Parser(' not in launcher.read_text(encoding='utf-8'):
        return None  # it would run to its end
    methods = ('parse_args', 'parse_known_args')
    with contextlib.ExitStack() as stack:
        for method in methods:
            stack.enter_context(mock.patch.object(argparse.ArgumentParser, method, _interrupt))
        stack.enter_context(mock.patch.object(sys, 'path', [str(launcher.parent), *sys.path]))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            runpy.run_path(str(launcher), run_name='__main__')
        except _Found as found:
            return found.parser
        except (SystemExit, Exception) as error:  # a library that it needs is not here
            print(f'repvit-mm {launcher.stem.replace("_", "-")} is not completed: {error}', file=sys.stderr)
    return None


def print_completion(names: dict[str, Path], arguments: Sequence[str]) -> None:
    """Print a shell's completion script; exits with one line if shtab is not installed."""
    parser = argparse.ArgumentParser(
        prog='repvit-mm completion',
        description='Print what a shell needs to complete repvit-mm, e.g. '
        'repvit-mm completion bash > ~/.local/share/bash-completion/completions/repvit-mm',
    )
    parser.add_argument('shell', choices=SHELLS)
    shell = parser.parse_args(arguments).shell
    try:
        import shtab
    except ImportError:
        sys.exit("repvit-mm completion needs shtab: pip install 'repvit_mm[completion]'")
    command = argparse.ArgumentParser(prog='repvit-mm')
    command.add_argument('--version', action='store_true')
    commands = command.add_subparsers()
    for name, launcher in names.items():
        found = parser_of(launcher)
        added = commands.add_parser(name, help=found.description if found else None)
        if found:
            commands.choices[name] = found  # replaces the empty one
            added = found
        for action in added._actions:
            if action.nargs != 0 and not action.choices:
                action.complete = shtab.FILE  # nearly every other argument is a path
    commands.add_parser('completion').add_argument('shell', choices=SHELLS)
    print(shtab.complete(command, shell))
