"""What several test files share. A further family joins the whole suite by its rows in the tables here."""

import importlib.util
import json
import runpy
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from repvit_mm import FastViT, MobileOne, RepViT, switch_to_deploy
from repvit_mm._versions import is_between
from repvit_mm.backbone import ReparamBackbone
from repvit_mm.fastvit import LargeKernelConv, PositionEncoding, RepMixer
from repvit_mm.layers import ChannelLinear, ConvBN, LayerScale, MobileOneBlock, NormLinear, dilate
from repvit_mm.reparam import reparam_blocks
from repvit_mm.repvit import TokenMixer


def since(first: str) -> bool:
    """Whether torch is of a version from ``first`` on."""
    return is_between(torch.__version__, first, '99')


def since_torch(first: str, what: str) -> pytest.MarkDecorator:
    """Skips a test where torch is too old for what the test is about."""
    return pytest.mark.skipif(not since(first), reason=f'{what} begins with torch {first}')


DATA = Path(__file__).parent / 'data'
STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')

reference_tensor = runpy.run_path(str(DATA / 'reference_weights.py'))['reference_tensor']


@dataclass(frozen=True)
class Family:
    """What the tests know of one family of backbones.

    Args:
        cls: Our class. Its name in lower case begins the names of golden files and stands in those of configs.
        typical: A small variant with every kind of block.
        goldens: The variants that the authors' code was measured for.
        timm_goldens: Those that timm's was measured for.
        taps: Our tap -> what the maps of stages 1 to 3 are called in the authors' golden files.
        timm_tap: Our tap of timm's ``stage``.
        heads: Beginnings of the names of the owners' classification heads.
        owners_fuse: What the owners' code does to tensor names as it fuses: where a match ends, a convolution stands.
        owners_leave: Blocks of ours that the owners' code does not fuse.
        container: Key under which the authors' files hold a classifier's tensors; ``None`` if there is none.
        weights: The address of the ImageNet weights that a variant's configs start from.
        coco_rate: Learning rate of the configs for COCO.
        coco_options: What their backbones have beside the common options.
        released: Variants whose detectors and segmentors the authors released; other configs are marked as ours.
        residual: Whether its blocks have residual branches, which stochastic depth drops.
    """

    cls: type[ReparamBackbone]
    typical: str
    goldens: tuple[str, ...]
    timm_goldens: tuple[str, ...]
    heads: tuple[str, ...]
    owners_fuse: tuple[tuple[str, str], ...]
    container: str | None
    weights: Callable[[str], str]
    coco_rate: float
    owners_leave: tuple[type, ...] = ()
    taps: dict[str, str] = field(default_factory=lambda: {'stage_end': 'stage'})
    timm_tap: str = 'stage_end'
    coco_options: dict[str, str] = field(default_factory=dict)
    released: tuple[str, ...] = ()
    residual: bool = True

    @property
    def name(self) -> str:
        return self.cls.__name__.lower()


FAMILIES = [
    Family(
        RepViT,
        typical='m0_6',
        goldens=('m0_6', 'm0_9', 'm1_0', 'm1_1', 'm1_5', 'm2_3'),
        timm_goldens=('m1', 'm2', 'm3', 'm0_9', 'm1_1'),
        taps={'stage_end': 'stage', 'pre_downsample': 'pre_downsample'},
        timm_tap='pre_downsample',
        heads=('classifier.', 'head.'),
        owners_fuse=(
            (r'(.*token_mixer(?:\.0)?)\.(?:conv1?|bn)\.', r'\1'),  # all branches of a depthwise block
            (r'(.*)\.(?:c|bn)\.', r'\1'),
        ),
        container='model',
        # 300-epoch weights, but for m2_3 the 450-epoch ones.
        weights=lambda arch: (
            'https://github.com/THU-MIG/RepViT/releases/download/v1.0/'
            f'repvit_{arch}_distill_{"450e" if arch == "m2_3" else "300e"}.pth'
        ),
        coco_rate=2e-4,
        coco_options={'tap': 'pre_downsample'},
        released=('m1_1', 'm1_5', 'm2_3'),
    ),
    Family(
        FastViT,
        typical='sa12',
        goldens=('t8', 't12', 's12', 'sa12', 'sa24', 'sa36', 'ma36'),
        timm_goldens=('t8', 'sa12'),
        heads=('conv_exp.', 'final_conv.', 'head.'),
        owners_fuse=(
            (r'(.*token_mixer)\.(?:mixer|norm|layer_scale)\b', r'\1.reparam_conv'),
            (r'(.*)\.(?:rbr_(?:conv|scale|skip)|conv_kxk|conv_scale|identity)\.', r'\1.reparam_conv'),
            (r'(network.*)\.(?:lkb_origin|small_conv)\.', r'\1.lkb_reparam'),
            (r'(stages.*)\.(?:large_conv|small_conv)\.', r'\1.reparam_conv'),
            (r'(network\.6)\.pe\.', r'\1.reparam_conv'),
            (r'(stages\.3\.pos_emb)\.pos_enc\.', r'\1.reparam_conv'),
        ),
        owners_leave=(ConvBN, NormLinear, LayerScale),  # of attention and ConvFFN
        container='state_dict',
        weights=lambda arch: (
            'https://docs-assets.developer.apple.com/ml-research/models/fastvit/image_classification_models/'
            f'fastvit_{arch}.pth.tar'
        ),
        coco_rate=1e-4,
    ),
    Family(
        MobileOne,
        typical='s4',
        goldens=('s0', 's1', 's2', 's3', 's4'),
        timm_goldens=('s0', 's1', 's4'),
        heads=('linear.', 'head.'),
        owners_fuse=((r'(.*)\.(?:rbr_(?:conv|scale|skip)|conv_kxk|conv_scale|identity)\.', r'\1.reparam_conv'),),
        container=None,
        weights=lambda arch: (
            f'https://docs-assets.developer.apple.com/ml-research/datasets/mobileone/mobileone_{arch}_unfused.pth.tar'
        ),
        coco_rate=2e-4,
        residual=False,
    ),
]


UNUSED = {
    'torchvision': ('ops', 'ops.boxes', 'transforms', 'transforms.functional', 'transforms.transforms'),
    'xtcocotools': ('coco', 'cocoeval', 'mask'),
}
"""What MMPretrain and MMPose import and no test uses: torchvision has to be built for this very torch, xtcocotools for
this NumPy."""


def imported(*names: str) -> None:
    """Import modules of one library, or skip the test if it is not installed.

    Something takes the place of what is ``UNUSED`` and cannot be imported, for the time of the import.
    """
    library = names[0].partition('.')[0]
    if not importlib.util.find_spec(library):
        pytest.skip(f'{library} is not installed')
    absent = []
    for package, modules in UNUSED.items():
        try:
            importlib.import_module(package + '.' + modules[0])
        except Exception:  # whatever a library raises that is built for another one
            absent += [package, *(f'{package}.{module}' for module in modules)]
    stand_ins = {name: MagicMock() for name in absent}
    if 'torchvision' in stand_ins:
        stand_ins['torchvision'].transforms.RandomResizedCrop = object  # MMPretrain derives a class from it
    sys.modules.update(stand_ins)
    try:
        for name in names:
            importlib.import_module(name)
    finally:
        for name in stand_ins:
            del sys.modules[name]


def family_of(cls: type[ReparamBackbone]) -> Family:
    return next(family for family in FAMILIES if family.cls is cls)


HEADS = tuple(sorted({head for family in FAMILIES for head in family.heads}))


@lru_cache(2)
def _draw_all(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(reference_tensor(name, shape)) for name, shape in shapes}


@dataclass(frozen=True)
class Golden:
    """A network of others that one of ours must reproduce.

    Args:
        family: Our family.
        arch: Our name of the variant.
        taps: Our tap -> what the maps of stages 1 to 3 are called in the file. That of stage 4 is always ``stage4``.
        timm: Whether it is timm's, or the authors'.
    """

    family: Family
    arch: str
    taps: dict[str, str]
    timm: bool = False

    @property
    def name(self) -> str:
        """Name of its files in ``data/``."""
        return f'{"timm_" if self.timm else ""}{self.family.name}_{self.arch}'

    @property
    def backbone(self) -> type[ReparamBackbone]:
        return self.family.cls

    @property
    def facts(self) -> dict:
        return json.loads((DATA / f'{self.name}.keys.json').read_text())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, classification heads included."""
        return {name: tuple(shape) for name, shape in self.facts['keys'].items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Its weights, float64. Those who ask share the tensors, so none may be written into."""
        return dict(_draw_all(tuple(self.shapes.items())))

    def maps(self, tap: str) -> list[Tensor]:
        with np.load(DATA / f'{self.name}.npz') as maps:
            return [torch.from_numpy(maps[name]) for name in (*(f'{self.taps[tap]}{i}' for i in (1, 2, 3)), 'stage4')]


def goldens_of(family: Family) -> list[Golden]:
    """The authors' and then timm's."""
    authors = [Golden(family, arch, family.taps) for arch in family.goldens]
    return authors + [Golden(family, arch, {family.timm_tap: 'stage'}, timm=True) for arch in family.timm_goldens]


GOLDENS = [golden for family in FAMILIES for golden in goldens_of(family)]

# Of each family the authors' typical network.
TYPICAL = [golden for golden in GOLDENS if golden.arch == golden.family.typical and not golden.timm]

# Of each family one network of the authors and one of timm.
ENDS = [golden for family in FAMILIES for golden in (goldens_of(family)[0], goldens_of(family)[-1])]


def slow_but(quick: Collection, values: Iterable) -> list:
    """The values of a test's parameter; all but the quick ones are left out of the quick part of the suite."""
    return [
        pytest.param(
            value,
            id=value.name if isinstance(value, Golden) else str(value),
            marks=() if value in quick else pytest.mark.slow,
        )
        for value in values
    ]


# Small networks with every kind of block, for tests that run many of them.
SMALL = {
    'repvit': (RepViT, dict(channels=(8, 16, 24, 32), depths=(2, 1, 3, 1))),
    'repvit_v1': (RepViT, dict(channels=(8, 16, 24, 32), depths=(2, 1, 3, 1), norm_after_sum=False)),
    'fastvit': (FastViT, dict(channels=(8, 16, 32, 64), depths=(2, 1, 3, 2), mlp_ratio=2, attention=True)),
    'mobileone': (
        MobileOne,
        dict(channels=(8, 16, 24, 32), depths=(2, 1, 3, 1), num_convs=2, se_depths=(0, 0, 2, 1)),
    ),
}


def dilated(block: nn.Module) -> nn.Module:
    """The same block as it stands in a stage with a dilation of 3, behind one with a dilation of 2."""
    dilate(block, 2, 3)
    return block


# Every kind of re-parameterizable block, each for 6 channels in.
BLOCKS = {
    'conv1x1': partial(ConvBN, 6, 10),
    'conv3x3_stride2': partial(ConvBN, 6, 10, 3, stride=2),
    'conv3x3_depthwise_stride2': partial(ConvBN, 6, 6, 3, stride=2, groups=6),
    'conv5x5_groups3': partial(ConvBN, 6, 9, 5, groups=3),
    'token_mixer': partial(TokenMixer, 6, norm_after_sum=True),
    'token_mixer_v1': partial(TokenMixer, 6, norm_after_sum=False),
    'mobile_one_stride2': partial(MobileOneBlock, 6, 10, 3, stride=2),
    'mobile_one_depthwise': partial(MobileOneBlock, 6, 6, 3, groups=6, num_convs=3),
    'mobile_one_1x1': partial(MobileOneBlock, 6, 6, 1),
    'token_mixer_dilated': lambda: dilated(TokenMixer(6, norm_after_sum=True)),
    'mobile_one_stride2_dilated': lambda: dilated(MobileOneBlock(6, 10, 3, stride=2)),
    'large_kernel_dilated': lambda: dilated(LargeKernelConv(6, 12)),
    'rep_mixer': partial(RepMixer, 6, layer_scale=1e-5),
    'large_kernel': partial(LargeKernelConv, 6, 12),
    'position_encoding': partial(PositionEncoding, 6),
    'norm_linear': partial(NormLinear, 6, 18),
    'layer_scale_conv': lambda: LayerScale(nn.Conv2d(6, 10, 1), 10, 1e-5),
    'layer_scale_linear': lambda: LayerScale(ChannelLinear(6, 10), 10, 1e-5),
}


def image() -> Tensor:
    """The input of every golden file, float32 ``(1, 3, 64, 96)``."""
    with np.load(DATA / 'image.npz') as file:
        return torch.from_numpy(file['image'])


@cache
def named_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.as_tensor(reference_tensor(name, shape))


def randomize(model: nn.Module) -> nn.Module:
    """Fill every tensor, statistics and affine parameters of norms too, with numbers drawn from its name."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(named_tensor(name, tuple(tensor.shape)))
    return model


@torch.no_grad()
def settle(backbone: ReparamBackbone, images: Tensor) -> None:
    """Give norms constants that count, and the statistics of these images."""
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.momentum = 1.0
        norm.train()
    backbone(images)
    backbone.eval()


def normalize(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """What a norm with frozen statistics computes."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def fuse_as_owners(network: ReparamBackbone) -> ReparamBackbone:
    """Fuse what the owners' code fuses."""
    left = family_of(type(network)).owners_leave
    return switch_to_deploy(network, [block for block in reparam_blocks(network) if not isinstance(block, left)])


class Operations(TorchDispatchMode):
    """Names of the operations within its context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of ``expected``, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def largest_error(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative error in a tuple of maps; not a number if there is one anywhere."""
    return np.max([relative_error(a, b) for a, b in zip(actual, expected, strict=True)])
