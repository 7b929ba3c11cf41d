"""The tutorial's own commands, read out of the page and run: on less data, for fewer iterations."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from programs import launch

from repvit_mm_cli.command import commands

PAGE = Path(__file__).parents[1] / 'docs/tutorial.md'
QUICK = {
    '--train 120 --val 30': '--train 8 --val 4 --size 64',
    'max_iters, batch_size = 100, 4': 'max_iters, batch_size = 4, 4',
    'crop = (192, 192)': 'crop = (64, 64)',
    'iter_100.pth': 'iter_4.pth',
}
"""What the page says -> what takes less time."""


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    text = PAGE.read_text()
    for slow, quick in QUICK.items():
        assert slow in text
        text = text.replace(slow, quick)
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.M | re.S)


def masked(text: str) -> str:
    """Text without what differs from run to run: numbers, widths of tables, colours."""
    text = re.sub(r'\x1b\[[\d;]*m|[│┃─━┏┳┓┡╇┩└┴┘├┼┤]', ' ', text)
    return ' '.join(re.sub(r'[\d.,:/-]*\d[\d.,:%e-]*', '#', text).split())


def change(config: Path, settings: str) -> None:
    """Replace the assignments of a config that are in the page."""
    text = config.read_text()
    for line in settings.splitlines():
        name = line.partition(' = ')[0]
        text, count = re.subn(f'^{re.escape(name)} = .*$', lambda _, line=line: line, text, flags=re.M)
        assert count == 1, f'the template has no {name}'
    config.write_text(text)


@pytest.mark.slow
@pytest.mark.needs_ops
def test_commands_do_what_the_page_shows(tmp_path):
    for name in ('onnx', 'onnxruntime', 'supervision'):
        pytest.importorskip(name)
    launchers = commands()
    (settings,) = blocks('python')
    ran = []
    for step in ''.join(blocks('console')).split('$ ')[1:]:
        command, _, shown = step.replace('\\\n', ' ').partition('\n')
        words = shlex.split(command)
        if words[0] == 'repvit-mm':
            done = launch(tmp_path, launchers[words[1]].name, *words[2:])
            ran.append(words[1])
        elif words[0] == 'sed':
            done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        else:
            assert words == ['mkdir', 'tutorial', '&&', 'cd', 'tutorial']
            continue
        output = done.stdout + done.stderr
        assert done.returncode == 0, f'{command}: {output[-3000:]}'
        for part in re.split(r'\.\.\.|\n', shown):
            assert masked(part) in masked(output), f'{command} does not print: {part}'
        if words[1:2] == ['new-config']:
            change(tmp_path / 'mine.py', settings)
    assert ran == ['make-shapes', 'new-config', 'check-data', 'train', 'plot-log', 'test', 'export', 'test', 'predict']
    assert (tmp_path / 'predictions/index.html').is_file()
    assert len(list((tmp_path / 'predictions/pictures').glob('*.png'))) == 4
