"""Make the demo data set "shapes" in COCO's and in ADE20K's layout."""

import argparse
from collections.abc import Sequence

import _first  # noqa: F401
from rich.progress import track

from repvit_mm.datasets.shapes import write_shapes
from repvit_mm.messages import Parser, start


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('out', nargs='?', default='data/shapes', help='folder to make')
    parser.add_argument('--train', type=int, default=400, metavar='N', help='training images')
    parser.add_argument('--val', type=int, default=80, metavar='N', help='validation images')
    parser.add_argument('--size', type=int, default=192, metavar='PX', help='width and height of an image')
    parser.add_argument('--seed', type=int, default=0, metavar='S', help='the same seed gives the same files')
    parser.add_argument('--force', action='store_true', help='replace a data set made with other numbers')
    args = parser.parse_args(argv)
    try:
        written = write_shapes(args.out, args.train, args.val, args.size, args.seed, force=args.force, progress=track)
    except ValueError as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        parser.exit(1, f'{parser.prog}: {error}: pip install {error.name}\n')
    except OSError as error:
        parser.exit(1, f'{parser.prog}: {error}\n')
    print(f'{args.out}: {args.train} training and {args.val} validation images', '' if written else '(already there)')


if __name__ == '__main__':
    start(main)
