"""Draw losses, learning rate and metrics of training runs into one PNG: python tools/plot_log.py RUN ..."""

import sys
from collections.abc import Sequence
from pathlib import Path

import _first  # noqa: F401

from repvit_mm.logs import LogError, draw_runs, read_run
from repvit_mm.messages import Parser, start


def main(argv: Sequence[str] | None = None) -> None:
    """Draw."""
    parser = Parser(description='Draw losses, learning rate and metrics of one or several training runs into one PNG.')
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='work folder of a run')
    parser.add_argument('--out', type=Path, default=Path('log.png'), help='the picture (default: %(default)s)')
    parser.add_argument(
        '--metrics', nargs='+', default=(), metavar='PART', help='draw only metrics whose names contain one of these'
    )
    args = parser.parse_args(argv)
    if args.out.suffix.lower() != '.png':
        parser.error(f'--out {args.out}: expected a name that ends in .png')
    try:
        draw_runs([read_run(run) for run in args.runs], args.out, args.metrics)
    except LogError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f'{args.out} cannot be written: {error}')
    print(args.out)


if __name__ == '__main__':
    start(main)
