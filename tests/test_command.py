"""The command ``repvit-mm``, run as a module: what an installed one does besides is in test_packaging."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from repvit_mm_cli import command, completion

ROOT = Path(__file__).parents[1]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-m', 'repvit_mm_cli', *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={'PYTHONPATH': str(ROOT), 'PATH': '/usr/bin:/bin'},
    )


def test_every_launcher_is_a_command():
    launchers = {path.stem for path in (ROOT / 'tools').glob('[!_]*.py')} - {'setup_env'}
    assert {name.replace('-', '_') for name in command.commands()} == launchers
    assert {'train', 'test', 'export', 'predict', 'check-data', 'doctor', 'benchmark', 'plot-log'} <= set(
        command.commands()
    )


def test_every_launcher_says_what_it_does():
    """In one line of its docstring, which is read without running it."""
    summaries = {name: command.summary(path) for name, path in command.commands().items()}
    assert all(len(text) > 10 and 'python tools/' not in text for text in summaries.values()), summaries


@pytest.mark.slow
def test_arguments_status_and_name_are_the_launcher_s(tmp_path):
    done = run(tmp_path, 'plot-log', 'absent', '--out', 'x.png')
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if 'pkg_resources' not in line]  # MMEngine 0.8 warns of it
    assert lines[-1].startswith('absent holds no log') and 'Traceback' not in done.stderr
    done = run(tmp_path, 'plot-log', '--help')
    assert done.returncode == 0 and done.stdout.startswith('usage: repvit-mm plot-log ')
    done = run(tmp_path, 'plot-log')
    assert done.returncode == 2 and 'usage: repvit-mm plot-log' in done.stderr


@pytest.mark.parametrize(
    ('launcher', 'library', 'fault'),
    [
        ('train', 'torch', "ModuleNotFoundError('no torch here', name='torch')"),
        pytest.param(
            'predict',
            'supervision',
            "ModuleNotFoundError('no supervision here', name='supervision')",
            marks=pytest.mark.slow,
        ),
        ('check_data', 'cv2', "ImportError('libGL.so.1: cannot open', name='cv2')"),
    ],
)
def test_a_library_that_cannot_be_imported_is_told_in_one_line(tmp_path, launcher, library, fault):
    (tmp_path / f'{library}.py').write_text(f'raise {fault}\n')
    text = fault.split("'")[1]
    command = launcher.replace('_', '-')
    done = run(tmp_path, command, '--help')
    expected = f'repvit-mm {command}: {text} ({sys.executable}); repvit-mm doctor says what to install\n'
    assert done.returncode == 1 and done.stderr == expected
    assert 'Traceback' in run(tmp_path, command, '--help', '--debug').stderr
    program = str(ROOT / 'tools' / f'{launcher}.py')
    done = subprocess.run(
        [sys.executable, program, '--help'],
        capture_output=True,
        text=True,
        env={'PYTHONPATH': f'{tmp_path}:{ROOT}'},
    )
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert done.stderr.startswith(f'{program}: {text} (') and '.venv' in done.stderr


@pytest.mark.slow
def test_export_needs_no_library_of_another_target(tmp_path):
    for library in ('onnx', 'onnxruntime', 'openvino', 'executorch', 'coremltools'):
        (tmp_path / f'{library}.py').write_text('raise ImportError\n')
    done = run(tmp_path, 'export', '--help')
    assert done.returncode == 0 and done.stdout.startswith('usage: repvit-mm export '), done.stderr


def test_other_faults_keep_their_traceback(tmp_path):
    (tmp_path / 'cv2.py').write_text("raise ImportError('gone', name='repvit_mm.gone')\n")
    assert 'Traceback' in run(tmp_path, 'check-data', '--help').stderr
    (tmp_path / 'cv2.py').write_text("raise ValueError('odd')\n")
    assert 'Traceback' in run(tmp_path, 'check-data', '--help').stderr


def test_unknown_command_and_none(tmp_path):
    done = run(tmp_path, 'trian')
    assert done.returncode == 2 and "invalid choice: 'trian'" in done.stderr and 'train' in done.stderr
    done = run(tmp_path)
    assert done.returncode == 2 and 'COMMAND' in done.stderr


def test_a_launcher_s_parser_is_found_without_running_it(tmp_path):
    launcher = tmp_path / 'tool.py'
    launcher.write_text(
        'import argparse\nfrom _shared import NAME\n'
        'parser = argparse.ArgumentParser(description=NAME)\n'
        "parser.add_argument('--fast')\n"
        'try:\n    parser.parse_args()\nexcept Exception:\n    pass\n'
        "open('ran', 'w')\n"
    )
    (tmp_path / '_shared.py').write_text("NAME = 'a tool'\n")
    found = completion.parser_of(launcher)
    assert found.description == 'a tool' and '--fast' in found.format_help()
    assert argparse.ArgumentParser().parse_args([]) is not None  # as before
    (tmp_path / 'none.py').write_text("raise RuntimeError('it ran')\n")
    assert completion.parser_of(tmp_path / 'none.py') is None


def test_a_launcher_that_cannot_be_imported_is_told(tmp_path, capsys):
    (tmp_path / 'tool.py').write_text('import argparse, absent_library\nargparse.ArgumentParser().parse_args()\n')
    assert completion.parser_of(tmp_path / 'tool.py') is None
    assert "repvit-mm tool is not completed: No module named 'absent_library'" in capsys.readouterr().err


def test_completion_knows_options_of_commands(tmp_path, capsys):
    pytest.importorskip('shtab')
    (tmp_path / 'tool.py').write_text(
        'import argparse\nparser = argparse.ArgumentParser()\n'
        "parser.add_argument('config')\nparser.add_argument('--to', choices=['onnx', 'coreml'])\nparser.parse_args()\n"
    )
    (tmp_path / 'plain.py').write_text("print('runs at once')\n")
    completion.print_completion({'tool': tmp_path / 'tool.py', 'plain': tmp_path / 'plain.py'}, ['bash'])
    script = capsys.readouterr().out
    (tmp_path / 'script').write_text(script)
    program = 'source ./script; complete_it() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); '
    program += '_shtab_repvit_mm; echo "${COMPREPLY[@]}"; }; '
    program += 'complete_it repvit-mm pl; complete_it repvit-mm tool --t; complete_it repvit-mm tool --to c'
    done = subprocess.run(['bash', '-c', program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == ['plain', '--to', 'coreml'], done.stderr


def test_without_shtab_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'shtab', None)
    with pytest.raises(SystemExit, match=r"needs shtab: pip install 'repvit_mm\[completion\]'"):
        completion.print_completion({}, ['bash'])
