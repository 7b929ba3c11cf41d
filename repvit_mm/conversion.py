"""Converting checkpoints: recognize what a file holds; give it other names, fuse it, write it in another format."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoint import CONTAINERS, CheckpointError, tensors_of, trained_tap
from .loading import (
    FAMILIES,
    Recognized,
    Shapes,
    find_backbone,
    from_tensors,
    fused_blocks,
    layout,
    misfit,
    recognize,
    shapes_of,
    variant_shapes,
)
from .names import WHOSE
from .reparam import switch_to_deploy

CLASS_NAMES = ('dataset_meta', 'CLASSES', 'PALETTE')
"""The entries of a checkpoint's ``meta`` that describe its classes, as MMEngine and as the 2.x libraries name them."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds.

    Args:
        file: What messages call the file.
        origin: Whose names its backbone has, ``'ours'``, ``'authors'`` or ``'timm'``.
        recognized: What its backbone is.
        prefix: What stands before the backbone's names, parallel wrappers left out.
        backbone: The backbone's tensors by our names.
        heads: The tensors of its classification heads by their own names.
        others: The tensors of a model's other parts by their full names, parallel wrappers left out.
    """

    file: str
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


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint.

    Args:
        to: Whose names it has.
        tensors: All tensors by their new names.
        container: Key under which those who use these names look for the tensors; ``None`` if at the top.
        fused: How many blocks were fused.
        set_aside: How many tensors of classification heads were left out.
    """

    to: str
    tensors: dict[str, Tensor]
    container: str | None
    fused: int
    set_aside: int


def content_of(checkpoint: Any, file: str = 'the checkpoint') -> Content:
    """What a checkpoint holds.

    Args:
        checkpoint: What :func:`~repvit_mm.checkpoint.read_checkpoint` returned.
        file: What messages call it.

    Raises:
        CheckpointError: unless it holds exactly a known variant, alone or in a model.
    """
    shapes: dict[type, Shapes] = {}
    for family in FAMILIES:
        prefix, found, others = find_backbone(checkpoint, family.naming)
        if prefix is None:
            continue
        names = family.naming.translate(found)
        backbone = {ours: found[name] for name, ours in names.items() if ours is not None}
        if recognized := recognize(family, backbone):
            return Content(
                file,
                family.naming.origin_of(found),
                recognized,
                prefix=prefix.removeprefix('module.'),
                backbone=backbone,
                heads={name: found[name] for name, ours in names.items() if ours is None},
                others={name.removeprefix('module.'): tensor for name, tensor in others.items()},
            )
        shapes[family] = shapes_of(backbone)
    if shapes:
        raise CheckpointError(f'{file} {nearest_misfit(shapes)}')
    tensors = tensors_of(checkpoint)
    has = f'its first tensor is {next(iter(tensors))}' if tensors else 'it holds no tensor at all'
    raise CheckpointError(f'{file} holds no {" or ".join(family.__name__ for family in FAMILIES)}: {has}')


def nearest_misfit(shapes: Mapping[type, Shapes]) -> str:
    """How tensors differ from the nearest variant's.

    Args:
        shapes: Family -> the shapes of the tensors, by the names into which that family translates them.
    """
    variants = [
        (family, arch, given, variant_shapes(family, spec, given))
        for family, given in shapes.items()
        for arch, spec in family.specs.items()
    ]
    family, arch, given, wanted = max(variants, key=lambda variant: len(variant[2].items() & variant[3].items()))
    return f'holds no whole {family.__name__}: compared with {arch}, {misfit(given, wanted)}'


def blocks_to_fuse(content: Content, to: str = 'ours') -> list[str]:
    """The blocks of the backbone that are not fused yet and that the convention ``to`` can name once they are.

    Raises:
        CheckpointError: if a block is fused already that the convention has no name for.
    """
    family, archs, _ = content.recognized
    _, kernels = layout(family, family.specs[archs[0]])
    named = list(kernels) if to == 'ours' else family.naming.shared_blocks(content.backbone, kernels)
    fused = fused_blocks(content.backbone, kernels)
    if not fused.issubset(named):
        raise CheckpointError(
            f'{content.file} cannot get {WHOSE[to]} names: its backbone is fused further than {WHOSE[to]} code can: '
            'convert the unfused file'
        )
    return [name for name in named if name not in fused]


def convert(content: Content, to: str = 'ours', fuse: bool = False) -> Converted:
    """A checkpoint's tensors by other names, fused if asked for.

    Classification heads are kept only where the names stay the same, because other conventions have other heads. They
    are also left out where blocks are fused, because an unfused head does not load into a fused classifier.

    Args:
        content: What there is.
        to: Whose names: ``'ours'``, ``'authors'`` or ``'timm'``.
        fuse: Whether to fuse the backbone; under other names than ours, as far as the others' code does.

    Raises:
        CheckpointError: if a block is fused already that the convention ``to`` has no name for.
    """
    family = content.recognized.family
    to_fuse = blocks_to_fuse(content, to)
    blocks = to_fuse if fuse else []
    backbone = fused(content, blocks) if blocks else content.backbone
    heads = content.heads if to == content.origin and not blocks else {}
    renamed = {new: backbone[ours] for ours, new in family.naming.translate(backbone, to).items()} | heads
    tensors = {content.prefix + name: tensor for name, tensor in renamed.items()} | content.others
    # Copied, so that a view does not keep its larger memory and nothing remembers the file it came from.
    copies = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    container = 'state_dict'
    if to == 'timm':
        container = None
    elif to == 'authors' and not content.prefix:
        container = family.naming.authors_container
    return Converted(to, copies, container, len(blocks), len(content.heads) - len(heads))


def fused(content: Content, blocks: Sequence[str]) -> dict[str, Tensor]:
    """The backbone's tensors by our names with some blocks fused, in the precision that they have."""
    family, archs, _ = content.recognized
    optional = {name: t for name, t in content.backbone.items() if name.startswith(tuple(family.optional))}
    proper = {name: tensor for name, tensor in content.backbone.items() if name not in optional}
    network = from_tensors(family, proper, arch=archs[0])
    switch_to_deploy(network, [network.get_submodule(name) for name in blocks])
    dtype = next(iter(proper.values())).dtype
    return network.to(dtype).state_dict() | optional


def metadata_of(checkpoint: Any, keep_all: bool = False) -> dict[str, Any]:
    """A checkpoint's entries beside its tensors: all of them, or only its classes and its tap."""
    container = next((key for key in CONTAINERS if isinstance(checkpoint.get(key), Mapping)), None)
    rest = {key: v for key, v in checkpoint.items() if key != container and not isinstance(v, Tensor)}
    if keep_all:
        return rest
    meta = rest['meta'] if isinstance(rest.get('meta'), Mapping) else {}
    kept = {key: meta[key] for key in CLASS_NAMES if key in meta}
    if tap := trained_tap(checkpoint):  # which new names would hide
        kept['tap'] = tap
    return {'meta': kept} if kept else {}


def to_pth(converted: Converted, metadata: Mapping[str, Any]) -> bytes:
    """A ``.pth`` file, laid out as readers of its names expect it."""
    if converted.to == 'ours':
        content = {'meta': {}, **metadata, 'state_dict': converted.tensors}
    elif converted.container is None and not metadata:
        content = converted.tensors
    else:
        content = {**metadata, converted.container or 'state_dict': converted.tensors}
    buffer = io.BytesIO()  # into a file torch would write that file's name
    torch.save(content, buffer)
    return buffer.getvalue()


def to_safetensors(converted: Converted) -> bytes:
    """A ``.safetensors`` file, which holds nothing but tensors."""
    from safetensors.torch import save

    return save(converted.tensors, {'format': 'pt'})
