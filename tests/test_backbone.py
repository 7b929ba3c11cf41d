"""What every backbone of the package must do. A further one joins by its rows in ``helpers.py``."""

import copy
import io
import itertools
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers import (
    ENDS,
    FAMILIES,
    GOLDENS,
    HEADS,
    SMALL,
    STATISTICS,
    Golden,
    Operations,
    family_of,
    image,
    largest_error,
    randomize,
    relative_error,
    since,
    since_torch,
    slow_but,
)
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from programs import PROCESSES
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing import start_processes
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

import repvit_mm.backbone
import repvit_mm.reparam
from repvit_mm import FastViT, RepViT, switch_to_deploy
from repvit_mm.backbone import ReparamBackbone, check_channels, options_of
from repvit_mm.checkpoint import CheckpointError
from repvit_mm.compat.pytorch import plain_attention
from repvit_mm.layers import SqueezeExcite, StochasticDepth
from repvit_mm.reparam import (
    Kernel,
    ReparamBlock,
    equivalent_kernels,
    plain_formulation,
    reparam_blocks,
)

DEEPER = next(golden for golden in GOLDENS if golden.arch == 't12')
FIRST_GOLDENS = list({golden.backbone: golden for golden in reversed(GOLDENS)}.values())
# Those of the small networks that have stochastic depth.
RESIDUAL = [name for name, (cls, _) in SMALL.items() if family_of(cls).residual]
SUBSETS = slow_but(
    [(0,), (3,), (0, 2), (1, 2, 3)],
    [subset for size in range(1, 5) for subset in itertools.combinations(range(4), size)],
)


def norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith(STATISTICS)}


def total(maps: tuple[Tensor, ...]) -> Tensor:
    """A number that depends on every element of every map."""
    return sum(m.square().mean() for m in maps)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 96)


@pytest.fixture(scope='module', params=slow_but(ENDS, GOLDENS))
def golden(request: pytest.FixtureRequest) -> Golden:
    return request.param


@pytest.fixture(scope='module')
def weights(golden: Golden) -> dict[str, Tensor]:
    """The reference's state dict, under the reference's names."""
    return golden.state_dict()


@pytest.fixture(scope='module')
def networks(golden: Golden, weights: dict[str, Tensor]) -> dict[str, ReparamBackbone]:
    """One network for each tap, float64, loaded with the reference's state dict."""
    networks = {}
    for tap in golden.taps:
        networks[tap] = golden.backbone(golden.arch, tap=tap).double().eval()
        networks[tap].load_state_dict(weights, strict=True)
    return networks


class TestGolden:
    """Against what the authors' and timm's code computed, from weights under their names."""

    @torch.no_grad()
    def test_outputs(self, golden, networks):
        x = image()
        for tap, network in networks.items():
            expected = golden.maps(tap)
            with plain_formulation(network):
                assert largest_error(network(x.double()), expected) < 1e-7
            single = copy.deepcopy(network).float()
            assert largest_error(single(x), expected) < 1e-5
            assert largest_error(switch_to_deploy(single)(x), expected) < 1e-5

    @torch.no_grad()
    def test_fused_network_is_the_same_function(self, networks):
        network, x = next(iter(networks.values())), image().double()
        with plain_formulation(network):
            expected = network(x)
        assert largest_error(network(x), expected) < 1e-9
        assert largest_error(switch_to_deploy(copy.deepcopy(network))(x), expected) < 1e-9

    def test_parameter_count(self, golden, networks):
        learned = [
            math.prod(shape)
            for name, shape in golden.shapes.items()
            if not name.startswith(HEADS) and not name.endswith(STATISTICS)
        ]
        count = sum(parameter.numel() for parameter in next(iter(networks.values())).parameters())
        assert count == sum(learned) == golden.facts.get('backbone_params', count)

    def test_wrong_checkpoint_is_not_taken_in_silence(self, golden, networks, weights):
        network = next(iter(networks.values()))
        learned = [name for name in weights if not name.startswith(HEADS) and not name.endswith(STATISTICS)]
        for name in (learned[0], learned[-1]):
            wrong = {
                'missing: 1': {key: tensor for key, tensor in weights.items() if key != name},
                'unexplained: 1': {**weights, f'{name}_': weights[name]},
                'of another shape: 1': {**weights, name: torch.zeros(5, 5, 5)},
            }
            for message, tensors in wrong.items():
                for strict in (True, False):
                    with pytest.raises(CheckpointError, match=message):
                        network.load_state_dict(tensors, strict=strict)


class TestMaps:
    """Shapes, taps, and what is built for them."""

    @pytest.mark.parametrize('size', [(32, 32), (33, 47), (64, 96), (75, 101)], ids=str)
    @pytest.mark.parametrize('deploy', [False, True], ids=['unfused', 'fused'])
    def test_strides_and_channels(self, build, size, deploy):
        network = build(deploy=deploy).eval()
        maps = network(torch.randn(2, 3, *size))
        widths = dict(zip((4, 8, 16, 32), network.spec.channels, strict=True))
        assert [m.shape for m in maps] == [(2, c, *(math.ceil(side / s) for side in size)) for s, c in widths.items()]
        assert network.out_channels == tuple(widths.values())

    @pytest.mark.parametrize('out_indices', SUBSETS)
    def test_some_maps_are_those_of_the_whole(self, build, out_indices, x, log):
        for tap in build().taps:
            whole = build(tap=tap).eval()
            part = build(tap=tap, out_indices=list(out_indices)).eval()
            for tensor in part.state_dict().values():
                tensor.zero_()
            log.clear()
            part.load_state_dict(whole.state_dict(), strict=True)
            aside = len(whole.state_dict()) - len(part.state_dict())
            assert part.out_channels == tuple(whole.out_channels[i] for i in out_indices)
            maps = whole(x)
            assert all(torch.equal(a, maps[i]) for a, i in zip(part(x), out_indices, strict=True))
            count = len(part.state_dict())
            assert len(log) == 1 and f' {count}/{count} backbone tensors loaded' in log[0]
            assert (f'; {aside} set aside (not built for out_indices={out_indices})' in log[0]) == (aside > 0)

    @pytest.mark.parametrize('out_indices', SUBSETS)
    def test_every_parameter_gets_a_gradient(self, build, out_indices, x):
        for tap in build().taps:
            network = build(tap=tap, out_indices=out_indices).train()
            total(network(x)).backward()
            assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []

    def test_taps_differ_but_for_the_last_stage(self, build, x):
        end, *others = (build(tap=tap).eval()(x) for tap in build().taps)
        for before in others:
            assert [torch.equal(a, b) for a, b in zip(end, before, strict=True)] == [False, False, False, True]

    @pytest.mark.parametrize('golden', FIRST_GOLDENS, ids=lambda golden: golden.name)
    def test_set_aside_head_is_logged_beside_unbuilt_stages(self, golden, log):
        network = golden.backbone(golden.arch, out_indices=(0, 1))
        network.load_state_dict(golden.state_dict(), strict=True)
        heads = sum(name.startswith(HEADS) for name in golden.shapes)
        unbuilt = len(golden.shapes) - heads - len(network.state_dict())
        assert len(log) == 1
        assert f'; {heads} set aside (classification head)' in log[0]
        assert f'; {unbuilt} set aside (not built for out_indices=(0, 1))' in log[0]

    def test_stages_beyond_those_of_the_variant_are_not_set_aside(self, build):
        network = build(out_indices=(0,))
        weights = network.state_dict()
        for name in ('stages.4.0.x', 'stages.1.99.x', 'stages.0.2.x', 'stages.0.x', 'stages.a.0.x', 'x'):
            with pytest.raises(CheckpointError, match=re.escape(f'unexplained: 1 ({name})')):
                network.load_state_dict({**weights, name: torch.zeros(1)}, strict=True)


class TestOutputStride:
    """Stages that keep their resolution and dilate their convolutions."""

    @pytest.mark.parametrize('output_stride', [8, 16, 32])
    @pytest.mark.parametrize('deploy', [False, True], ids=['unfused', 'fused'])
    def test_strides(self, build, output_stride, deploy):
        network = build(output_stride=output_stride, deploy=deploy).eval()
        strides = [min(s, output_stride) for s in (4, 8, 16, 32)]
        for size in ((64, 96), (75, 101)):
            maps = network(torch.randn(1, 3, *size))
            assert [m.shape[2:] for m in maps] == [tuple(math.ceil(side / s) for side in size) for s in strides]

    def test_weights_are_the_same(self, build):
        plain, dilated = build(), build(output_stride=8)
        dilated.load_state_dict(plain.state_dict(), strict=True)
        fused = build(output_stride=8, deploy=True)
        fused.load_state_dict(plain.state_dict(), strict=True)
        x = torch.randn(1, 3, 64, 96)
        assert largest_error(fused.eval()(x), dilated.eval()(x)) < 1e-5

    def every_other_place(self, name: str, output_stride: int) -> float:
        """How far a dilated network is, at the strided one's places, from the strided one."""
        cls, arch = SMALL[name]
        arch = {**arch, 'attention': False} if 'attention' in arch else arch
        plain, dilated = (randomize(cls(arch, output_stride=s).double()).eval() for s in (32, output_stride))
        x = torch.randn(1, 3, 64, 96).double()
        steps = [max(s // output_stride, 1) for s in (4, 8, 16, 32)]
        with plain_formulation(dilated):
            maps = dilated(x)
        return largest_error([m[..., ::step, ::step] for m, step in zip(maps, steps, strict=True)], plain(x))

    @pytest.fixture
    def fixed_gates(self, monkeypatch):
        """A gate sees the mean of all places, and attention every one of them: they alone tell the networks apart."""
        monkeypatch.setattr(SqueezeExcite, 'gate', lambda se, x: se.fc2.bias.sigmoid()[:, None, None])

    @pytest.mark.parametrize('output_stride', [8, 16])
    @pytest.mark.parametrize('name', SMALL)
    @torch.no_grad()
    def test_every_other_place_is_that_of_the_strided_network(self, name, output_stride, fixed_gates):
        assert self.every_other_place(name, output_stride) < 1e-9

    @pytest.mark.parametrize('name', SMALL)
    @torch.no_grad()
    def test_check_notices_a_first_layer_dilated_like_the_others(self, name, fixed_gates, monkeypatch):
        """Twin."""
        dilate = repvit_mm.backbone.dilate
        monkeypatch.setattr(repvit_mm.backbone, 'dilate', lambda stage, before, dilation: dilate(stage, 2, dilation))
        assert self.every_other_place(name, 16) > 1e-3

    @pytest.mark.parametrize('output_stride', [8, 16])
    def test_fused_network_and_gradients_are_those_of_the_branches(self, build, x, output_stride):
        network = build(norm_eval=True, output_stride=output_stride).double().train()
        assert max(gradient_errors(network, x.double()).values()) < 1e-9
        with torch.no_grad(), plain_formulation(network):
            expected = network(x.double())
        with torch.no_grad():
            assert largest_error(switch_to_deploy(network.eval())(x.double()), expected) < 1e-9


class TestFreezing:
    @pytest.mark.parametrize('frozen_stages', range(-1, 5))
    def test_frozen_stages_stay_frozen(self, build, frozen_stages, x):
        network = build(frozen_stages=frozen_stages)
        parts = [network.stem, *network.stages]
        frozen, live = parts[: frozen_stages + 1], parts[frozen_stages + 1 :]

        def check() -> None:
            assert not any(module.training for part in frozen for module in part.modules())
            assert not any(parameter.requires_grad for part in frozen for parameter in part.parameters())
            assert all(parameter.requires_grad for part in live for parameter in part.parameters())

        check()
        for mode in (True, False, True):
            network.train(mode)
            check()
            assert all(module.training is mode for part in live for module in part.modules())

        before = [statistics(part) for part in parts]
        maps = network(x)
        if live:
            total(maps).backward()
        for part, old in zip(parts, before, strict=True):
            changed = [not torch.equal(old[name], tensor) for name, tensor in statistics(part).items()]
            assert changed and all(change is (part in live) for change in changed)
            assert all((parameter.grad is not None) is (part in live) for parameter in part.parameters())

    def test_norm_eval_freezes_statistics_alone(self, build, x):
        network = build(norm_eval=True)
        for mode in (True, False, True):
            network.train(mode)
            assert not any(norm.training for norm in norms(network))
            assert all(isinstance(m, _BatchNorm) or m.training is mode for m in network.modules())
        before = statistics(network)
        total(network(x)).backward()
        assert all(torch.equal(before[name], tensor) for name, tensor in statistics(network).items())
        assert all(parameter.grad is not None for norm in norms(network) for parameter in norm.parameters())

    def test_live_norms_run_branches_and_gather_statistics(self, build, x):
        network = build().train()
        before = statistics(network)
        network(x)
        unmoved = [name for name, tensor in statistics(network).items() if torch.equal(before[name], tensor)]
        assert unmoved == []

    def test_norm_eval_and_frozen_stages_go_together(self, build):
        network = build(norm_eval=True, frozen_stages=1).train()
        assert not any(norm.training for norm in norms(network))
        assert not any(module.training for module in network.stages[0].modules())
        assert network.stages[1].training
        assert all(parameter.requires_grad for parameter in network.stages[1].parameters())


def gradients(network: ReparamBackbone, x: Tensor, retain_graph: bool = False) -> dict[str, Tensor]:
    """Gradients of every parameter and of the input."""
    x = x.clone().requires_grad_()
    leaves = {**dict(network.named_parameters()), 'input': x}
    loss = total(network(x))
    for _ in range(1 + retain_graph):
        found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=retain_graph)
    return dict(zip(leaves, found, strict=True))


def gradient_errors(network: ReparamBackbone, x: Tensor) -> dict[str, float]:
    """Relative difference of each gradient between running by one convolution a block and by its branches."""
    with plain_formulation(network):
        expected = gradients(network, x)
    return {name: relative_error(gradient, expected[name]) for name, gradient in gradients(network, x).items()}


class TestFolding:
    def test_gradients_are_those_of_the_branches(self, build, x):
        network = build(norm_eval=True).double().train()
        errors = gradient_errors(network, x.double())
        assert len(errors) == len(list(network.parameters())) + 1
        assert max(errors.values()) < 1e-9

    @pytest.mark.parametrize('golden', FIRST_GOLDENS, ids=lambda golden: golden.name)
    def test_gradients_of_a_published_network_are_those_of_the_branches(self, golden):
        network = golden.backbone(golden.arch, norm_eval=True).double().train()
        network.load_state_dict(golden.state_dict())
        assert max(gradient_errors(network, image().double()).values()) < 1e-9

    @pytest.mark.parametrize('build', slow_but(['repvit'], SMALL), indirect=True)
    @torch.no_grad()
    def test_fusion_check_notices_any_broken_block(self, build, x):
        """Twin of the golden test: one branch of one block is broken before fusing."""
        network, x = build().double().eval(), x[:1].double()
        with plain_formulation(network):
            expected = network(x)
        for block in reparam_blocks(network):
            tensor = next(tensor for tensor in block.parameters() if tensor.dim() in (2, 4))
            before = tensor.clone()
            tensor.mul_(0.9)
            assert largest_error(network(x), expected) > 1e-6
            assert largest_error(switch_to_deploy(copy.deepcopy(network))(x), expected) > 1e-6
            tensor.copy_(before)
        assert largest_error(switch_to_deploy(network)(x), expected) < 1e-9

    def test_gradient_check_notices_one_broken_branch(self, build, x):
        network = build(norm_eval=True).double().train()
        expected = gradients(network, x.double())
        with torch.no_grad():
            norms(network)[-1].running_var.mul_(1.001)
        actual = gradients(network, x.double())
        assert max(relative_error(gradient, expected[name]) for name, gradient in actual.items()) > 1e-6

    def test_option_turns_it_off(self, build, x, monkeypatch):
        network = build(norm_eval=True, fold_frozen=False).train()
        for block in reparam_blocks(network):
            monkeypatch.setattr(block, 'equivalent_kernel', None)
        total(network(x)).backward()
        actual = gradients(build(norm_eval=True).train(), x)
        assert max(relative_error(actual[name], p.grad) for name, p in network.named_parameters()) < 1e-4

    def test_gradients_of_several_passes_add_up(self, build, x):
        """In place: so no two parameters share the memory of their gradients."""
        network = build(norm_eval=True).double().train()
        leaves = list(network.parameters())
        once = torch.autograd.grad(total(network(x.double())), leaves)
        for _ in range(3):
            total(network(x.double())).backward()
        assert max(relative_error(p.grad, 3 * gradient) for p, gradient in zip(leaves, once, strict=True)) < 1e-12
        places = sorted((p.grad.data_ptr(), p.grad.nbytes) for p in leaves)
        assert all(place + size <= following for (place, size), (following, _) in itertools.pairwise(places))

    def test_gradients_with_a_part_frozen(self, build, x):
        network = build(norm_eval=True, frozen_stages=1).double().train()
        x, leaves = x.double(), [p for p in network.parameters() if p.requires_grad]
        with plain_formulation(network):
            expected = torch.autograd.grad(total(network(x)), leaves)
        assert max(map(relative_error, torch.autograd.grad(total(network(x)), leaves), expected)) < 1e-9

    @pytest.mark.parametrize('with_cp', [False, True])
    def test_what_learns_is_folded_together(self, build, x, with_cp, monkeypatch):
        together = []

        def counted(blocks: Iterable[ReparamBlock]) -> dict[ReparamBlock, Kernel]:
            kernels = equivalent_kernels(blocks)
            together.append(len(kernels))
            return kernels

        monkeypatch.setattr(repvit_mm.reparam, 'equivalent_kernels', counted)
        network = build(norm_eval=True, frozen_stages=0, with_cp=with_cp).train()
        total(network(x)).backward()
        learning = [block for block in reparam_blocks(network) if next(block.parameters()).requires_grad]
        assert together == [len(learning)]
        with torch.no_grad():
            network(x)
        assert len(together) == 1, 'kernels are kept then'

    @pytest.mark.parametrize('autocast', [False, True])
    @pytest.mark.parametrize('reentrant', [False, True])
    def test_checkpointing_from_outside(self, build, x, reentrant, autocast):
        """As MMEngine's ``activation_checkpointing`` wraps any block's forward: it runs again in the backward pass."""

        def gradients_of(network: ReparamBackbone) -> dict[str, Tensor]:
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
                maps = network(x)
            total([m.float() for m in maps]).backward()
            return {name: p.grad for name, p in network.named_parameters()}

        network = build(norm_eval=True).train()
        expected = gradients_of(copy.deepcopy(network))
        for stage in network.stages:
            for block in stage:
                block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
        actual = gradients_of(network)
        errors = [relative_error(actual[name], gradient) for name, gradient in expected.items()]
        if reentrant and autocast:  # its first run has no gradients, so biases and residual sums are rounded
            assert all(gradient.isfinite().all() for gradient in actual.values())
        else:
            assert max(errors) < 1e-5

    @pytest.mark.parametrize('golden', slow_but(FIRST_GOLDENS[:1], [*FIRST_GOLDENS, DEEPER]))
    def test_gradients_in_float32_and_under_autocast(self, golden):
        """Distances from float64, each over all parameters: tiny, and no larger than that of the branches."""
        network = golden.backbone(golden.arch, norm_eval=True).train()
        network.load_state_dict(golden.state_dict())
        x = torch.cat([image(), image().flip(-1)])
        exact = gradients(copy.deepcopy(network).double(), x.double())
        del exact['input']

        def flat(tensors: Iterable[Tensor]) -> Tensor:
            return torch.cat([tensor.flatten() for tensor in tensors])

        def distance(autocast: bool) -> float:
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
                loss = total([m.float() for m in network(x)])
            return relative_error(flat(torch.autograd.grad(loss, list(network.parameters()))), flat(exact.values()))

        assert distance(autocast=False) < 1e-4
        with plain_formulation(network):
            expected = distance(autocast=True)
        assert 1e-4 < distance(autocast=True) < 1.1 * expected

    @torch.no_grad()
    def test_unfused_network_without_gradients_runs_the_fused_one(self, build, x):
        """Operation by operation, from the second pass on."""

        def operations(network: ReparamBackbone) -> list[str]:
            with Operations() as seen:
                network(x)
            return [name for name in seen.names if name != 'aten.equal.default']  # the kept kernels are compared

        network = build().eval()
        first, second = operations(network), operations(network)
        assert second == operations(switch_to_deploy(network))
        assert len(first) > len(second)

    def test_without_gradients_nothing_of_the_callers_is_overwritten(self, build, x):
        network, before = build().eval(), x.clone()
        inputs, outputs = [], []
        for stage in network.stages:
            for block in stage:
                block.register_forward_hook(lambda block, args, out: outputs.append((out, out.clone())))
                block.register_forward_pre_hook(lambda block, args: inputs.append((args[0], args[0].clone())))
        with torch.no_grad():
            network(x)
        assert torch.equal(x, before)
        assert all(torch.equal(now, then) for now, then in [*inputs, *outputs])

    @pytest.mark.parametrize('deploy', [False, True])
    def test_without_gradients_nothing_that_a_hook_sees_is_overwritten(self, build, x, deploy):
        network = build().eval()
        network = switch_to_deploy(network) if deploy else network
        expected = network(x)
        seen = []

        def see(module: nn.Module, args: tuple, output: Any) -> None:
            seen.extend((y, y.clone()) for y in (*args, output) if isinstance(y, Tensor))

        for module in network.modules():
            module.register_forward_hook(see)
        with torch.no_grad():
            maps = network(x)
        assert len(seen) > 40 and all(torch.equal(now, then) for now, then in seen)
        assert largest_error(maps, expected) < 1e-5

    @pytest.mark.parametrize('recompute', [True, False])
    def test_folding_takes_no_more_operations_than_it_saves(self, recompute):
        """Of a training step, with operations that compute nothing (views and the like) and without them."""

        def operations(network: ReparamBackbone) -> tuple[int, int]:
            with Operations() as seen:
                total(network(torch.randn(1, 3, 32, 32))).backward()
            # Older ones detach what a Function saves twice.
            every = [name for name in seen.names if since('2.6') or 'detach' not in name]
            names = [name for name in every if not re.search('detach|view|split|expand|alias|empty|same_size', name)]
            return len(every), len(names)

        network = RepViT('m0_9', norm_eval=True, recompute=recompute).train()
        folded = operations(network)
        with plain_formulation(network):
            plain = operations(network)
        assert all(few < 0.95 * many for few, many in zip(folded, plain, strict=True)), (folded, plain)

    def test_without_channels_last_the_input_keeps_its_format(self, build, x):
        formats = []
        network = build(channels_last=False).eval()
        network.stem.register_forward_pre_hook(lambda stem, args: formats.append(args[0].is_contiguous()))
        with torch.no_grad():
            maps = network(x)
        assert formats == [True]
        assert largest_error(maps, build().eval()(x)) < 1e-5

    @pytest.mark.parametrize('options', [{}, {'deploy': True}], ids=str)
    def test_transforms_of_functions(self, build, x, options):
        """``vmap`` over networks, as an ensemble is run, and derivatives forward."""
        network = build(**options).double().eval()
        x = x.double()
        with torch.no_grad():
            network(x)  # so that kernels are kept
        others = {name: 1.1 * p.detach() for name, p in network.named_parameters()}
        stacked = {name: torch.stack([p.detach(), others[name]]) for name, p in network.named_parameters()}
        run = lambda parameters: torch.func.functional_call(network, parameters, (x,))  # noqa: E731
        for together, first, second in zip(torch.func.vmap(run)(stacked), network(x), run(others), strict=True):
            assert largest_error(together, (first, second)) < 1e-9

        tangent = torch.randn_like(x)
        maps, slopes = torch.func.jvp(network, (x,), (tangent,))
        assert largest_error(maps, network(x)) < 1e-9
        step = 1e-6
        for slope, above, below in zip(slopes, network(x + step * tangent), network(x - step * tangent), strict=True):
            assert relative_error(slope, (above - below) / (2 * step)) < 1e-6
        with forward_ad.dual_level():
            dual = network(forward_ad.make_dual(x, tangent))
            assert largest_error([forward_ad.unpack_dual(y).tangent for y in dual], slopes) < 1e-9

    def test_second_derivatives_without_recomputing(self, build, x):
        """A gradient penalty, folded and by branches."""

        def penalty(network: ReparamBackbone) -> dict[str, Tensor]:
            images = x.double().requires_grad_()
            with plain_attention():  # the others have no second derivative
                maps = network(images)
            (gradient,) = torch.autograd.grad(total(maps), images, create_graph=True)
            gradient.square().sum().backward()
            return {name: parameter.grad for name, parameter in network.named_parameters()}

        folded = penalty(build(norm_eval=True, recompute=False).double().train())
        plain = penalty(build(norm_eval=True, fold_frozen=False).double().train())
        assert max(relative_error(folded[name], grad) for name, grad in plain.items() if grad.norm() > 1e-12) < 1e-9
        with pytest.raises(RuntimeError, match='once_differentiable'):
            penalty(build(norm_eval=True).double().train())


@pytest.mark.parametrize(
    ('options', 'training', 'learns'),
    [
        ({}, True, True),
        ({'norm_eval': True}, True, True),
        ({'norm_eval': True, 'fold_frozen': False}, True, True),
        ({'norm_eval': True, 'recompute': False}, True, True),
        ({'frozen_stages': 2}, True, True),
        ({}, False, True),
        ({}, False, False),
        ({'deploy': True}, False, False),
    ],
    ids=str,
)
def test_hooks_are_called_on_every_module_down_to_the_blocks_that_equal_one_convolution(
    build, x, options, training, learns
):
    """Stem, stages, blocks, mixers, gates and activations: all that the papers name."""
    network = build(**options).train(training)
    called: list[str] = []
    blocks = reparam_blocks(network)
    inside = {module for block in blocks for module in block.modules()}.difference(blocks)
    named = {
        name: module for name, module in network.named_modules() if module not in {network, network.stages, *inside}
    }
    assert len(named) > 20
    for name, module in named.items():
        module.register_forward_hook(lambda module, args, y, name=name: called.append(name))
    with torch.set_grad_enabled(learns):
        network(x)
    assert sorted(called) == sorted(named)


def distributed_gradients(rank: int, folder: str, make: Callable[[], ReparamBackbone], x: Tensor) -> None:
    """One of two processes: each gets half of the batch; the first one writes the averaged gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    network = nn.parallel.DistributedDataParallel(make())
    for _ in range(2):  # DDP rearranges its buckets after the first step
        network.zero_grad()
        total(network(x.chunk(2)[rank])).backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in network.module.named_parameters()}, f'{folder}/gradients.pth')
    torch.distributed.barrier()
    # Nothing is destroyed: joining gloo's thread blocks for ever if that waits for Python's lock.
    os._exit(0)


def small_frozen(name: str) -> ReparamBackbone:
    cls, arch = SMALL[name]
    return randomize(cls(arch, norm_eval=True)).double().train()


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALL)
def test_two_processes_have_the_gradients_of_one(name, tmp_path):
    x = torch.randn(4, 3, 64, 96).double()
    make = partial(small_frozen, name)
    method = PROCESSES.get_start_method()
    start_processes(distributed_gradients, (str(tmp_path), make, x), nprocs=2, start_method=method)
    actual = torch.load(tmp_path / 'gradients.pth', weights_only=True)
    expected = gradients(make(), x)
    assert len(actual) == len(expected) - 1
    assert max(relative_error(gradient, expected[name]) for name, gradient in actual.items()) < 1e-9


class TestDeploy:
    def test_deployed_network_is_plain(self, build, x):
        network = build().eval()
        expected = network(x)
        blocks = len(reparam_blocks(network))
        convolutions = sum(type(module) is nn.Conv2d for module in network.modules())
        inside = sum(type(m) is nn.Conv2d for block in reparam_blocks(network) for m in block.modules())
        assert not network.deployed
        assert switch_to_deploy(network) is network
        assert network.deployed
        assert not any(isinstance(module, (ReparamBlock, _BatchNorm)) for module in network.modules())
        assert sum(type(m) is nn.Conv2d for m in network.modules()) == convolutions - inside + blocks
        assert largest_error(network(x), expected) < 1e-5

    def test_built_deployed_and_fused_have_one_state_dict(self, build, x):
        fused, built = switch_to_deploy(build()), build(deploy=True)
        shapes = [{n: t.shape for n, t in network.state_dict().items()} for network in (fused, built)]
        assert shapes[0] == shapes[1]
        assert not built.training
        assert not torch.equal(built.eval()(x)[-1], fused.eval()(x)[-1]), 'their weights differ'
        fused_weights, built_weights = copy.deepcopy(fused.state_dict()), copy.deepcopy(built.state_dict())
        expected = fused(x)
        built.load_state_dict(fused_weights, strict=True)
        assert largest_error(built(x), expected) == 0
        fused.load_state_dict(built_weights, strict=True)
        assert all(torch.equal(tensor, built_weights[name]) for name, tensor in fused.state_dict().items())

    def test_unfused_weights_are_fused_as_a_fused_network_loads_them(self, build, x, log):
        for options in ({}, {'out_indices': (0, 2)}):
            unfused, fused = build(**options).eval(), build(deploy=True, **options)
            for tensor in fused.state_dict().values():
                tensor.zero_()
            log.clear()
            fused.load_state_dict(unfused.state_dict(), strict=True)
            assert largest_error(fused(x), unfused(x)) < 1e-5
            assert len(log) == 2 and log[1].endswith('fused while loading')

    @pytest.mark.parametrize('options', [{}, {'norm_eval': True}, {'frozen_stages': 4}], ids=str)
    def test_fused_network_refuses_to_train(self, build, options):
        network = switch_to_deploy(build(**options).eval())
        for model in (network, nn.Sequential(network)):
            with pytest.raises(RuntimeError, match='fused for deployment and cannot be trained') as error:
                model.train()
            assert '\n' not in str(error.value)
        assert network.train(False) is network
        assert not network.training

    @pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
    def test_mode_and_frozen_parameters_are_kept(self, build, training):
        network = build(frozen_stages=1).train(training)
        switch_to_deploy(network)
        assert network.training is training
        for part in (network.stem, network.stages[0]):
            assert not any(module.training for module in part.modules())
            assert not any(parameter.requires_grad for parameter in part.parameters())
        for part in network.stages[1:]:
            assert all(module.training is training for module in part.modules())
            assert all(parameter.requires_grad for parameter in part.parameters())

    @pytest.mark.parametrize('fused', [False, True])
    def test_copies_are_the_same_network(self, build, x, fused):
        options = {'tap': list(build().taps)[-1], 'out_indices': (0, 2)}
        network = build(**options).eval()
        if fused:
            switch_to_deploy(network)
        expected = network(x)
        file = io.BytesIO()
        torch.save(network.state_dict(), file)
        file.seek(0)
        loaded = build(**options, deploy=fused).eval()
        for tensor in loaded.state_dict().values():
            tensor.zero_()
        loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), loaded):
            assert largest_error(other(x), expected) == 0
            assert other.deployed is fused


class TestCheckpointing:
    """``with_cp`` changes memory and time, nothing else."""

    @pytest.mark.parametrize('options', [{}, {'norm_eval': True}, {'frozen_stages': 2}], ids=str)
    def test_same_maps_gradients_and_statistics(self, build, x, options):
        self.check(build, x, options)

    @pytest.mark.parametrize('build', RESIDUAL, indirect=True)
    @pytest.mark.parametrize('norm_eval', [False, True])
    def test_the_same_images_are_dropped(self, build, x, norm_eval):
        self.check(build, x, {'norm_eval': norm_eval, 'drop_path_rate': 0.5})

    @staticmethod
    def check(build, x, options):
        results = []
        for with_cp in (False, True):
            network = build(with_cp=with_cp, **options).double().train()
            torch.manual_seed(1)
            maps = network(x.double())
            total(maps).backward()
            grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
            results.append((maps, grads, statistics(network)))
        (maps, grads, stats), (cp_maps, cp_grads, cp_stats) = results
        assert largest_error(cp_maps, maps) < 1e-12
        assert grads.keys() == cp_grads.keys() and len(grads) > 10
        assert max(relative_error(cp_grads[name], grad) for name, grad in grads.items() if grad.norm() > 1e-9) < 1e-9
        assert all(torch.equal(cp_stats[name], tensor) for name, tensor in stats.items())

    @pytest.mark.parametrize('norm_eval', [False, True])
    def test_backward_may_run_twice(self, build, x, norm_eval):
        expected = gradients(build(norm_eval=norm_eval).train(), x)
        twice = gradients(build(norm_eval=norm_eval, with_cp=True).train(), x, retain_graph=True)
        assert relative_error(twice['input'], expected['input']) < 1e-5

    def test_every_block_is_recomputed_in_the_backward_pass(self, build, x):
        runs = []
        network = build(with_cp=True, norm_eval=True)
        blocks = [network.stem, *(block for stage in network.stages for block in stage)]
        for block in blocks:
            block.register_forward_pre_hook(lambda block, args: runs.append(block))
        with torch.no_grad():
            network.train()(x)
        assert runs == blocks
        runs.clear()
        total(network(x)).backward()
        assert runs == blocks + blocks[::-1]


@pytest.mark.parametrize('build', RESIDUAL, indirect=True)
class TestStochasticDepth:
    @staticmethod
    def rates(network: ReparamBackbone) -> list[float]:
        """The one rate of each block that has any."""
        blocks = [block for stage in network.stages for block in stage]
        found = [{m.rate for m in block.modules() if isinstance(m, StochasticDepth)} for block in blocks]
        assert all(len(rates) <= 1 for rates in found)
        return [rate for rates in found for rate in rates]

    def test_rate_grows_linearly_over_the_blocks(self, build):
        rates = self.rates(build(drop_path_rate=0.3))
        assert len(rates) >= 8
        assert rates == pytest.approx([0.3 * i / (len(rates) - 1) for i in range(len(rates))])
        part = self.rates(build(drop_path_rate=0.3, out_indices=(0, 1)))
        assert 0 < len(part) < len(rates)
        assert part == rates[: len(part)], 'a block keeps its rate whatever is built behind it'

    def test_off_unless_training(self, build, x):
        plain, dropping = build(norm_eval=True).eval(), build(norm_eval=True, drop_path_rate=0.9).eval()
        assert largest_error(dropping(x), plain(x)) == 0
        assert largest_error(dropping.train()(x), plain.train()(x)) > 1e-3


class TestArguments:
    @pytest.mark.parametrize(
        ('options', 'error', 'words'),
        [
            (dict(arch=None), TypeError, ['arch=None', 'a name or a dict']),
            (dict(tap='stage_ends'), ValueError, ["tap='stage_ends'", "nearest is 'stage_end'"]),
            (dict(tap=None), ValueError, ['tap=None', 'stage_end']),
            (dict(out_indices=(0, 1, 1)), ValueError, ['out_indices=(0, 1, 1)', 'nearest is (0, 1)']),
            (dict(out_indices=(2, 0)), ValueError, ['out_indices=(2, 0)', 'nearest is (0, 2)']),
            (dict(out_indices=(1, 2, 3, 4)), ValueError, ['out_indices=(1, 2, 3, 4)', 'nearest is (1, 2, 3)']),
            (dict(out_indices=(-1,)), ValueError, ['out_indices=(-1,)', 'nearest is (0,)']),
            (dict(out_indices=()), ValueError, ['out_indices=()', 'nearest is (3,)']),
            (dict(out_indices=3), ValueError, ['out_indices=3', 'nearest is (3,)']),
            (dict(out_indices=('0', '1')), ValueError, ["out_indices=('0', '1')"]),
            (dict(frozen_stages=5), ValueError, ['frozen_stages=5', '4']),
            (dict(frozen_stages=-2), ValueError, ['frozen_stages=-2', '-1']),
            (dict(frozen_stages='all'), ValueError, ["frozen_stages='all'", '-1']),
            (dict(output_stride=4), ValueError, ['output_stride=4', 'expected 32, or 16 or 8']),
            (dict(output_stride='8'), ValueError, ["output_stride='8'", 'expected 32, or 16 or 8']),
            (dict(drop_path_rate=1.0), ValueError, ['drop_path_rate=1.0', 'below 1']),
            (dict(drop_path_rate=-0.1), ValueError, ['drop_path_rate=-0.1', 'from 0']),
            (dict(drop_path_rate=math.nan), ValueError, ['drop_path_rate=nan', 'from 0']),
            (dict(out_indicies=(0,)), TypeError, ["'out_indicies'", "nearest is 'out_indices'"]),
            (dict(frozen_stage=1), TypeError, ["'frozen_stage'", "nearest is 'frozen_stages'"]),
            (dict(unknown=1), TypeError, ["'unknown'", 'nearest is']),
            (dict(pretrained='a.pth'), TypeError, ["'pretrained'", 'init_cfg', 'model.pretrained=None']),
            (dict(arch=dict(widths=(8, 16, 24, 32))), ValueError, ["'widths'", 'channels', 'depths']),
            (dict(arch=dict(depth=(1, 1, 1, 1))), ValueError, ["'depth'", "nearest is 'depths'"]),
            (dict(arch=dict(channels=(8, 16, 24, 32))), TypeError, ['arch=', 'depths']),
            (dict(arch=dict(channels=8, depths=(1, 1, 1, 1))), (TypeError, ValueError), ['channels', '8']),
            (dict(arch=dict(channels=(8, 16, 24), depths=(1, 1, 1, 1))), ValueError, ['channels=(8, 16, 24)', 'four']),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else '',
    )
    @pytest.mark.parametrize('cls', sorted({cls for cls, _ in SMALL.values()}, key=str))
    def test_bad_argument_names_itself_and_what_is_valid(self, cls, options, error, words):
        self.check(cls, options, error, words)

    def test_weights_of_its_own_replace_those_of_a_base(self, log):
        """Stock segmentors hand what their ResNet starts from to any backbone that a config puts in its place."""
        init_cfg = dict(type='Pretrained', checkpoint='a.pth')
        assert RepViT('m0_6', pretrained='open-mmlab://resnet50_v1c', init_cfg=init_cfg).init_cfg == init_cfg
        assert log == ["RepViT: init_cfg replaces pretrained='open-mmlab://resnet50_v1c'"]

    @pytest.mark.parametrize(
        ('cls', 'options', 'words'),
        [
            (RepViT, dict(arch='m1_2'), ["arch='m1_2'", "nearest is 'm1_"]),
            (RepViT, dict(arch='repvit_m1_1'), ['arch=', "nearest is 'm1_1'"]),
            (RepViT, dict(tap='predownsample'), ['tap=', "nearest is 'pre_downsample'"]),
            (RepViT, dict(arch=dict(channels=(7, 16, 24, 32), depths=(1, 1, 1, 1))), ['channels=', 'even']),
            (FastViT, dict(arch='sa18'), ["arch='sa18'", "nearest is 'sa"]),
            (FastViT, dict(arch='ma-36'), ['arch=', "nearest is 'ma36'"]),
            (FastViT, dict(tap='pre_downsample'), ['tap=', 'expected one of stage_end']),
            (FastViT, dict(arch=dict(channels=(8, 16, 24, 32), depths=(1, 1, 1, 1))), ['channels=', 'a multiple']),
        ],
        ids=str,
    )
    def test_bad_argument_of_one_family(self, cls, options, words):
        self.check(cls, options, ValueError, words)

    @staticmethod
    def check(cls, options, error, words):
        with pytest.raises(error) as raised:
            cls(**options)
        message = str(raised.value)
        assert all(word in message for word in words), message
        assert '\n' not in message

    def test_options_and_defaults(self):
        for cls in {cls for cls, _ in SMALL.values()}:
            defaults = {name: option.default for name, option in options_of(cls).items()}
            assert {
                'out_indices': (0, 1, 2, 3),
                'tap': 'stage_end',
                'output_stride': 32,
                'norm_eval': False,
                'frozen_stages': -1,
                'with_cp': False,
                'fold_frozen': True,
                'recompute': True,
                'channels_last': True,
                'deploy': False,
                'drop_path_rate': 0.0,
                'init_cfg': None,
            }.items() <= defaults.items()

    def test_custom_spec_may_come_from_a_config(self, build, x):
        cls, arch = type(build()), {**build().spec.__dict__}
        config = ConfigDict(
            arch={k: list(v) if isinstance(v, tuple) else v for k, v in arch.items()}, out_indices=[0, 3]
        )
        assert isinstance(config.arch.channels, list)
        network = randomize(cls(**config)).eval()
        assert largest_error(network(x), build(out_indices=(0, 3)).eval()(x)) == 0


class TestRegistry:
    @pytest.mark.needs_ops
    def test_type_resolves_from_every_scope(self, build):
        import mmdet.registry
        import mmseg.registry

        config = dict(type=type(build()).__name__, arch=build().spec.__dict__, out_indices=(1,))
        for registry in (MODELS, mmdet.registry.MODELS, mmseg.registry.MODELS):
            assert type(registry.build(dict(config))) is type(build())
        for scope in ('mmengine', 'mmdet', 'mmseg'):
            with DefaultScope.overwrite_default_scope(scope):
                assert type(MODELS.build(dict(config))) is type(build())

    def test_networks_do_not_share_state(self, build, x):
        first, second = build().eval(), build().eval()
        switch_to_deploy(first)
        assert not second.deployed
        assert first.out_indices == second.out_indices


class TestTorch:
    """Torch's own features work on the networks as on any other."""

    @pytest.fixture(params=['unfused', 'fused'])
    def network(self, build, request) -> Iterator[ReparamBackbone]:
        network = build().eval()
        return switch_to_deploy(network) if request.param == 'fused' else network

    @pytest.mark.parametrize('learns', [False, True], ids=['inference', 'gradients'])
    def test_maps_have_the_memory_format_of_the_input(self, network, x, learns):
        """Whatever the network computes in: RoIAlign reads a map in channels_last as if it were not."""
        with torch.set_grad_enabled(learns):
            expected = network(x)
            actual = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        assert largest_error(actual, expected) < 1e-5
        assert all(m.is_contiguous() for m in expected)
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in actual)

    def test_gradients_in_channels_last(self, build, x):
        network = build(norm_eval=True).train()
        expected = gradients(network, x)
        network.to(memory_format=torch.channels_last)
        actual = gradients(network, x.to(memory_format=torch.channels_last))
        assert max(relative_error(actual[name], gradient) for name, gradient in expected.items()) < 1e-4

    @torch.no_grad()
    def test_autocast(self, network, x):
        expected = network(x)
        with torch.autocast('cpu', torch.bfloat16):
            actual = network(x)
        assert {m.dtype for m in actual} == {torch.bfloat16}
        assert 0 < largest_error(actual, expected) < 0.03

    def test_autocast_training(self, build, x):
        for norm_eval in (False, True):
            network = build(norm_eval=norm_eval).train()
            with torch.autocast('cpu', torch.bfloat16):
                loss = total([m.float() for m in network(x)])
            loss.backward()
            assert all(p.grad.dtype is torch.float32 and p.grad.isfinite().all() for p in network.parameters())

    @pytest.mark.parametrize('build', slow_but(['repvit'], SMALL), indirect=True)
    @pytest.mark.filterwarnings('ignore::DeprecationWarning')
    @torch.no_grad()
    def test_trace(self, network, x):
        traced = torch.jit.trace(network, x)
        other = torch.randn(1, 3, 96, 64)
        assert largest_error(traced(other), network(other)) < 1e-6

    def check_compiled(self, network: ReparamBackbone, x: Tensor, backend: str) -> None:
        """The gradients of the whole network as one graph."""
        expected = gradients(network.train(), x)
        network.compile(fullgraph=True, backend=backend)
        actual = gradients(network, x)
        assert max(relative_error(actual[name], gradient) for name, gradient in expected.items()) < 1e-4

    @pytest.mark.slow
    @since_torch('2.6', 'torch.compile of these networks')
    def test_compile(self, build, x):
        self.check_compiled(build(norm_eval=True, out_indices=(0, 1)), x, 'aot_eager')

    @pytest.mark.slow
    @since_torch('2.6', 'torch.compile of these networks')
    @pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a compiler')
    def test_compile_to_machine_code(self, x):
        """Of one network: a translation takes half a minute."""
        cls, arch = SMALL['repvit_v1']
        self.check_compiled(randomize(cls(arch, norm_eval=True, out_indices=(0,))), x, 'inductor')


def test_public_names():
    import repvit_mm

    families = {family.cls.__name__ for family in FAMILIES}
    assert set(repvit_mm.__all__) >= {*families, 'FuseOnDeployHook', 'switch_to_deploy'}
    assert all(hasattr(repvit_mm, name) for name in repvit_mm.__all__)
    assert repvit_mm.RepViT is RepViT


class Detector(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


@pytest.mark.parametrize(
    ('part', 'settings', 'wrong'),
    [
        ('neck', dict(in_channels=[8, 16, 24, 32]), None),
        ('neck', dict(in_channels=[8, 16, 24]), 'model.neck.in_channels is [8, 16, 24]'),
        ('neck', dict(in_channels=[8, 16, 24, 48]), 'the backbone gives maps of [8, 16, 24, 32] channels'),
        ('decode_head', dict(in_channels=[16, 32], in_index=[1, 3]), None),
        ('decode_head', dict(in_channels=[16, 24], in_index=[1, 3]), 'model.decode_head.in_channels is [16, 24]'),
        ('decode_head', dict(in_channels=32, in_index=3), None),
    ],
)
def test_channels_of_what_takes_the_maps(part, settings, wrong):
    cls, arch = SMALL['repvit']
    model = Detector(cls(arch))
    if wrong is None:
        check_channels(model, {part: settings})
    else:
        with pytest.raises(ValueError, match=re.escape(wrong)):
            check_channels(model, {part: settings})
    check_channels(nn.Identity(), {part: settings})
