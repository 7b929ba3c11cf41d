"""What is FastViT's own. What it shares with every backbone is in ``test_backbone.py``."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDENS, SMALL, image, largest_error, normalize, randomize, relative_error
from torch import Tensor, nn

from repvit_mm import FastViT, switch_to_deploy
from repvit_mm.checkpoint import CheckpointError
from repvit_mm.fastvit import Attention, ConvFFN, RepMixer
from repvit_mm.specs import FASTVIT_SPECS

_, ARCH = SMALL['fastvit']


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 96)


def test_rep_mixer_subtracts_the_normalized_map():
    mixer = randomize(RepMixer(6, layer_scale=1e-5).double()).eval()
    x = torch.randn(2, 6, 9, 7).double()
    expected = x + mixer.layer_scale * (mixer.mixer(x) - normalize(x, mixer.norm))
    assert relative_error(mixer(x), expected) < 1e-12
    conv = mixer.to_conv()
    assert (conv.kernel_size, conv.groups) == ((3, 3), 6)
    assert relative_error(conv(x), expected) < 1e-12


class TestAttention:
    def test_is_softmax_attention_in_heads_of_32_channels(self):
        attention = randomize(Attention(64, layer_scale=1e-5, drop_path_rate=0.0).double()).eval()
        x = torch.randn(2, 64, 5, 3).double()
        tokens = normalize(x, attention.qkv.norm).flatten(2).mT
        query, key, value = (tokens @ attention.qkv.linear.weight.T).chunk(3, dim=-1)
        mixed = []
        for head in range(2):
            part = slice(32 * head, 32 * head + 32)
            weights = (query[..., part] @ key[..., part].mT / 32**0.5).softmax(-1)
            mixed.append(weights @ value[..., part])
        projected = F.linear(torch.cat(mixed, -1), attention.project.layer.weight, attention.project.layer.bias)
        expected = x + attention.project.layer_scale * projected.mT.unflatten(2, (5, 3))
        assert relative_error(attention(x), expected) < 1e-12
        assert relative_error(switch_to_deploy(copy.deepcopy(attention))(x), expected) < 1e-12

    @pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize('frozen', [False, True])
    def test_keeps_no_buffer_that_grows_with_the_square_of_the_map(self, frozen, memory_format):
        """The last stage's map of an image of 800 x 1344."""
        attention = Attention(32, layer_scale=1e-5, drop_path_rate=0.0).train(not frozen)
        x = torch.randn(1, 32, 25, 42).to(memory_format=memory_format)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            y = attention(x)
        y.sum().backward()
        assert max(sizes) <= 3 * x.numel() < (25 * 42) ** 2


def test_feed_forward_is_its_four_named_steps():
    ffn = randomize(ConvFFN(8, 24, layer_scale=1e-5, drop_path_rate=0.0).double()).eval()
    assert [name for name, _ in ffn.named_children()] == ['depthwise', 'expand', 'act', 'project', 'drop_path']
    x = torch.randn(2, 8, 9, 7).double()
    y = normalize(F.conv2d(x, ffn.depthwise.conv.weight, padding=3, groups=8), ffn.depthwise.bn)
    y = F.gelu(F.conv2d(y, ffn.expand.weight, ffn.expand.bias))
    y = F.conv2d(y, ffn.project.layer.weight, ffn.project.layer.bias) * ffn.project.layer_scale
    assert relative_error(ffn(x), x + y) < 1e-12


@pytest.mark.parametrize('arch', FASTVIT_SPECS)
def test_residuals_start_with_the_layer_scale_of_their_variant(arch):
    with torch.device('meta'):
        network = FastViT(arch)
    spec = network.spec
    scales = {name: p for name, p in network.named_parameters() if name.endswith('layer_scale')}
    assert len(scales) == 2 * sum(spec.depths)
    assert all(p.shape[1:] == (1, 1) for p in scales.values())
    small = FastViT(dict(ARCH, layer_scale=spec.layer_scale))
    values = torch.cat([p.flatten() for name, p in small.named_parameters() if name.endswith('layer_scale')])
    assert torch.equal(values.unique(), torch.tensor([1e-6 if arch in ('sa36', 'ma36') else 1e-5]))


@pytest.mark.parametrize('attention', [False, True])
def test_last_stage_alone_has_attention_and_its_position_encoding(attention):
    network = FastViT(dict(ARCH, attention=attention))
    mixers = [[type(block.token_mixer) for block in stage if hasattr(block, 'token_mixer')] for stage in network.stages]
    last = Attention if attention else RepMixer
    assert mixers == [[RepMixer] * 2, [RepMixer], [RepMixer] * 3, [last] * 2]
    encoded = [getattr(stage[0], 'position', None) is not None for stage in network.stages]
    assert encoded == [False, False, False, attention]


@pytest.mark.parametrize('deploy', [False, True])
@torch.no_grad()
def test_last_map_lies_behind_the_attention(deploy):
    """Twin: the map that the authors' dense code returns, behind the position encoding, is another one."""
    golden = next(golden for golden in GOLDENS if golden.name == 'fastvit_sa12')
    network = FastViT('sa12', deploy=deploy).eval()
    network.load_state_dict(golden.state_dict())
    kept = []
    network.stages[3][0].register_forward_hook(lambda module, args, output: kept.append(output))
    expected = golden.maps('stage_end')[3]
    assert relative_error(network(image())[3], expected) < 1e-5
    assert relative_error(kept[0], expected) > 0.1


class TestOutNorm:
    def build(self, **options) -> FastViT:
        return randomize(FastViT(ARCH, out_norm=True, **options))

    @pytest.mark.parametrize('deploy', [False, True])
    @pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 3)], ids=str)
    def test_is_a_norm_behind_each_map(self, x, out_indices, deploy):
        network = self.build(out_indices=out_indices, deploy=deploy).eval()
        plain = FastViT(ARCH, out_indices=out_indices, deploy=deploy).eval()
        plain.load_state_dict({n: t for n, t in network.state_dict().items() if not n.startswith('out_norms.')})
        norms = network.out_norms.values()
        expected = tuple(normalize(m, norm) for m, norm in zip(plain(x), norms, strict=True))
        assert largest_error(network(x), expected) < 1e-6
        assert network.out_channels == tuple(norm.num_features for norm in norms)

    def test_is_not_fused(self, x):
        network = self.build().eval()
        expected = network(x)
        switch_to_deploy(network)
        assert network.deployed
        left = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
        assert left == [f'out_norms.{i}' for i in range(4)]
        assert largest_error(network(x), expected) < 1e-5

    def test_starts_fresh_where_a_file_has_none(self, x, log):
        weights = randomize(FastViT(ARCH)).state_dict()
        for deploy in (False, True):
            network = FastViT(ARCH, out_norm=True, deploy=deploy)
            randomize(network.out_norms)  # a network may have norms of its own already
            fresh = {name: tensor.clone() for name, tensor in network.out_norms.state_dict().items()}
            log.clear()
            network.load_state_dict(weights, strict=True)
            assert f'{len(weights)}/{len(weights) + 20} backbone tensors loaded' in log[0]
            assert '; 20 start fresh (out_norms.0.weight, ...)' in log[0]
            assert all(torch.equal(tensor, fresh[n]) for n, tensor in network.out_norms.state_dict().items())

    @pytest.mark.parametrize('options', [{}, {'deploy': True}, {'out_indices': (1, 2)}], ids=str)
    def test_loads_where_a_file_has_some(self, x, options):
        network = self.build().eval()
        other = FastViT(ARCH, out_norm=True, **options).eval()
        weights = network.state_dict()
        authors = network.naming.translate(weights, 'authors')
        assert {'norm0.weight', 'norm2.weight', 'norm4.weight', 'norm6.weight'} <= set(authors.values())
        for tensors in (weights, {authors[name]: tensor for name, tensor in weights.items()}):
            for tensor in other.state_dict().values():
                tensor.zero_()
            other.load_state_dict(tensors, strict=True)
            maps = network(x)
            assert largest_error(other(x), tuple(maps[i] for i in other.out_indices)) < 1e-5

    @pytest.mark.parametrize('deploy', [False, True])
    def test_is_refused_by_a_network_without(self, deploy):
        network = FastViT(ARCH, deploy=deploy)
        with pytest.raises(CheckpointError, match='it has output norms: set out_norm=True or take another file'):
            network.load_state_dict(self.build().state_dict(), strict=False)

    def test_incomplete_ones_are_refused(self):
        weights = self.build().state_dict()
        del weights['out_norms.2.weight']
        with pytest.raises(CheckpointError, match=r'missing: 1 \(out_norms\.2\.weight\)'):
            self.build().load_state_dict(weights, strict=False)

    @pytest.mark.parametrize('name', ['out_norms.4.weight', 'out_norms', 'x'])
    def test_unknown_tensors_are_refused(self, name):
        network = self.build(out_indices=(1, 2))
        with pytest.raises(CheckpointError, match=rf'unexplained: 1 \({name}\)'):
            network.load_state_dict({**network.state_dict(), name: torch.zeros(1)})

    def test_learns_with_every_stage_frozen(self, x):
        network = self.build(frozen_stages=4).train()
        assert all(norm.training for norm in network.out_norms.values())
        sum(m.square().mean() for m in network(x)).backward()
        learning = [name for name, parameter in network.named_parameters() if parameter.grad is not None]
        assert learning == [f'out_norms.{i}.{part}' for i in range(4) for part in ('weight', 'bias')]
        network = self.build(norm_eval=True).train()
        assert not any(norm.training for norm in network.out_norms.values())
