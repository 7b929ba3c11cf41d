"""Look into a checkpoint of any kind, or convert it: python tools/convert_checkpoint.py IN OUT."""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import _first  # noqa: F401

from repvit_mm.checkpoint import CheckpointError, read_checkpoint, trust
from repvit_mm.conversion import content_of, convert, metadata_of, to_pth, to_safetensors
from repvit_mm.files import write_whole
from repvit_mm.messages import Parser, one_line, start
from repvit_mm.names import WHOSE


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with one line where its options do not fit together."""
    parser = Parser(description='Look into the checkpoint of a backbone or of a model with one, or convert it.')
    parser.add_argument('input', type=os.path.expanduser, metavar='IN', help='.pth or .safetensors file')
    parser.add_argument(
        'output',
        type=os.path.expanduser,
        nargs='?',
        metavar='OUT',
        help='.pth or .safetensors file; or a folder, where a .pth file gets the start of its SHA-256 into its name',
    )
    parser.add_argument(
        '--to', choices=list(WHOSE), default='ours', help='whose tensor names OUT gets (default: %(default)s)'
    )
    parser.add_argument(
        '--fuse', action='store_true', help='fuse the backbone; with --to authors or timm, as far as their code does'
    )
    parser.add_argument('--check', action='store_true', help='only say what IN is; OUT may be left out')
    parser.add_argument('--force', action='store_true', help='replace a file that is there already')
    parser.add_argument(
        '--keep-metadata', action='store_true', help='keep what IN says of its training, e.g. the epoch'
    )
    parser.add_argument(
        '--trust-checkpoint', action='store_true', help='let IN run code as it is read, if you trust whoever made it'
    )
    args = parser.parse_args(argv)
    if args.output is None:
        if not args.check:
            parser.error('OUT is missing; --check alone says what IN is')
        return args
    args.into_folder = args.output.endswith('/') or os.path.isdir(args.output)
    args.suffix = '.pth' if args.into_folder else Path(args.output).suffix
    if args.suffix not in ('.pth', '.safetensors'):
        sys.exit(f'{args.output}: expected a name that ends in .pth or .safetensors, or a folder')
    if args.suffix != '.pth' and args.keep_metadata:
        sys.exit(f'--keep-metadata: {args.output} can hold nothing but tensors, take a name that ends in .pth')
    return args


def write(target: Path, content: bytes, force: bool) -> None:
    """Write a file whole or not at all; exits with one line if it cannot be written."""
    if target.exists() and not force:
        sys.exit(f'{target} is there already: --force replaces it')
    try:
        write_whole(target, content)
    except OSError as error:
        sys.exit(f'{target} cannot be written: {one_line(error)}')


def main(argv: Sequence[str] | None = None) -> None:
    """Look into a checkpoint and convert it."""
    args = parse_args(argv)
    if args.trust_checkpoint:
        trust(args.input)
    try:
        checkpoint = read_checkpoint(args.input)
        content = content_of(checkpoint, args.input)
        print(f'{args.input}: {content}')
        if args.output is None:
            return
        converted = convert(content, args.to, args.fuse)
    except CheckpointError as error:
        sys.exit(str(error))
    if args.fuse and not converted.fused:
        print(f'{args.input} is fused already')
    if args.suffix == '.pth':
        data = to_pth(converted, metadata_of(checkpoint, args.keep_metadata))
    else:
        data = to_safetensors(converted)
    target = Path(args.output)
    if args.into_folder:
        target /= f'{Path(args.input).stem}-{hashlib.sha256(data).hexdigest()[:8]}.pth'
    write(target, data, args.force)
    aside = f'; {converted.set_aside} of classification heads set aside' if converted.set_aside else ''
    print(f'{target}: {len(converted.tensors)} tensors, {WHOSE[args.to]} names{aside}')


if __name__ == '__main__':
    start(main)
