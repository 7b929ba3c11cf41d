"""What several test files share. A further backbone joins the whole suite by its rows in the three tables here."""

import json
import runpy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from repvit_mm import FastViT, RepViT, switch_to_deploy
from repvit_mm.backbone import ReparamBackbone
from repvit_mm.fastvit import LargeKernelConv, MobileOneBlock, PositionEncoding, RepMixer
from repvit_mm.layers import ChannelLinear, ConvBN, LayerScale, NormLinear
from repvit_mm.reparam import reparam_blocks
from repvit_mm.repvit import TokenMixer

DATA = Path(__file__).parent / 'data'
HEADS = ('classifier.', 'head.', 'conv_exp.', 'final_conv.')
STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')

reference_tensor = runpy.run_path(str(DATA / 'reference_weights.py'))['reference_tensor']


@dataclass(frozen=True)
class Golden:
    """A network of others that one of ours must reproduce.

    Args:
        name: Name of its files in ``data/``.
        backbone: Our class.
        arch: Our name of the variant.
        taps: Our tap -> what the maps of stages 1 to 3 are called in the file. That of stage 4 is always ``stage4``.
    """

    name: str
    backbone: type
    arch: str
    taps: dict[str, str]

    @property
    def facts(self) -> dict:
        return json.loads((DATA / f'{self.name}.keys.json').read_text())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, classification heads included."""
        return {name: tuple(shape) for name, shape in self.facts['keys'].items()}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: torch.as_tensor(reference_tensor(name, shape)) for name, shape in self.shapes.items()}

    def maps(self, tap: str) -> list[Tensor]:
        with np.load(DATA / f'{self.name}.npz') as maps:
            return [torch.from_numpy(maps[name]) for name in (*(f'{self.taps[tap]}{i}' for i in (1, 2, 3)), 'stage4')]


GOLDENS = [
    *(
        Golden(f'repvit_{arch}', RepViT, arch, {'stage_end': 'stage', 'pre_downsample': 'pre_downsample'})
        for arch in ('m0_6', 'm0_9', 'm1_0', 'm1_1', 'm1_5', 'm2_3')
    ),
    *(
        Golden(f'timm_repvit_{arch}', RepViT, arch, {'pre_downsample': 'stage'})
        for arch in ('m1', 'm2', 'm3', 'm0_9', 'm1_1')
    ),
    *(
        Golden(f'fastvit_{arch}', FastViT, arch, {'stage_end': 'stage'})
        for arch in ('t8', 't12', 's12', 'sa12', 'sa24', 'sa36', 'ma36')
    ),
    *(Golden(f'timm_fastvit_{arch}', FastViT, arch, {'stage_end': 'stage'}) for arch in ('t8', 'sa12')),
]

# Of each family one network of the authors and one of timm.
ENDS = [
    next(g for g in goldens if g.backbone is cls) for cls in (RepViT, FastViT) for goldens in (GOLDENS, GOLDENS[::-1])
]

# Small networks with every kind of block, for tests that run many of them.
SMALL = {
    'repvit': (RepViT, dict(channels=(8, 16, 24, 32), depths=(2, 1, 3, 1))),
    'repvit_v1': (RepViT, dict(channels=(8, 16, 24, 32), depths=(2, 1, 3, 1), norm_after_sum=False)),
    'fastvit': (FastViT, dict(channels=(8, 16, 32, 64), depths=(2, 1, 3, 2), mlp_ratio=2, attention=True)),
}

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


def fuse_as_owners(network: ReparamBackbone) -> ReparamBackbone:
    """Fuse what the owners' code fuses: of FastViT neither norms and layer scales of attention nor those of ConvFFN."""
    beyond = (ConvBN, NormLinear, LayerScale) if isinstance(network, FastViT) else ()
    return switch_to_deploy(network, [block for block in reparam_blocks(network) if not isinstance(block, beyond)])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of ``expected``, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def largest_error(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative error in a tuple of maps; not a number if there is one anywhere."""
    return np.max([relative_error(a, b) for a, b in zip(actual, expected, strict=True)])
