"""Errors in one line."""

import logging
import sys

import pytest

from repvit_mm.messages import one_line, start


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
    assert sys.argv == ['tool', 'argument']  # argparse never sees the option


def test_interrupted_program_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        start(lambda: failing(KeyboardInterrupt()))
    assert stop.value.code == 130 and capsys.readouterr().err == 'interrupted\n'
