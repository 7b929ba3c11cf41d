"""The README's table of versions: what each stack of ``requirements/`` installs, and what the tests gave beside it.

``python tests/stacks.py`` writes it. A stack's file ends its first comment with what ``make test STACK=...`` printed::

    # Tested 2026-12-01 with Python 3.11: 5,246 passed, 24 skipped.

A stack that was not tested as a whole has no such line.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / 'README.md'
STACKS = {
    'openmmlab': 'the default',
    'wheels': 'what people have most: published wheels of mmcv',
    'oldest': 'the oldest; MMYOLO',
    'onedl': "OpenMMLab's maintained forks",
    'newest': 'the newest torch, with the forks',
}
"""A file of ``requirements/`` -> what it is for, in the table's order."""

COLUMNS = {
    'torch': ('torch',),
    'mmcv': ('mmcv', 'onedl-mmcv'),
    'MMEngine': ('mmengine', 'onedl-mmengine'),
    'MMDetection': ('mmdet', 'onedl-mmdetection'),
    'MMSegmentation': ('mmsegmentation', 'onedl-mmsegmentation'),
    'NumPy': ('numpy',),
}
"""Column -> the distributions that it is installed as."""

BEGIN, END = '<!-- versions: written by `python tests/stacks.py` -->\n\n', '<!-- end of versions -->\n'


def table() -> str:
    """The table in Markdown."""
    lines = [f'| `STACK=` | {" | ".join(COLUMNS)} | the whole suite |', '|---' * (len(COLUMNS) + 2) + '|']
    for stack, purpose in STACKS.items():
        text = (ROOT / 'requirements' / f'{stack}.txt').read_text()
        versions = dict(re.findall(r'^([\w-]+)((?:[=<>]=?[\d.]+,?)+)', text, re.M))
        found = [next(versions[name] for name in names if name in versions) for names in COLUMNS.values()]
        tested = re.search(r'^# Tested (\S+) with (Python \S+): (.+)\.$', text, re.M)
        result = '{2} ({0}, {1})'.format(*tested.groups()) if tested else 'not run as a whole'
        cells = [f'`{stack}`: {purpose}', *(version.removeprefix('==') for version in found)]
        lines.append(f'| {" | ".join(cells)} | {result} |')
    return '\n'.join(lines) + '\n'


def with_table(text: str) -> str:
    """The README's text with the table as it is now."""
    before, rest = text.split(BEGIN)
    return f'{before}{BEGIN}{table()}{END}{rest.split(END)[1]}'


if __name__ == '__main__':
    README.write_text(with_table(README.read_text()))
