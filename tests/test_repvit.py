"""What is RepViT's own. What it shares with every backbone is in ``test_backbone.py``."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDENS, normalize, randomize, relative_error

import repvit_mm.repvit
from repvit_mm import RepViT
from repvit_mm.layers import SqueezeExcite
from repvit_mm.reparam import KernelSum, plain_formulation
from repvit_mm.repvit import ChannelMixer, TokenMixer


@pytest.mark.parametrize('norm_after_sum', [True, False], ids=['cvpr', 'arxiv_v1'])
def test_token_mixer_is_the_sum_of_its_three_branches(norm_after_sum):
    mixer = randomize(TokenMixer(6, norm_after_sum).double()).eval()
    x = torch.randn(2, 6, 9, 7).double()
    large = normalize(F.conv2d(x, mixer.conv3x3.conv.weight, padding=1, groups=6), mixer.conv3x3.bn)
    if norm_after_sum:
        small = F.conv2d(x, mixer.conv1x1.weight, mixer.conv1x1.bias, groups=6)
        expected = normalize(large + small + x, mixer.bn)
    else:
        small = normalize(F.conv2d(x, mixer.conv1x1.conv.weight, groups=6), mixer.conv1x1.bn)
        expected = large + small + x
    assert relative_error(mixer(x), expected) < 1e-12
    with plain_formulation(mixer):
        assert relative_error(mixer(x), expected) < 1e-12


@pytest.mark.parametrize('norm_after_sum', [True, False], ids=['cvpr', 'arxiv_v1'])
def test_token_mixer_without_its_identity_is_noticed(norm_after_sum, monkeypatch):
    """Twin: an equivalent kernel that forgets the identity is not the branches' sum."""
    mixer = randomize(TokenMixer(6, norm_after_sum).double()).eval()
    x = torch.randn(2, 6, 9, 7).double()
    with plain_formulation(mixer):
        expected = mixer(x)
    monkeypatch.setattr(repvit_mm.repvit, 'identity_kernel', lambda: KernelSum(()))
    assert relative_error(mixer(x), expected) > 0.1
    assert relative_error(mixer.to_conv()(x), expected) > 0.1


def test_channel_mixer_starts_as_nothing():
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(ChannelMixer(8, drop_path_rate=0.0)(x), x)


def test_channel_mixer_drops_its_branch_for_whole_images():
    mixer = randomize(ChannelMixer(8, drop_path_rate=0.5)).eval()
    x = torch.randn(64, 8, 3, 3)
    branch = mixer(x) - x
    mixer.drop_path.train()
    dropped = mixer(x) - x
    kept = dropped.flatten(1).norm(dim=1) > 0
    assert 0 < kept.sum() < 64
    assert relative_error(dropped[kept], 2 * branch[kept]) < 1e-5


@pytest.mark.parametrize(
    'golden', [golden for golden in GOLDENS if 'stage_end_blocks' in golden.facts], ids=lambda g: g.name
)
def test_stages_end_where_the_authors_blocks_do(golden):
    """Their flat list starts with the stem as block 0."""
    network = golden.backbone(golden.arch)
    ends = list(itertools.accumulate(len(stage) for stage in network.stages))
    assert ends == golden.facts['stage_end_blocks']
    offset = network.taps['pre_downsample']
    assert [*(end - offset for end in ends[:3]), ends[3]] == golden.facts['detection_tap_blocks']


def test_squeeze_excite_sits_on_every_other_block_and_on_none_before_a_downsample():
    network = RepViT(dict(channels=(8, 16, 24, 32), depths=(3, 4, 5, 3)))
    found = [[getattr(block, 'se', None) is not None for block in stage] for stage in network.stages]
    assert found == [
        [True, False, False],
        [False, True, False, True, False],
        [False, True, False, True, False, False],
        [False, True, False, True],
    ]


@pytest.mark.parametrize(
    ('channels', 'hidden'), [(8, 8), (40, 8), (48, 16), (80, 24), (112, 32), (448, 112), (640, 160)]
)
def test_squeeze_excite_has_a_quarter_of_the_width(channels, hidden):
    network = RepViT(dict(channels=(channels, 8, 8, 8), depths=(2, 1, 1, 1)), out_indices=(0,))
    layers = [module for module in network.modules() if isinstance(module, SqueezeExcite)]
    assert [layer.fc1.out_channels for layer in layers] == [hidden]


@pytest.mark.parametrize('out_indices', [(0,), (0, 1, 2, 3)], ids=str)
def test_tap_in_front_of_a_lone_block_is_refused(out_indices):
    """A first stage of one block has none before its end: its map must not be lost in silence."""
    arch = dict(channels=(8, 16, 24, 32), depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="tap='pre_downsample'"):
        RepViT(arch, out_indices=out_indices, tap='pre_downsample')
    assert len(RepViT(arch, out_indices=(1, 2, 3), tap='pre_downsample').eval()(torch.randn(1, 3, 32, 32))) == 3


def test_frozen_training_keeps_less_than_two_fifths_of_the_branches_maps():
    network, x = RepViT('m1_1', norm_eval=True).train(), torch.randn(2, 3, 320, 320)

    def kept_bytes() -> int:
        storages = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            maps = network(x)
        assert all(m.requires_grad for m in maps)
        return sum(storages.values())

    with plain_formulation(network):
        plain = kept_bytes()
    assert plain > 2.5 * kept_bytes()
