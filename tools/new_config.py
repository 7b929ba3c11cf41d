"""Start a config for data of your own from a template: python tools/new_config.py det|seg CONFIG."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import _first  # noqa: F401

from repvit_mm.files import write_whole
from repvit_mm.messages import Parser, start

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'
TEMPLATES = {'det': 'mask_rcnn_repvit_m0_9_custom.py', 'seg': 'fpn_repvit_m0_9_custom.py'}
"""Folder of configs -> the template in it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Copy a template, and let it inherit from the installed config, so that it works in any folder."""
    parser = Parser(description='Start a config for data of your own from a template.')
    parser.add_argument('task', choices=TEMPLATES, help='det: boxes and masks; seg: a class for each pixel')
    parser.add_argument('config', type=Path, help='the file to make, e.g. mine.py')
    args = parser.parse_args(argv)
    if args.config.suffix != '.py':
        parser.error(f'{args.config}: expected a name that ends in .py')
    if args.config.exists():
        sys.exit(f'{args.config} exists: remove it or name another file')
    template = (CONFIGS / args.task / TEMPLATES[args.task]).read_text(encoding='utf-8')
    config = re.sub(r"^_base_ = '\./", f"_base_ = 'repvit_mm::{args.task}/", template, flags=re.M)
    try:
        write_whole(args.config, config.encode())
    except OSError as error:
        sys.exit(f'{args.config} cannot be written: {error}')
    print(f'{args.config}: change what stands above the line, then: repvit-mm check-data {args.config}')


if __name__ == '__main__':
    start(main)
