"""Errors in one line."""

import logging
import multiprocessing
import os
import signal
import sys
from multiprocessing.synchronize import Event

import pytest
from programs import PROCESSES

from repvit_mm.messages import Parser, one_line, start


@pytest.mark.parametrize(
    ('error', 'expected'),
    [
        (ValueError('something is\n  wrong with the file'), 'something is wrong with the file'),
        (KeyError('lr'), "KeyError: 'lr'"),
        (RuntimeError(), 'RuntimeError: '),
        (
            RuntimeError(
                'Caught KeyError in DataLoader worker process 0.\nOriginal Traceback (most ...\n\nKeyError: 7\n'
            ),
            'RuntimeError: KeyError: 7',
        ),
        (ValueError('many words ' * 20), 'many words many words many words many words many words many ...'),
    ],
)
def test_one_line(error, expected):
    assert one_line(error, longest=66) == expected


@pytest.fixture(autouse=True)
def settings_of_the_process(monkeypatch):
    """A program may change them; a test must not."""
    monkeypatch.setattr(logging, 'raiseExceptions', True)
    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)
    monkeypatch.setattr(os, 'register_at_fork', lambda **_: None)


class Leaving:
    """Fails as it is taken away."""

    def __del__(self) -> None:
        raise ValueError('something is wrong at the end')


def test_what_python_ignores_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['tool'])
    start(Leaving)
    assert capsys.readouterr().err == 'ignored: something is wrong at the end\n'


def failing(error: BaseException, cause: bool = False) -> None:
    if cause:
        try:
            raise error
        except BaseException:
            sys.exit('told already')
    raise error


@pytest.mark.parametrize('debug', [False, True])
@pytest.mark.parametrize(
    ('error', 'cause', 'expected'),
    [
        (
            ValueError('something is wrong with the file'),
            False,
            'something is wrong with the file (--debug shows where)',
        ),
        (ValueError('something is wrong with the file'), True, 'told already'),
    ],
)
def test_what_a_program_did_not_expect_is_one_line(monkeypatch, capsys, error, cause, expected, debug):
    monkeypatch.setattr(sys, 'argv', ['tool', *(['--debug'] if debug else []), 'argument'])
    with pytest.raises(SystemExit) as stop:
        start(lambda: failing(error, cause))
    assert stop.value.code == expected
    printed = capsys.readouterr().err
    assert printed.count('Traceback') == debug and ('something is wrong with the file' in printed) is debug


@pytest.mark.parametrize('arguments', [[], ['--debug']])
def test_debug_is_an_option_without_a_value(capsys, arguments):
    """Options are written into results: they are what they were."""
    parser = Parser()
    parser.add_argument('--rounds', type=int)
    assert vars(parser.parse_args(['--rounds', '3', *arguments])) == {
        'rounds': 3,
        **dict.fromkeys(['debug'] * len(arguments), True),
    }
    parser.print_help()
    assert '--debug' in capsys.readouterr().out


def say_and_wait(ready: Event, done: Event) -> None:
    ready.set()
    done.wait()


def interrupted_beside_a_child() -> None:
    """Interrupts itself and a process that it has forked, as a terminal does; prints what became of that one."""
    context = multiprocessing.get_context('fork')
    ready, done = context.Event(), context.Event()
    child = context.Process(target=say_and_wait, args=(ready, done))
    child.start()
    ready.wait()
    os.kill(child.pid, signal.SIGINT)
    done.set()
    child.join()
    print(f'child {child.exitcode}', flush=True)
    raise KeyboardInterrupt


def program(folder: str) -> None:
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), number)
    start(interrupted_beside_a_child)


def test_interrupt_is_for_the_process_that_was_started(tmp_path):
    process = PROCESSES.Process(target=program, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == 130
    assert (tmp_path / 'stdout').read_text() == 'child 0\n'
    assert (tmp_path / 'stderr').read_text() == 'interrupted\n'


def test_interrupted_program_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        start(lambda: failing(KeyboardInterrupt()))
    assert stop.value.code == 130 and capsys.readouterr().err == 'interrupted\n'
