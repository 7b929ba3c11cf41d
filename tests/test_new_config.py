"""A config for data of one's own is the template, and inherits from the installed config."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / 'tools'))
new_config = importlib.import_module('new_config')


@pytest.mark.parametrize('task', new_config.TEMPLATES)
def test_only_the_base_differs_from_the_template(tmp_path, task, capsys):
    path = tmp_path / 'folder/mine.py'
    new_config.main([task, str(path)])
    template = (new_config.CONFIGS / task / new_config.TEMPLATES[task]).read_text()
    changed = [
        (old, new) for old, new in zip(template.splitlines(), path.read_text().splitlines(), strict=True) if old != new
    ]
    (line,) = changed
    name = line[0].removeprefix("_base_ = './").removesuffix("'")
    assert line[1] == f"_base_ = 'repvit_mm::{task}/{name}'" and (new_config.CONFIGS / task / name).is_file()
    assert capsys.readouterr().out.endswith(f'repvit-mm check-data {path}\n')


def test_nothing_is_replaced(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text('mine')
    with pytest.raises(SystemExit, match=r'mine\.py exists: remove it or name another file$'):
        new_config.main(['det', str(path)])
    assert path.read_text() == 'mine'


def test_what_cannot_be_made_is_told(tmp_path, capsys):
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit, match='cannot be written'):
        new_config.main(['det', str(tmp_path / 'file/mine.py')])
    with pytest.raises(SystemExit):
        new_config.main(['det', 'mine.txt'])
    assert 'expected a name that ends in .py' in capsys.readouterr().err
