"""Look into a checkpoint of any kind, or convert it: python tools/convert_checkpoint.py IN OUT."""

import argparse
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repvit_mm import switch_to_deploy
from repvit_mm.backbone import Recognized, ReparamBackbone, families, fused_blocks
from repvit_mm.checkpoint import (
    CONTAINERS,
    TRUSTED,
    CheckpointError,
    describe_misfit,
    one_line,
    read_checkpoint,
    tensors_of,
    trained_tap,
    without_counters,
)
from repvit_mm.names import WHOSE

CLASS_NAMES = ('dataset_meta', 'CLASSES', 'PALETTE')
"""What a detector's ``meta`` says of its classes, in MMEngine's and in the 2.x era's words: not about its training."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds.

    Args:
        origin: Whose names its backbone has, ``'ours'``, ``'authors'`` or ``'timm'``.
        recognized: What its backbone is.
        prefix: What stands before the backbone's names, parallel wrappers left out.
        backbone: The backbone's tensors by our names.
        heads: Those of its classification heads by their own names.
        others: Those of a model's other parts by their full names, parallel wrappers left out.
    """

    origin: str
    recognized: Recognized
    prefix: str
    backbone: dict[str, Tensor]
    heads: dict[str, Tensor]
    others: dict[str, Tensor]

    def __str__(self) -> str:
        family, archs, form = self.recognized
        more = {'of classification heads': self.heads, 'of other parts of a model': self.others}
        return (
            f'{family.__name__} {" or ".join(archs)}, {form} form, {WHOSE[self.origin]} names: '
            f'{len(self.backbone)} backbone tensors'
            + (f' under {self.prefix}*' if self.prefix else '')
            + ''.join(f', {len(tensors)} {what}' for what, tensors in more.items() if tensors)
        )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with one line where its options do not fit together."""
    parser = argparse.ArgumentParser(description='Look into a RepViT or FastViT checkpoint of any kind, or convert it.')
    parser.add_argument('input', type=os.path.expanduser, metavar='IN', help='.pth or .safetensors file')
    parser.add_argument(
        'output',
        type=os.path.expanduser,
        nargs='?',
        metavar='OUT',
        help='.pth or .safetensors file; or a folder, where a .pth file gets the start of its SHA-256 into its name',
    )
    parser.add_argument('--to', choices=list(WHOSE), default='ours', help='whose tensor names (default: %(default)s)')
    parser.add_argument(
        '--fuse', action='store_true', help='fuse the backbone (by names of others: as far as their code does)'
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


def recognize(checkpoint: Any, file: str) -> Content:
    """What a checkpoint holds.

    Raises:
        CheckpointError: unless that is exactly a known variant, alone or in a model.
    """
    tensors = tensors_of(checkpoint)
    candidates = {}
    for family in families():
        prefix = family.naming.prefix_of(tensors)
        if prefix is None:
            continue
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        names = family.naming.translate(found)
        backbone = {ours: found[name] for name, ours in names.items() if ours is not None}
        if recognized := family.recognize(backbone):
            return Content(
                family.naming.origin_of(found),
                recognized,
                prefix=prefix.removeprefix('module.'),
                backbone=backbone,
                heads={name: found[name] for name, ours in names.items() if ours is None},
                others={name.removeprefix('module.'): t for name, t in tensors.items() if not name.startswith(prefix)},
            )
        candidates[family] = without_counters(backbone)
    if not candidates:
        has = f'its first tensor is {next(iter(tensors))}' if tensors else 'it holds no tensor at all'
        raise CheckpointError(f'{file} holds no {" or ".join(family.__name__ for family in families())}: {has}')
    raise CheckpointError(f'{file} {misfit(candidates)}')


def misfit(candidates: Mapping[type[ReparamBackbone], Mapping[str, torch.Size]]) -> str:
    """What keeps shapes, by our names as each family translates them, from being those of the nearest variant."""
    variants = [
        (family, arch, shapes, family.variant_shapes(spec, shapes))
        for family, shapes in candidates.items()
        for arch, spec in family.specs.items()
    ]
    family, nearest, shapes, own = max(variants, key=lambda variant: len(variant[2].items() & variant[3].items()))
    missing = [name for name in own if name not in shapes]
    unexplained = [name for name in shapes if name not in own]
    reshaped = [name for name in own if name in shapes and shapes[name] != own[name]]
    misfits = describe_misfit(missing, unexplained, reshaped)
    return f'holds no whole {family.__name__}: compared with {nearest}, {misfits}'


def blocks_to_fuse(content: Content, to: str) -> list[str]:
    """The blocks of the backbone that are still to be fused, where ``to`` has a name for them.

    Raises:
        CheckpointError: if one is fused already for which it has none.
    """
    family, archs, _ = content.recognized
    _, kernels = family.layout(family.specs[archs[0]])
    named = list(kernels) if to == 'ours' else family.naming.shared_blocks(content.backbone, kernels)
    fused = fused_blocks(content.backbone, kernels)
    if not fused.issubset(named):
        raise CheckpointError(f'its backbone is fused further than {WHOSE[to]} code can: convert the unfused file')
    return [name for name in named if name not in fused]


def convert(content: Content, to: str, fuse: Collection[str]) -> tuple[dict[str, Tensor], int]:
    """All tensors by their new names, and how many of classification heads are set aside.

    Heads stay as long as the names do: other conventions have none, or others. Where blocks are fused they go, because
    a head that is not fused loads into no fused classifier.

    Args:
        content: What there is.
        to: Whose names.
        fuse: The blocks to fuse.
    """
    family, archs, _ = content.recognized
    backbone = content.backbone
    if fuse:
        optional = {name: tensor for name, tensor in backbone.items() if name.startswith(family.optional)}
        network = family.from_tensors({n: t for n, t in backbone.items() if n not in optional}, arch=archs[0])
        switch_to_deploy(network, [network.get_submodule(name) for name in fuse])
        dtype = next(iter(backbone.values())).dtype
        backbone = network.to(dtype).state_dict() | optional
    kept = content.heads if to == content.origin and not fuse else {}
    renamed = {new: backbone[ours] for ours, new in family.naming.translate(backbone, to).items()} | kept
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

    try:
        left = blocks_to_fuse(content, args.to)
    except CheckpointError as error:
        sys.exit(f'{args.input} cannot get {WHOSE[args.to]} names: {error}')
    if args.fuse and not left:
        print(f'{args.input} is fused already')
    tensors, aside = convert(content, args.to, left if args.fuse else [])
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
