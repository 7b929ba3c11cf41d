"""What is MobileOne's own. What it shares with every backbone is in ``test_backbone.py``."""

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, normalize, randomize, relative_error
from torch import Tensor, nn

from repvit_mm import MobileOne
from repvit_mm.layers import SqueezeExcite
from repvit_mm.mobileone import Block
from repvit_mm.reparam import plain_formulation

_, ARCH = SMALL['mobileone']


def branches(x: Tensor, block: nn.Module, stride: int = 1) -> Tensor:
    """The sum of a block's branches, written out."""
    size, groups = block.convs[0].conv.kernel_size[0], block.convs[0].conv.groups
    y = sum(normalize(F.conv2d(x, b.conv.weight, None, stride, size // 2, 1, groups), b.bn) for b in block.convs)
    if block.scale is not None:
        y = y + normalize(F.conv2d(x, block.scale.conv.weight, None, stride, 0, 1, groups), block.scale.bn)
    return y if block.skip is None else y + normalize(x, block.skip)


@pytest.mark.parametrize(('channels', 'stride'), [((6, 6), 1), ((6, 8), 2)])
@pytest.mark.parametrize('with_se', [False, True])
def test_block_is_branches_then_gate_then_relu_twice(channels, stride, with_se):
    block = randomize(Block(*channels, stride, num_convs=2, with_se=with_se).double()).eval()
    x = torch.randn(2, 6, 9, 7).double()
    expected = x
    for layer, step in ((block.depthwise, stride), (block.pointwise, 1)):
        expected = branches(expected, layer.conv, step)
        if with_se:
            hidden = layer.se.fc1(expected.mean((2, 3), keepdim=True)).clamp(min=0)
            expected = expected * torch.sigmoid(layer.se.fc2(hidden))
        expected = expected.clamp(min=0)
    assert relative_error(block(x), expected) < 1e-12
    with plain_formulation(block):
        assert relative_error(block(x), expected) < 1e-12


def test_stem_and_every_stage_halve_the_map():
    network, strides = MobileOne(ARCH).eval(), []
    for module in (network.stem, *network.stages):
        module.register_forward_hook(lambda module, args, y: strides.append(96 // y.shape[-1]))
    network(torch.randn(1, 3, 64, 96))
    assert strides == [2, 4, 8, 16, 32]


def test_squeeze_excite_sits_at_the_ends_of_stages_and_has_a_sixteenth_of_the_width():
    with torch.device('meta'):
        network = MobileOne('s4')
    layers = {name: module for name, module in network.named_modules() if isinstance(module, SqueezeExcite)}
    blocks = [f'stages.2.{position}' for position in range(5, 10)] + ['stages.3.0']
    assert list(layers) == [f'{block}.{part}.se' for block in blocks for part in ('depthwise', 'pointwise')]
    assert all(16 * layer.fc1.out_channels == layer.fc1.in_channels for layer in layers.values())


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(arch='s5'), ["arch='s5'", "nearest is 's"]),
        (dict(arch='mobileone_s1'), ['arch=', "nearest is 's1'"]),
        (dict(tap='pre_downsample'), ['tap=', 'expected one of stage_end']),
        (dict(arch=dict(ARCH, se_depths=(0, 2, 0, 0))), ['se_depths=(0, 2, 0, 0)', 'depths=(2, 1, 3, 1)']),
        (dict(drop_path_rate=0.1), ['drop_path_rate=0.1: expected 0, MobileOne has no residual branches to drop']),
    ],
    ids=str,
)
def test_bad_argument(options, words):
    with pytest.raises(ValueError) as raised:
        MobileOne(**options)
    assert all(word in str(raised.value) for word in words)
    assert '\n' not in str(raised.value)


def test_frozen_training_keeps_one_map_of_a_block_without_a_gate():
    """Its output, from the last ReLU; the next block's input is the same."""
    network = randomize(MobileOne(dict(ARCH, se_depths=(0, 0, 0, 0)), norm_eval=True)).train()
    x = torch.randn(1, 3, 64, 96)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}

    def kept() -> list[tuple[int, ...]]:
        """The shapes of all distinct maps that are kept."""
        storages = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.shape[0] == 1 and tensor.dim() == 4 and tensor.untyped_storage().data_ptr() not in own:
                storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            maps = network(x)
        assert all(m.requires_grad for m in maps)
        return [tuple(tensor.shape[1:]) for tensor in storages.values()]

    outputs = [(3, 64, 96)]
    for block in (network.stem, *(block for stage in network.stages for block in stage)):
        block.register_forward_hook(lambda block, args, y: outputs.append(tuple(y.shape[1:])))
    found = kept()
    assert sorted(found) == sorted(outputs)
    with plain_formulation(network):
        assert len(kept()) > 5 * len(found)
