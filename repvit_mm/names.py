"""The tensor names of the authors and of timm, and our own."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

WHOSE = {'ours': 'our', 'authors': "the authors'", 'timm': "timm's"}
"""Convention -> how a message calls it."""


class Names(NamedTuple):
    """One module's or tensor's name in our tree, in the authors' and in timm's."""

    ours: str
    authors: str
    timm: str


@dataclass(frozen=True)
class Naming:
    """The tensor names of one family of backbones.

    Args:
        marks: Convention -> pattern with which only its names begin; the first that matches decides.
        first: Pattern of the first module's name, in any convention.
        head: Rows of the modules of a classification head; ours are those of :mod:`~repvit_mm.pretrain`.
        table: Takes all tensor names of a backbone, in any one convention, and returns the names of every module that
            holds tensors. A fused block is one such module if the others' code fuses it too.
        authors_container: Key of a classifier's tensors in the authors' files; ``None`` if they lie at the top.
        authors_detection_tap: The tap of the authors' own detectors; their segmentors' is ``stage_end``.
    """

    marks: Mapping[str, str]
    first: str
    head: tuple[Names, ...]
    table: Callable[[Collection[str]], list[Names]]
    authors_container: str | None
    authors_detection_tap: str = 'stage_end'

    @property
    def head_prefixes(self) -> tuple[str, ...]:
        """What the names of a classification head's tensors begin with, the authors' and timm's."""
        parts = (name.partition('.')[0] for row in self.head for name in (row.authors, row.timm))
        return tuple(f'{part}.' for part in dict.fromkeys(parts))

    def origin_of(self, names: Iterable[str]) -> str | None:
        """The convention of a backbone's tensor names, a key of ``WHOSE``; ``None`` if they are of another family."""
        for name in names:
            for origin, mark in self.marks.items():
                if re.match(mark, name):
                    return origin
        return None

    def translate(self, names: Iterable[str], to: str = 'ours') -> dict[str, str | None]:
        """Translate the names of a backbone's tensors into another convention.

        Args:
            names: All tensor names of one backbone, in any one convention.
            to: ``'ours'``, ``'authors'`` or ``'timm'``.

        Returns:
            Each given name -> the new one; ``None`` for a tensor of a classification head; the name itself if it is
            outside every known module.
        """
        names = list(names)
        origin = self.origin_of(names)
        if origin is None:
            return {name: name for name in names}
        table = {getattr(row, origin): getattr(row, to) for row in self.table(names)}
        heads = self.head_prefixes
        return {name: None if name.startswith(heads) else rename(name, table) for name in names}

    def head_names(self, names: Iterable[str]) -> dict[str, str] | None:
        """Translate the names of a classification head's tensors into ours.

        Args:
            names: All tensor names of one classifier.

        Returns:
            Each name of the head -> ours; ``None`` if the names are not the authors' or timm's.
        """
        names = list(names)
        origin = self.origin_of(names)
        if origin in (None, 'ours'):
            return None
        table = {getattr(row, origin): row.ours for row in self.head}
        return {name: rename(name, table) for name in names if name.startswith(self.head_prefixes)}

    def shared_blocks(self, names: Iterable[str], blocks: Iterable[str]) -> list[str]:
        """Which of our blocks the authors' and timm's code can hold fused; ``names`` are all names of the backbone."""
        known = {row.ours for row in self.table(list(names))}
        return [block for block in blocks if block in known]

    def prefix_of(self, names: Iterable[str]) -> str | None:
        """What stands before the names of the backbone in a whole model: ``''``, ``'backbone.'``, ``'module.'``, ...

        Returns:
            The prefix, the shortest one if a file holds several networks (a student and its teacher, say); ``None`` if
            it holds none.
        """
        first = re.compile(rf'(|.*\.)(?:{self.first})\.')
        found = {match[1] for name in names if (match := first.match(name))}
        return min(found, key=len) if found else None


def rename(name: str, table: Mapping[str, str]) -> str:
    """One tensor's new name, by the longest name in ``table`` that it begins with."""
    head, tail = name, ''
    while head and head not in table:
        head, _, part = head.rpartition('.')
        tail = f'.{part}{tail}'
    return table[head] + tail if head else name


def below(prefix: Names, rows: Iterable[Names]) -> list[Names]:
    """The rows with a prefix before each name."""
    return [Names(*(f'{p}.{name}' for p, name in zip(prefix, row, strict=True))) for row in rows]


def conv_bn(ours: str, authors: str, timm: str) -> tuple[Names, Names]:
    """Rows of a ``ConvBN`` of RepViT, whose convolution is named ``c`` elsewhere."""
    return Names(ours, authors, timm), Names(f'{ours}.conv', f'{authors}.c', f'{timm}.c')


REPVIT_STEM = (
    *conv_bn('stem.conv1', 'features.0.0', 'stem.conv1'),
    *conv_bn('stem.conv2', 'features.0.2', 'stem.conv2'),
)
REPVIT_BLOCK = (
    Names('token_mixer', 'token_mixer.0', 'token_mixer'),
    *conv_bn('token_mixer.conv3x3', 'token_mixer.0.conv', 'token_mixer.conv'),
    *conv_bn('token_mixer.conv1x1', 'token_mixer.0.conv1', 'token_mixer.conv1'),
    Names('se', 'token_mixer.1', 'se'),
    *conv_bn('channel_mixer.expand', 'channel_mixer.m.0', 'channel_mixer.conv1'),
    *conv_bn('channel_mixer.project', 'channel_mixer.m.2', 'channel_mixer.conv2'),
)
REPVIT_DOWNSAMPLE = (
    *conv_bn('spatial', 'token_mixer.0', 'spatial_downsample'),
    *conv_bn('channel', 'token_mixer.2', 'channel_downsample'),
    *conv_bn('channel_mixer.expand', 'channel_mixer.m.0', 'ffn.conv1'),
    *conv_bn('channel_mixer.project', 'channel_mixer.m.2', 'ffn.conv2'),
)
REPVIT_HEAD = (
    Names('classifier.labels.norm', 'classifier.classifier.bn', 'head.head.bn'),
    Names('classifier.labels.linear', 'classifier.classifier.l', 'head.head.l'),
    Names('classifier.teacher.norm', 'classifier.classifier_dist.bn', 'head.head_dist.bn'),
    Names('classifier.teacher.linear', 'classifier.classifier_dist.l', 'head.head_dist.l'),
)


def repvit_stage_lengths(names: Iterable[str]) -> list[int]:
    """The number of blocks of each stage of a RepViT, stride-2 blocks included, according to its tensor names."""
    last, downsamples = 0, set()
    timm: dict[int, int] = {}
    ours: dict[int, int] = {}
    for name in names:
        if match := re.match(r'features\.(\d+)\.(token_mixer\.2\.)?', name):
            last = max(last, int(match[1]))
            if match[2]:
                downsamples.add(int(match[1]))
        elif match := re.match(r'stages\.(\d+)\.(blocks\.|downsample\.)?(\d+)?', name):
            lengths = timm if match[2] else ours
            lengths[int(match[1])] = max(lengths.get(int(match[1]), 0), int(match[3] or -1) + 1)
    if timm:
        # timm counts the last block of stages 0 to 2 as a part of the downsample that follows; it may be the only one.
        return [timm.get(stage, 0) + (stage > 0) + (stage < max(timm)) for stage in range(max(timm) + 1)]
    if ours:
        return [ours[stage] for stage in sorted(ours)]
    borders = [1, *sorted(downsamples), last + 1]
    return [end - start for start, end in pairwise(borders)]


def repvit_table(names: Collection[str]) -> list[Names]:
    """The names of every module that holds tensors in the RepViT whose tensor names are given."""
    lengths = repvit_stage_lengths(names)
    table = list(REPVIT_STEM)
    flat = 0
    for stage, length in enumerate(lengths):
        for position in range(length):
            flat += 1
            downsample = stage > 0 and position == 0
            if downsample:
                timm = f'stages.{stage}.downsample'
            elif position == length - 1 and stage < len(lengths) - 1:
                timm = f'stages.{stage + 1}.downsample.pre_block'
            else:
                timm = f'stages.{stage}.blocks.{position - (stage > 0)}'
            prefix = Names(f'stages.{stage}.{position}', f'features.{flat}', timm)
            table += below(prefix, REPVIT_DOWNSAMPLE if downsample else REPVIT_BLOCK)
    return table


REPVIT_NAMES = Naming(
    marks={
        'authors': r'features\.\d+\.',
        'timm': r'stages\.\d+\.(blocks|downsample)\.',
        'ours': r'stages\.\d+\.\d+\.',
    },
    first=r'features\.0\.0|stem\.conv1',
    head=REPVIT_HEAD,
    table=repvit_table,
    authors_container='model',
    authors_detection_tap='pre_downsample',
)


def mobile_one(ours: str, authors: str, timm: str) -> list[Names]:
    """Rows of a MobileOne block: fused, and its branches."""
    return [
        Names(ours, f'{authors}.reparam_conv', f'{timm}.reparam_conv'),
        Names(f'{ours}.convs', f'{authors}.rbr_conv', f'{timm}.conv_kxk'),
        Names(f'{ours}.scale', f'{authors}.rbr_scale', f'{timm}.conv_scale'),
        Names(f'{ours}.skip', f'{authors}.rbr_skip', f'{timm}.identity'),
    ]


FASTVIT_STEM = [row for i in range(3) for row in mobile_one(f'stem.conv{i + 1}', f'patch_embed.{i}', f'stem.{i}')]
FASTVIT_EMBEDDING = (
    Names('spatial', 'proj.0.lkb_reparam', 'proj.0.reparam_conv'),
    Names('spatial.large', 'proj.0.lkb_origin', 'proj.0.large_conv'),
    Names('spatial.small', 'proj.0.small_conv', 'proj.0.small_conv'),
    *mobile_one('channel', 'proj.1', 'proj.1'),
)
FASTVIT_POSITION = (
    Names('stages.3.0.position', 'network.6.reparam_conv', 'stages.3.pos_emb.reparam_conv'),
    Names('stages.3.0.position.conv', 'network.6.pe', 'stages.3.pos_emb.pos_enc'),
)
FASTVIT_FFN = (
    Names('channel_mixer.depthwise.conv', 'convffn.conv.conv', 'mlp.conv.conv'),
    Names('channel_mixer.depthwise.bn', 'convffn.conv.bn', 'mlp.conv.bn'),
    Names('channel_mixer.expand', 'convffn.fc1', 'mlp.fc1'),
    Names('channel_mixer.project.layer', 'convffn.fc2', 'mlp.fc2'),
)
FASTVIT_REPMIXER_BLOCK = (
    *mobile_one('token_mixer.mixer', 'token_mixer.mixer', 'token_mixer.mixer')[1:],
    Names('token_mixer', 'token_mixer.reparam_conv', 'token_mixer.reparam_conv'),
    Names('token_mixer.norm', 'token_mixer.norm.rbr_skip', 'token_mixer.norm.identity'),
    Names('token_mixer.layer_scale', 'token_mixer.layer_scale', 'token_mixer.layer_scale.gamma'),
    *FASTVIT_FFN,
    Names('channel_mixer.project.layer_scale', 'layer_scale', 'layer_scale.gamma'),
)
FASTVIT_ATTENTION_BLOCK = (
    Names('token_mixer.qkv.norm', 'norm', 'norm'),
    Names('token_mixer.qkv.linear', 'token_mixer.qkv', 'token_mixer.qkv'),
    Names('token_mixer.project.layer', 'token_mixer.proj', 'token_mixer.proj'),
    Names('token_mixer.project.layer_scale', 'layer_scale_1', 'layer_scale_1.gamma'),
    *FASTVIT_FFN,
    Names('channel_mixer.project.layer_scale', 'layer_scale_2', 'layer_scale_2.gamma'),
)
FASTVIT_HEAD = (
    *mobile_one('expand.conv', 'conv_exp', 'final_conv'),
    Names('expand.se.fc1', 'conv_exp.se.reduce', 'final_conv.se.fc1'),
    Names('expand.se.fc2', 'conv_exp.se.expand', 'final_conv.se.fc2'),
    Names('classifier', 'head', 'head.fc'),
)


FASTVIT_ATTENTION = r'network\.(6\.pe|6\.reparam_conv|7)\.|stages\.3\.(pos_emb|0\.position)\.'
"""Pattern of names that only a FastViT with attention has."""


def fastvit_table(names: Collection[str]) -> list[Names]:
    """The names of every module that holds tensors in the FastViT whose tensor names are given."""
    attention = any(re.match(FASTVIT_ATTENTION, name) for name in names)
    depths = [0, 0, 0, 0]
    for name in names:
        if match := re.match(r'network\.([0-7])\.(\d+)\.', name):
            stage, position = int(match[1]) // 2, int(match[2])
        elif match := re.match(r'stages\.([0-3])\.blocks\.(\d+)\.', name):
            stage, position = int(match[1]), int(match[2])
        elif match := re.match(r'stages\.([0-3])\.(\d+)\.', name):
            stage = int(match[1])
            position = int(match[2]) - (stage > 0)  # behind the patch embedding
        else:
            continue
        depths[stage] = max(depths[stage], position + 1)

    table = FASTVIT_STEM + list(FASTVIT_POSITION)
    for stage, depth in enumerate(depths):
        if stage > 0:
            embedding = Names(f'stages.{stage}.0', f'network.{2 * stage - 1}', f'stages.{stage}.downsample')
            table += below(embedding, FASTVIT_EMBEDDING)
        with_attention = attention and stage == 3
        for position in range(depth):
            # The authors' list counts the position encoding.
            theirs = f'network.{2 * stage + with_attention}.{position}'
            prefix = Names(f'stages.{stage}.{position + (stage > 0)}', theirs, f'stages.{stage}.blocks.{position}')
            table += below(prefix, FASTVIT_ATTENTION_BLOCK if with_attention else FASTVIT_REPMIXER_BLOCK)
        # Only the authors' dense code has output norms.
        table.append(Names(f'out_norms.{stage}', f'norm{2 * stage}', f'out_norms.{stage}'))
    return table


FASTVIT_NAMES = Naming(
    marks={
        'authors': r'(patch_embed|network)\.\d+\.',
        'timm': r'stem\.\d+\.|stages\.\d+\.(blocks|downsample|pos_emb)\.',
        'ours': r'stages\.\d+\.\d+\.',
    },
    first=r'patch_embed\.0|stem\.0|stem\.conv1',
    head=FASTVIT_HEAD,
    table=fastvit_table,
    authors_container='state_dict',
)


def mobileone_layer(ours: str, authors: str, timm: str) -> list[Names]:
    """Rows of one convolution of MobileOne with what stands behind it."""
    return [
        *mobile_one(f'{ours}.conv', authors, timm),
        Names(f'{ours}.se.fc1', f'{authors}.se.reduce', f'{timm}.attn.fc1'),
        Names(f'{ours}.se.fc2', f'{authors}.se.expand', f'{timm}.attn.fc2'),
    ]


def mobileone_table(names: Collection[str]) -> list[Names]:
    """The names of every module that holds tensors in the MobileOne whose tensor names are given."""
    depths = [0, 0, 0, 0]
    for name in names:
        if match := re.match(r'stages\.([0-3])\.(\d+)\.(depthwise|pointwise)\.', name):
            stage, position = int(match[1]), int(match[2])
        elif match := re.match(r'(?:stage([1-4])|stages\.([0-3]))\.(\d+)\.', name):
            stage = int(match[1]) - 1 if match[1] else int(match[2])
            position = int(match[3]) // 2  # theirs count convolutions
        else:
            continue
        depths[stage] = max(depths[stage], position + 1)

    table = mobileone_layer('stem', 'stage0', 'stem')
    for stage, depth in enumerate(depths):
        for position in range(depth):
            for part, theirs in (('depthwise', 2 * position), ('pointwise', 2 * position + 1)):
                ours = f'stages.{stage}.{position}.{part}'
                table += mobileone_layer(ours, f'stage{stage + 1}.{theirs}', f'stages.{stage}.{theirs}')
    return table


MOBILEONE_NAMES = Naming(
    marks={
        'authors': r'stage\d\.(\d+\.)?(rbr_conv|rbr_scale|rbr_skip|reparam_conv|se)\.',
        'timm': r'(stem|stages\.\d+\.\d+)\.(conv_kxk|conv_scale|identity|reparam_conv|attn)\.',
        'ours': r'(stem|stages\.\d+\.\d+\.(depthwise|pointwise))\.(conv|se)\.',
    },
    first=r'stage0\.(?:rbr_conv|rbr_scale|reparam_conv)|stem\.(?:conv|conv_kxk|conv_scale|reparam_conv)',
    head=(Names('classifier', 'linear', 'head.fc'),),
    table=mobileone_table,
    authors_container=None,
)

NAMINGS = (REPVIT_NAMES, FASTVIT_NAMES, MOBILEONE_NAMES)
"""The conventions of all families."""
