"""Fusing, folding and renaming, for blocks and networks of every shape with norms of every kind."""

import copy
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from helpers import since
from hypothesis import HealthCheck
from hypothesis import strategies as st
from torch import Tensor, nn

from repvit_mm import FastViT, MobileOne, RepViT, switch_to_deploy
from repvit_mm.backbone import ReparamBackbone
from repvit_mm.fastvit import LargeKernelConv, PositionEncoding, RepMixer
from repvit_mm.layers import ChannelLinear, ConvBN, LayerScale, MobileOneBlock, NormLinear, dilate
from repvit_mm.reparam import ReparamBlock, plain_formulation, reparam_blocks
from repvit_mm.repvit import TokenMixer

small = st.integers(1, 4)
odd = st.sampled_from([1, 3, 5, 7])


def counts(few: int, many: int) -> pytest.MarkDecorator:
    """How many examples an ordinary run tries, and a long one."""
    return pytest.mark.parametrize('count', [few, pytest.param(many, marks=pytest.mark.torture)])


@pytest.fixture
def explore(tried: Callable[[], None], torture_seed: int) -> Callable[..., None]:
    """Tries a property on as many examples of a strategy as asked for; a failing example is printed."""

    def explore(holds: Callable[[Any], None], examples: st.SearchStrategy, count: int) -> None:
        @hypothesis.seed(torture_seed)
        @hypothesis.settings(
            max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
        )
        @hypothesis.given(examples)
        def hold(example: Any) -> None:
            tried()
            holds(example)

        hold()

    return explore


@st.composite
def blocks(draw: st.DrawFn) -> tuple[ReparamBlock, int]:
    """A block of any kind, width, kernel size, stride, grouping and dilation, and the channels of its input."""
    kind = draw(
        st.sampled_from(['conv', 'mobile_one', 'token_mixer', 'rep_mixer', 'large', 'encoding', 'norm', 'scale'])
    )
    groups, ins, outs = draw(small), draw(small), draw(small)
    into, out, stride = groups * ins, groups * outs, draw(st.integers(1, 2))
    if kind == 'conv':
        block = ConvBN(into, out, draw(odd), stride, groups)
    elif kind == 'mobile_one':
        block = MobileOneBlock(into, draw(st.sampled_from([into, out])), draw(odd), stride, groups, draw(small))
    elif kind == 'token_mixer':
        block = TokenMixer(into, draw(st.booleans()))
    elif kind == 'rep_mixer':
        block = RepMixer(into, draw(st.floats(1e-6, 1)))
    elif kind == 'large':
        block = LargeKernelConv(into, into * outs)
    elif kind == 'encoding':
        block = PositionEncoding(into)
    elif kind == 'norm':
        block = NormLinear(into, out, draw(st.booleans()))
    else:
        layer = draw(st.sampled_from([ChannelLinear, lambda i, o: nn.Conv2d(i, o, 1)]))
        block = LayerScale(layer(into, out), out, draw(st.floats(1e-6, 1)))
    if block.padding and draw(st.booleans()):
        dilate(block, *draw(st.sampled_from([(1, 2), (2, 4), (2, 3)])))
    return block, into


@st.composite
def networks(draw: st.DrawFn, full: bool = False) -> ReparamBackbone:
    """A small network of any family and spec, with any taps; a full one has all that released files have."""
    family = draw(st.sampled_from([RepViT, FastViT, MobileOne]))
    depths = draw(st.lists(st.integers(1, 3), min_size=4, max_size=4))
    if family is FastViT:
        channels = [8, 8 * draw(st.integers(1, 2)), 32, 32 * draw(st.integers(1, 2))]
        spec = dict(mlp_ratio=draw(small), attention=draw(st.booleans()), layer_scale=draw(st.floats(1e-6, 1)))
    elif family is RepViT:
        channels = [2 * draw(small), *draw(st.lists(st.integers(1, 24), min_size=3, max_size=3))]
        spec = dict(norm_after_sum=draw(st.booleans()))
    else:
        channels = draw(st.lists(st.integers(1, 24), min_size=4, max_size=4))
        spec = dict(num_convs=draw(small), se_depths=[draw(st.integers(0, depth)) for depth in depths])
    options: dict[str, Any] = {}
    if not full:
        options = dict(
            out_indices=sorted(draw(st.sets(st.integers(0, 3), min_size=1))),
            tap=draw(st.sampled_from(list(family.taps))) if depths[0] > 1 else 'stage_end',
            output_stride=draw(st.sampled_from([8, 16, 32])),
            channels_last=draw(st.booleans()),
        )
    return family(dict(channels=channels, depths=depths, **spec), **options)


@torch.no_grad()
def settle(module: nn.Module, extreme: bool, seed: int) -> nn.Module:
    """Draw all tensors; where ``extreme``, variances down to 1e-12, and weights of norms that are zero or negative."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith('running_var'):
            tensor.uniform_(-12 if extreme else -1, 1, generator=generator).copy_(10**tensor)
        elif extreme and tensor.ndim == 1 and name.endswith('weight'):
            tensor.copy_(torch.randint(-2, 3, tensor.shape, generator=generator))
        else:
            tensor.normal_(std=0.5 / max(tensor[0].numel(), 1) ** 0.5, generator=generator)
    return module.eval()


def distance(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference relative to ``expected``; of a map of zeros, to one."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / (expected.double().norm() or 1)).item()


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the input and of every parameter that has one."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    outputs = module(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    sum((y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in outputs).backward()
    return {'input': x.grad} | {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def check_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Compare all gradients. Of a parameter that nothing depends on, one side has a rounding error of the largest."""
    assert found.keys() == wanted.keys()
    largest = max(gradient.norm().item() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= tolerance * (gradient.norm() + 0.01 * largest), name


sizes = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40))
seeds = st.integers(0, 10**6)


@counts(20, 500)
def test_block_equals_its_branches_folded_and_fused(explore, count):
    def holds(example: tuple) -> None:
        (block, channels), (batch, height, width), extreme, seed = example
        block = settle(block.double(), extreme, seed)
        x = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed)).double()
        with plain_formulation(block):
            expected, wanted = block(x), gradients(block, x)
        assert distance(block(x), expected) < 1e-8
        check_gradients(gradients(block, x), wanted, 1e-8)
        assert distance(switch_to_deploy(nn.Sequential(block))(x), expected) < 1e-8

    explore(holds, st.tuples(blocks(), sizes, st.booleans(), seeds), count)


@counts(15, 150)
def test_network_equals_its_branches_folded_and_fused(explore, count):
    formats = st.sampled_from([torch.contiguous_format, torch.channels_last])

    def holds(example: tuple) -> None:
        network, (batch, height, width), extreme, seed, layout = example
        network = settle(network.double(), extreme, seed)
        x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)).double()
        x = x.contiguous(memory_format=layout)
        with torch.no_grad():
            with plain_formulation(network):
                expected = network(x)
            folded = network(x)
            fused = switch_to_deploy(copy.deepcopy(network))(x)
        for maps in (folded, fused):
            assert all(distance(*pair) < 1e-7 for pair in zip(maps, expected, strict=True))
        if not extreme:
            network.train()
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
            with plain_formulation(network):
                wanted = gradients(network, x)
            check_gradients(gradients(network, x), wanted, 1e-7)

    explore(holds, st.tuples(networks(), sizes, st.booleans(), seeds, formats), count)


@counts(10, 75)
def test_lower_precision_is_as_near_to_the_truth_fused_as_it_is_branch_by_branch(explore, count):
    lower = [torch.bfloat16, *([torch.float16] if since('2.6') else [])]  # older ones have no such convolution
    dtypes = st.sampled_from([torch.float32, *lower])

    def holds(example: tuple) -> None:
        network, (batch, height, width), seed, dtype = example
        settle(network, False, seed)
        x = torch.randn(batch, 3, height + 31, width + 31, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), plain_formulation(network):
            truth = copy.deepcopy(network).double()(x.double())
            rough = copy.deepcopy(network).to(dtype)(x.to(dtype))
        with torch.no_grad():
            folded = copy.deepcopy(network).to(dtype)(x.to(dtype))
            fused = switch_to_deploy(copy.deepcopy(network)).to(dtype)(x.to(dtype))
        for maps in (folded, fused):
            for found, branches, true in zip(maps, rough, truth, strict=True):
                assert found.dtype is dtype
                assert distance(found, true) <= 3 * distance(branches, true) + 4 * torch.finfo(dtype).eps

    explore(holds, st.tuples(networks(), sizes, seeds, dtypes), count)


@counts(10, 75)
def test_names_of_others_lead_there_and_back(explore, count):
    """Unfused and fused; a network loads its own tensors under each of the names."""

    def holds(example: tuple) -> None:
        network, deploy, seed = example
        settle(network, False, seed)
        if deploy:
            blocks = reparam_blocks(network)
            named = {name: module for name, module in network.named_modules() if module in blocks}
            shared = network.naming.shared_blocks(network.state_dict(), named)
            switch_to_deploy(network, [named[name] for name in shared])
        tensors = network.state_dict()
        for whose in ('authors', 'timm'):
            names = network.naming.translate(tensors, whose)
            assert None not in names.values() and len(set(names.values())) == len(names)
            theirs = {names[name]: tensor for name, tensor in tensors.items()}
            back = network.naming.translate(theirs)
            assert [back[names[name]] for name in tensors] == list(tensors)
            target = copy.deepcopy(network)
            for tensor in target.state_dict().values():
                tensor.zero_()
            target.load_state_dict(theirs)
            assert all(torch.equal(tensors[name], tensor) for name, tensor in target.state_dict().items())

    explore(holds, st.tuples(networks(full=True), st.booleans(), seeds), count)
