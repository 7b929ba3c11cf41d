"""Look into a RepViT checkpoint of any kind, or convert it: python tools/convert_checkpoint.py IN OUT."""

import argparse
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repvit_mm import RepViT, switch_to_deploy
from repvit_mm.checkpoint import (
    CONTAINERS,
    TRUSTED,
    CheckpointError,
    describe_misfit,
    is_fused,
    one_line,
    read_checkpoint,
    tensors_of,
    trained_tap,
    without_counters,
)
from repvit_mm.names import WHOSE, backbone_prefix, origin_of, translate

CLASS_NAMES = ('dataset_meta', 'CLASSES', 'PALETTE')
"""What a detector's ``meta`` says of its classes, in MMEngine's and in the 2.x era's words: not about its training."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds.

    Args:
        origin: Whose names its backbone has, ``'ours'``, ``'authors'`` or ``'timm'``.
        archs: The variants that it fits, several where fusing makes them equal.
        fused: Whether it is in the fused form.
        prefix: What stands before the backbone's names, parallel wrappers left out.
        backbone: The backbone's tensors by our names.
        heads: Those of its classification heads by their own names.
        others: Those of a model's other parts by their full names, parallel wrappers left out.
    """

    origin: str
    archs: list[str]
    fused: bool
    prefix: str
    backbone: dict[str, Tensor]
    heads: dict[str, Tensor]
    others: dict[str, Tensor]

    def __str__(self) -> str:
        more = {'of classification heads': self.heads, 'of other parts of a model': self.others}
        return (
            f'RepViT {" or ".join(self.archs)}, {"fused" if self.fused else "training"} form, '
            f'{WHOSE[self.origin]} names: {len(self.backbone)} backbone tensors'
            + (f' under {self.prefix}*' if self.prefix else '')
            + ''.join(f', {len(tensors)} {what}' for what, tensors in more.items() if tensors)
        )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with one line where its options do not fit together."""
    parser = argparse.ArgumentParser(description='Look into a RepViT checkpoint of any kind, or convert it.')
    parser.add_argument('input', type=os.path.expanduser, metavar='IN', help='.pth or .safetensors file')
    parser.add_argument(
        'output',
        type=os.path.expanduser,
        nargs='?',
        metavar='OUT',
        help='.pth or .safetensors file; or a folder, where a .pth file gets the start of its SHA-256 into its name',
    )
    parser.add_argument('--to', choices=list(WHOSE), default='ours', help='whose tensor names (default: %(default)s)')
    parser.add_argument('--fuse', action='store_true', help='fuse the backbone for deployment')
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


def recognize(checkpoint: Any, file: str) -> Content:
    """What a checkpoint holds.

    Raises:
        CheckpointError: unless that is exactly a known variant, alone or in a model.
    """
    tensors = tensors_of(checkpoint)
    prefix = backbone_prefix(tensors)
    if prefix is None:
        has = f'its first tensor is {next(iter(tensors))}' if tensors else 'it holds no tensor at all'
        raise CheckpointError(f'{file} holds no RepViT: {has}')
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    names = translate(found)
    backbone = {ours: found[name] for name, ours in names.items() if ours is not None}
    recognized = RepViT.recognize(backbone)
    if recognized is None:
        raise CheckpointError(f'{file} holds no whole RepViT: {misfit(backbone)}')
    return Content(
        origin_of(found),
        *recognized,
        prefix=prefix.removeprefix('module.'),
        backbone=backbone,
        heads={name: found[name] for name, ours in names.items() if ours is None},
        others={name.removeprefix('module.'): t for name, t in tensors.items() if not name.startswith(prefix)},
    )


def misfit(tensors: Mapping[str, Tensor]) -> str:
    """What keeps a backbone's tensors, by our names, from being those of the variant nearest to them."""
    shapes = without_counters(tensors)
    variants = {arch: RepViT.variant_shapes(arch, is_fused(shapes)) for arch in RepViT.specs}
    nearest = max(variants, key=lambda arch: len(variants[arch].items() & shapes.items()))
    own = variants[nearest]
    missing = [name for name in own if name not in shapes]
    unexplained = [name for name in shapes if name not in own]
    reshaped = [name for name in own if name in shapes and shapes[name] != own[name]]
    return f'compared with {nearest}, {describe_misfit(missing, unexplained, reshaped)}'


def convert(content: Content, to: str, fuse: bool) -> tuple[dict[str, Tensor], int]:
    """All tensors by their new names, and how many of classification heads are set aside.

    Heads stay as long as the names do: other conventions have none, or others. With ``fuse`` they go, because a head
    that is not fused loads into no fused classifier.
    """
    backbone = content.backbone
    if fuse:
        network = RepViT(content.archs[0]).to(next(iter(backbone.values())).dtype)
        network.load_state_dict(backbone)
        backbone = switch_to_deploy(network).state_dict()
    kept = content.heads if to == content.origin and not fuse else {}
    renamed = {new: backbone[ours] for ours, new in translate(backbone, to).items()} | kept
    tensors = {content.prefix + name: tensor for name, tensor in renamed.items()} | content.others
    # Copies hold no larger memory that a tensor was a view of, and no mark of the file that it came from.
    copies = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    return copies, len(content.heads) - len(kept)


def metadata_of(checkpoint: Mapping[str, Any], keep_all: bool) -> dict[str, Any]:
    """What a checkpoint keeps beside its tensors: everything, or only what names its classes and its tap."""
    container = next((key for key in CONTAINERS if isinstance(checkpoint.get(key), Mapping)), None)
    rest = {key: v for key, v in checkpoint.items() if key != container and not isinstance(v, Tensor)}
    if keep_all:
        return rest
    meta = rest['meta'] if isinstance(rest.get('meta'), Mapping) else {}
    kept = {key: meta[key] for key in CLASS_NAMES if key in meta}
    if tap := trained_tap(checkpoint):  # which new names would hide
        kept['tap'] = tap
    return {'meta': kept} if kept else {}


def to_pth(tensors: dict[str, Tensor], metadata: dict[str, Any], to: str, bare: bool) -> bytes:
    """A ``.pth`` file, laid out as readers of that convention expect it."""
    if to == 'ours':
        content = {'meta': {}, **metadata, 'state_dict': tensors}
    elif to == 'timm' and not metadata:
        content = tensors
    else:
        content = {**metadata, 'model' if to == 'authors' and bare else 'state_dict': tensors}
    buffer = io.BytesIO()  # into a file torch would write that file's name
    torch.save(content, buffer)
    return buffer.getvalue()


def to_safetensors(tensors: dict[str, Tensor]) -> bytes:
    """A ``.safetensors`` file; exits with one line without its package."""
    try:
        from safetensors.torch import save
    except ImportError:
        sys.exit('.safetensors files need the package safetensors: pip install safetensors')
    return save(tensors, {'format': 'pt'})


def write(data: bytes, target: Path, force: bool) -> None:
    """Write a file as a whole or not at all; exits with one line if that cannot be."""
    if target.exists() and not force:
        sys.exit(f'{target} is there already: --force replaces it')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.', dir=target.parent) as scratch:
            part = Path(scratch, target.name)
            part.write_bytes(data)
            part.replace(target)
    except OSError as error:
        sys.exit(f'{target} cannot be written: {one_line(error)}')


def main(argv: Sequence[str] | None = None) -> None:
    """Look into a checkpoint and convert it."""
    args = parse_args(argv)
    if args.trust_checkpoint:
        TRUSTED.add(str(Path(args.input)))
    try:
        checkpoint = read_checkpoint(args.input)
        content = recognize(checkpoint, args.input)
    except CheckpointError as error:
        sys.exit(str(error))
    print(f'{args.input}: {content}')
    if args.output is None:
        return

    if args.fuse and content.fused:
        print(f'{args.input} is fused already')
    tensors, aside = convert(content, args.to, args.fuse and not content.fused)
    if args.suffix == '.pth':
        data = to_pth(tensors, metadata_of(checkpoint, args.keep_metadata), args.to, bare=not content.prefix)
    else:
        data = to_safetensors(tensors)
    target = Path(args.output)
    if args.into_folder:
        target /= f'{Path(args.input).stem}-{hashlib.sha256(data).hexdigest()[:8]}.pth'
    write(data, target, args.force)
    more = f'; {aside} of classification heads set aside' if aside else ''
    print(f'{target}: {len(tensors)} tensors, {WHOSE[args.to]} names{more}')


if __name__ == '__main__':
    main()
