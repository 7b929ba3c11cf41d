"""How errors are told in one line."""

import argparse
import logging
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable
from typing import Any


def one_line(error: BaseException, longest: int = 1000) -> str:
    """An exception's message on one line, with its type where the message alone would not say much.

    Args:
        error: The exception. Of one that a data loader's worker raised the message holds the worker's traceback: what
            stands at its end is taken.
        longest: Length in characters beyond which the message is cut off.
    """
    text = str(error)
    if text.startswith('Caught ') and 'Original Traceback' in text:
        text = text.strip().splitlines()[-1]
    text = textwrap.shorten(text, longest, placeholder=' ...')
    return text if len(text) > 20 else f'{type(error).__name__}: {text}'


def tell_ignored(ignored: 'sys.UnraisableHookArgs') -> None:
    """In one line, what Python prints with a traceback: an exception where none can be raised, as in a destructor."""
    print(f'ignored: {one_line(ignored.exc_value or ignored.exc_type())}', file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """The command line of a program that :func:`start` runs: it has ``--debug``.

    Args:
        options: As for :class:`argparse.ArgumentParser`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # No value unless it is given: options are written into results.
        self.add_argument(
            '--debug', action='store_true', default=argparse.SUPPRESS, help='show the traceback of an error'
        )


def ignore_interrupts() -> None:
    """Leave Ctrl-C, which a terminal sends to every process of a program, to the one that was started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def start(main: Callable[[], None]) -> None:
    """Run a program; what it did not expect is told in one line too.

    Args:
        main: What reads the command line, by a :class:`Parser`. With ``--debug`` there is a traceback before the one
            line.

    Raises:
        SystemExit: unless all goes well.
    """
    debug = '--debug' in sys.argv
    if not debug:
        logging.raiseExceptions = False  # a log on a full disk would print a traceback for each of its lines
        sys.unraisablehook = tell_ignored
    if hasattr(os, 'register_at_fork'):  # else each worker of a data loader prints a traceback
        os.register_at_fork(after_in_child=ignore_interrupts)
    try:
        main()
    except SystemExit as stop:
        if debug and stop.__context__ is not None:
            traceback.print_exception(stop.__context__)
        raise
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if debug:
            traceback.print_exc()
        sys.exit(f'{one_line(error)} (--debug shows where)')
