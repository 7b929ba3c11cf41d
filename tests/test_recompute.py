"""Convolutions that recompute their input in the backward pass: same result, same gradients, less kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from helpers import dilated, randomize, relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import repvit_mm.recompute
from repvit_mm.layers import GELU, ConvBN, LayerScale, ReLU, SqueezeExcite
from repvit_mm.recompute import Recipe
from repvit_mm.reparam import ReparamBlock, plain_formulation
from repvit_mm.repvit import TokenMixer

TOLERANCE = 1e-9
CHANNELS = 6

CHEAP = {
    'gelu': GELU,
    'depthwise': partial(ConvBN, CHANNELS, CHANNELS, 3, groups=CHANNELS),
    'depthwise_stride2': partial(ConvBN, CHANNELS, CHANNELS, 3, stride=2, groups=CHANNELS),
    'token_mixer': partial(TokenMixer, CHANNELS, norm_after_sum=True),
    'token_mixer_dilated': lambda: dilated(TokenMixer(CHANNELS, norm_after_sum=True)),
    'depthwise_relu': lambda: nn.Sequential(ConvBN(CHANNELS, CHANNELS, 3, groups=CHANNELS), ReLU()),
}
CONVS = {
    '1x1': partial(ConvBN, CHANNELS, 10),
    '3x3_stride2': partial(ConvBN, CHANNELS, 10, 3, stride=2),
    '3x3_dilated': lambda: dilated(ConvBN(CHANNELS, 10, 3)),
    '5x5_groups': partial(ConvBN, CHANNELS, 9, 5, groups=3),
    'layer_scale': lambda: LayerScale(nn.Conv2d(CHANNELS, 10, 1), 10, 0.1),
}


class Chain(nn.Module):
    """Two convolutions' worth of network: what is in front feeds ``cheap``, as in a real one."""

    def __init__(self, cheap: str, conv: str, gate: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, 1)
        self.cheap = CHEAP[cheap]()
        self.conv = CONVS[conv]()
        self.gate = SqueezeExcite(CHANNELS, 8) if gate else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.cheap(self.first(x))
        if self.gate is not None:
            middle = self.gate(middle)
        return self.conv(middle), middle


@pytest.fixture(params=CHEAP)
def cheap(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CONVS)
def conv(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=['ungated', 'gated'])
def chain(request: pytest.FixtureRequest, cheap: str, conv: str) -> Chain:
    return randomize(Chain(cheap, conv, request.param).double()).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 9, 7).double()


def gradients(chain: Chain, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    leaves = {name: p for name, p in {**dict(chain.named_parameters()), 'input': x}.items() if p.requires_grad}
    found = torch.autograd.grad(loss(*chain(x)), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }


def gradient_error(chain: Chain, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    with plain_formulation(chain):
        expected = gradients(chain, x, loss)
    actual = gradients(chain, x, loss)
    assert actual.keys() == expected.keys()
    return max(
        relative_error(actual[name], gradient) if gradient.norm() > 0 else actual[name].norm().item()
        for name, gradient in expected.items()
    )


LOSSES = {
    'output': lambda output, middle: output.square().sum(),
    'input_of_conv': lambda output, middle: middle.square().sum(),
    'both': lambda output, middle: output.square().sum() + middle.pow(3).sum(),
}


def test_same_maps(chain, x):
    with plain_formulation(chain):
        expected = chain(x)
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(chain(x), expected, strict=True))
    with torch.no_grad():
        assert all(relative_error(a, b) < TOLERANCE for a, b in zip(chain(x), expected, strict=True))


@pytest.mark.parametrize('loss', LOSSES.values(), ids=LOSSES)
def test_same_gradients(chain, x, loss):
    assert gradient_error(chain, x, loss) < TOLERANCE


@pytest.mark.parametrize('frozen', ['first', 'cheap', 'conv', 'gate'])
def test_same_gradients_with_a_part_frozen(chain, x, frozen):
    part = getattr(chain, frozen)
    if part is not None:
        part.requires_grad_(False)
    assert gradient_error(chain, x, LOSSES['both']) < TOLERANCE


def test_gradient_check_notices_a_wrong_recipe(chain, x, monkeypatch):
    """Twin of the check above: what is computed again is not what was computed before."""
    right = repvit_mm.recompute.leave

    def wrong(x: Tensor, recipe: Recipe) -> Tensor:
        return right(x, Recipe(lambda *kept: recipe.function(*kept) * 1.01, recipe.kept))

    monkeypatch.setattr(repvit_mm.recompute, 'leave', wrong)
    assert gradient_error(chain, x, LOSSES['output']) > 1e-4


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        yield saved


def test_input_of_the_convolution_is_not_kept(chain, x):
    with saved_tensors() as saved:
        _, middle = chain(x)
    assert saved
    assert not any(t.shape == middle.shape and torch.equal(t, middle) for t in saved)
    with plain_formulation(chain), saved_tensors() as saved:
        _, middle = chain(x)
    assert any(t.shape == middle.shape and torch.equal(t, middle) for t in saved), 'the check finds it where it is kept'


class Convolutions(TorchDispatchMode):
    """Records each convolution's weight and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.seen.append((args[1], args[8]))
        return func(*args, **(kwargs or {}))


def test_only_what_is_cheap_runs_twice(chain, x):
    output, _ = chain(x)
    with Convolutions() as backward:
        output.sum().backward()
    assert len(backward.seen) == (not isinstance(chain.cheap, GELU))
    assert all(groups == CHANNELS for _, groups in backward.seen)


def test_kept_map_that_was_overwritten_is_noticed():
    """As autograd notices it everywhere else."""
    chain = Chain('gelu', '1x1', gate=False).eval()
    x = chain.first(torch.randn(2, 3, 5, 5))
    output = chain.conv(chain.cheap(x))
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        output.sum().backward()


def test_map_that_was_changed_on_its_way_is_not_computed_again(chain, x):
    """By a hook, say: the recipe no longer says what the map is."""
    changed = chain.gate or chain.cheap
    changes = [lambda module, args, y: y * 2]
    if not (isinstance(changed, nn.Sequential) and isinstance(changed[-1], ReLU)):  # whose output torch wants unchanged
        changes.append(lambda module, args, y: y.mul_(2))
    for change in changes:
        hook = changed.register_forward_hook(change)
        assert gradient_error(chain, x, LOSSES['both']) < TOLERANCE
        hook.remove()


def test_every_module_is_called_in_every_mode(chain, x):
    called = []
    for module in (chain.cheap, chain.gate, chain.conv):
        if module is not None:
            module.register_forward_hook(lambda module, args, y: called.append(module))
    modules = [module for module in (chain.cheap, chain.gate, chain.conv) if module is not None]
    for training in (False, True):
        for learns in (False, True):
            called.clear()
            with torch.set_grad_enabled(learns):
                chain.train(training)(x)
            assert called == modules


def test_backward_may_run_twice(chain, x):
    """What two readers of a recipe share is there for both, in each pass."""
    output, middle = chain(x)
    parameters = list(chain.parameters())
    loss = LOSSES['both'](output, middle)
    first, second = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_need_it_switched_off(chain, x):
    def penalty() -> Tensor:
        images = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(chain(images)[0].pow(3).sum(), images, create_graph=True)
        return gradient.square().sum()

    with plain_formulation(chain):
        expected = torch.autograd.grad(penalty(), list(chain.parameters()), allow_unused=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        penalty().backward()
    for module in chain.modules():
        if isinstance(module, ReparamBlock):
            module.recomputes = False
    actual = torch.autograd.grad(penalty(), list(chain.parameters()), allow_unused=True)
    compared = [(a, e) for a, e in zip(actual, expected, strict=True) if e is not None and e.norm() > 0]
    assert len(compared) >= 4
    assert max(relative_error(a, e) for a, e in compared) < TOLERANCE


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_autocast_runs_in_its_dtype_both_times(chain, x, dtype):
    """Gradients arrive in the parameters' own dtype."""
    chain, x = chain.float(), x.float()
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype is torch.bfloat16):
        output, middle = chain(x)
    assert output.dtype is middle.dtype is dtype
    output.float().square().sum().backward()
    assert all(p.grad.dtype is torch.float32 and p.grad.isfinite().all() for p in chain.parameters())
