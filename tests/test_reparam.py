"""Fusion, block by block and in module trees. In float64, where what is equal differs by 1e-15 or so, not 1e-9."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import BLOCKS, STATISTICS, Operations, randomize, relative_error, since_torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, prune

from repvit_mm import switch_to_deploy
from repvit_mm.layers import ConvBN, LayerScale, MobileOneBlock
from repvit_mm.reparam import (
    Kernel,
    KernelSum,
    ReparamBlock,
    Term,
    add_kernels,
    add_up,
    conv_kernel,
    equivalent_kernels,
    fold_norm,
    fold_norm_before,
    identity_kernel,
    identity_weight,
    kernels_together,
    pad_weight,
    plain_formulation,
    reparam_blocks,
    scale_kernel,
    subtract_kernel,
)
from repvit_mm.repvit import TokenMixer

TOLERANCE = 1e-9
ODD = (1, 3, 5, 7)

small = st.integers(1, 3)
odd_size = st.tuples(st.sampled_from(ODD), st.sampled_from(ODD))


def random_kernel(out_channels: int, in_channels_per_group: int, size: tuple[int, int]) -> KernelSum:
    weight, bias = torch.randn(out_channels, in_channels_per_group, *size), torch.randn(out_channels)
    return KernelSum((Term(weight.double()),), bias.double())


def convolve(x: Tensor, kernel: KernelSum, groups: int, stride: int = 1) -> Tensor:
    """The convolution of "same" padding."""
    weight, bias = add_up(kernel)
    height, width = weight.shape[2:]
    return F.conv2d(x, weight, bias, stride=stride, padding=(height // 2, width // 2), groups=groups)


@given(
    groups=small, ins=small, outs=small, stride=st.integers(1, 2), small_size=odd_size, border=st.tuples(small, small)
)
def test_padded_kernel_is_the_same_convolution(groups, ins, outs, stride, small_size, border):
    kernel = random_kernel(groups * outs, ins, small_size)
    size = tuple(old + 2 * more for old, more in zip(small_size, border, strict=True))
    padded = pad_weight(kernel.terms[0].weight, size)
    assert padded.shape[2:] == size
    x = torch.randn(2, groups * ins, 9, 8).double()
    padded = KernelSum((Term(padded),), kernel.bias)
    assert relative_error(convolve(x, padded, groups, stride), convolve(x, kernel, groups, stride)) < TOLERANCE


@pytest.mark.parametrize(('old', 'new'), [((3, 3), (1, 1)), ((1, 1), (2, 2)), ((3, 3), (3, 4)), ((3, 5), (5, 3))])
def test_kernel_that_does_not_fit_in_the_middle_is_refused(old, new):
    with pytest.raises(ValueError, match=f'{old[0]}x{old[1]} kernel in a {new[0]}x{new[1]}'):
        pad_weight(torch.zeros(2, 2, *old), new)


@given(groups=small, ins=small, outs=small, sizes=st.lists(odd_size, min_size=1, max_size=4), with_bias=st.booleans())
def test_sum_of_kernels_is_the_sum_of_convolutions(groups, ins, outs, sizes, with_bias):
    kernels = [random_kernel(groups * outs, ins, size) for size in [(max(ODD), max(ODD)), *sizes]]
    kernels[0] = kernels[0] if with_bias else KernelSum(kernels[0].terms)
    x = torch.randn(2, groups * ins, 9, 8).double()
    expected = sum(convolve(x, kernel, groups) for kernel in kernels)
    assert relative_error(convolve(x, add_kernels(*kernels), groups), expected) < TOLERANCE


@given(groups=small, per_group=small, size=odd_size)
def test_identity_kernel_changes_nothing(groups, per_group, size):
    x = torch.randn(2, groups * per_group, 9, 8).double()
    kernel = random_kernel(groups * per_group, per_group, size)
    identity = KernelSum((Term(identity_weight(kernel.terms[0].weight)),))
    assert torch.equal(convolve(x, identity, groups), x)
    expected = convolve(x, kernel, groups) + x
    for both in (add_kernels(kernel, identity_kernel()), add_kernels(identity_kernel(), kernel)):
        assert relative_error(convolve(x, both, groups), expected) < TOLERANCE


def test_identity_takes_no_step_for_each_channel():
    """It is made anew in every pass of a frozen block: steps that grow with the width would outweigh what it saves."""

    def steps(channels: int) -> int:
        weight = torch.zeros(channels, 1, 3, 3)
        with Operations() as operations:
            identity_weight(weight)
        return len(operations.names)

    assert steps(64) == steps(4)


@given(groups=small, ins=small, outs=small, size=odd_size, affine=st.booleans(), eps=st.sampled_from([1e-5, 1e-2]))
def test_folded_norm_is_convolution_and_norm(groups, ins, outs, size, affine, eps):
    kernel = random_kernel(groups * outs, ins, size)
    norm = randomize(nn.BatchNorm2d(groups * outs, eps, affine=affine).double()).eval()
    x = torch.randn(2, groups * ins, 9, 8).double()
    for given_kernel in (kernel, KernelSum(kernel.terms)):
        expected = norm(convolve(x, given_kernel, groups))
        assert relative_error(convolve(x, fold_norm(given_kernel, norm), groups), expected) < TOLERANCE


@given(groups=small, ins=small, outs=small, sizes=st.tuples(st.sampled_from(ODD), st.sampled_from(ODD)))
def test_difference_and_scale_of_kernels_are_those_of_convolutions(groups, ins, outs, sizes):
    large, little = (random_kernel(groups * outs, ins, (size, size)) for size in sorted(sizes, reverse=True))
    scale = torch.randn(groups * outs).double()
    x = torch.randn(2, groups * ins, 9, 8).double()
    expected = (convolve(x, large, groups) - convolve(x, little, groups)) * scale[:, None, None]
    kernel = scale_kernel(subtract_kernel(large, little), scale)
    assert relative_error(convolve(x, kernel, groups), expected) < TOLERANCE


@given(ins=small, outs=small, affine=st.booleans(), with_bias=st.booleans())
def test_norm_folded_into_what_follows_is_norm_and_linear_layer(ins, outs, affine, with_bias):
    norm = randomize(nn.BatchNorm2d(ins, 1e-2, affine=affine).double()).eval()
    linear = nn.Linear(ins, outs, bias=with_bias).double()
    x = torch.randn(2, ins, 9, 8).double()
    expected = linear(norm(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    kernel = fold_norm_before(norm, conv_kernel(linear))
    assert relative_error(convolve(x, kernel, groups=1), expected) < TOLERANCE


def test_norm_is_not_folded_into_a_larger_kernel_behind_it():
    with pytest.raises(ValueError, match='into a 3x3 kernel behind it, only into a 1x1 one'):
        fold_norm_before(nn.BatchNorm2d(2).eval(), random_kernel(2, 2, (3, 3)))


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest) -> ReparamBlock:
    """One block of each kind, float64, its statistics frozen."""
    return randomize(BLOCKS[request.param]().double()).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, 9, 7).double()


def fusion_error(block: ReparamBlock, x: Tensor, folded: ReparamBlock | None = None) -> float:
    """How far ``folded``, run as one convolution and deployed as one, is from the branches of ``block``."""
    folded = block if folded is None else folded
    with plain_formulation(block):
        expected = block(x)
    return max(relative_error(folded(x), expected), relative_error(folded.to_conv()(x), expected))


def test_block_equals_one_convolution(block, x):
    assert fusion_error(block, x) < TOLERANCE


def test_every_tensor_of_a_block_counts_in_its_kernel(block, x):
    """Twin: the check above fails with any one of them broken."""
    names = [name for name in block.state_dict() if not name.endswith('num_batches_tracked')]
    assert len(names) >= 2
    for name in names:
        broken = copy.deepcopy(block)
        broken.state_dict()[name].mul_(0.9)
        assert fusion_error(block, x, broken) > 1e3 * TOLERANCE, name


def gradients(block: ReparamBlock, x: Tensor) -> dict[str, Tensor]:
    """Gradients of every parameter and of the input; zero where there is none."""
    x = x.clone().requires_grad_()
    block.zero_grad()
    y = block(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double())
    leaves = {**dict(block.named_parameters()), 'input': x}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in leaves.items()}


def gradient_errors(block: ReparamBlock, x: Tensor) -> dict[str, float]:
    with plain_formulation(block):
        expected = gradients(block, x)
    assert all(gradient.norm() > 0 for gradient in expected.values())
    return {name: relative_error(gradient, expected[name]) for name, gradient in gradients(block, x).items()}


def test_gradients_of_one_convolution_are_those_of_the_branches(block, x):
    errors = gradient_errors(block, x)
    assert set(errors) == {*dict(block.named_parameters()), 'input'}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize('part', Kernel._fields)
def test_gradient_check_notices_a_detached_kernel(block, x, part, monkeypatch):
    kernel_of = type(block).equivalent_kernel

    def detached(self) -> Kernel:
        kernel = kernel_of(self)
        return kernel._replace(**{part: getattr(kernel, part).detach()})

    monkeypatch.setattr(type(block), 'equivalent_kernel', detached)
    assert max(gradient_errors(block, x).values()) > 0.01


def norms(block: ReparamBlock) -> list[_BatchNorm]:
    return [module for module in block.modules() if isinstance(module, _BatchNorm)]


def test_frozen_block_runs_no_branch_and_live_block_runs_them(block, x, monkeypatch):
    """One without a norm is always frozen."""
    runs = []
    monkeypatch.setattr(block, 'branches', lambda x, branches=block.branches: (runs.append(1), branches(x))[1])
    block(x)
    assert not runs
    if not norms(block):
        block.train()(x)
        assert not runs
        return
    last_norm = norms(block)[-1]
    last_norm.train()  # One live norm is enough.
    before = last_norm.running_mean.clone()
    block(x)
    assert runs
    assert not torch.equal(last_norm.running_mean, before)


def test_plain_formulation_runs_every_branch_and_ends(block, x, monkeypatch):
    """The second formulation takes nothing from the first one, not even in a block within the block."""
    kernels = []
    for cls in {type(module) for module in block.modules() if isinstance(module, ReparamBlock)}:

        def counted(self, branches_of=cls.folded_branches) -> KernelSum:
            kernels.append(self)
            return branches_of(self)

        monkeypatch.setattr(cls, 'folded_branches', counted)
    with plain_formulation(block):
        block(x)
    assert not kernels
    with pytest.raises(KeyError), plain_formulation(block):
        raise KeyError
    block(x)
    assert kernels


def randomize_otherwise(block: ReparamBlock, seed: int) -> ReparamBlock:
    """Fill a block's tensors as :func:`randomize` does, with numbers that differ from seed to seed."""
    randomize(block)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in block.state_dict().items():
        if not name.endswith('num_batches_tracked'):
            tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=generator).to(tensor))
    return block


class OtherNorm(nn.BatchNorm2d):
    """Any subclass of BatchNorm counts as one."""


class ProcessGroup:
    """Like that of a SyncBN: not to be copied."""

    def __deepcopy__(self, memo):
        raise TypeError('cannot pickle a process group')


def replace_norms(module: nn.Module, make: Callable[[int], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, make(child.num_features))
        else:
            replace_norms(child, make)


@pytest.mark.parametrize(
    'make_norm',
    [
        OtherNorm,
        nn.SyncBatchNorm,
        lambda channels: nn.SyncBatchNorm(channels, process_group=ProcessGroup()),
        lambda channels: nn.BatchNorm2d(channels, affine=False),
        lambda channels: nn.BatchNorm2d(channels, eps=0.1),
    ],
    ids=['subclass', 'sync', 'sync_in_group', 'no_affine', 'eps'],
)
def test_block_with_other_norms_equals_one_convolution(block, x, make_norm):
    replace_norms(block, make_norm)
    randomize(block.double()).eval()
    assert fusion_error(block, x) < TOLERANCE


def test_block_converted_to_sync_batch_norm_equals_one_convolution(block, x):
    expected = fusion_error(block, x, nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block)).eval())
    assert expected < TOLERANCE


def test_norm_without_statistics_runs_by_branches_and_is_not_deployed(block, x):
    if not norms(block):
        pytest.skip('it has no norm')
    replace_norms(block, lambda channels: nn.BatchNorm2d(channels, track_running_stats=False))
    block.double().eval()
    with plain_formulation(block):
        expected = block(x)
    assert torch.equal(block(x), expected)
    tree = nn.Sequential(ConvBN(6, 6).double(), block)
    before = list(tree.modules())
    with pytest.raises(ValueError, match='track_running_stats=True'):
        switch_to_deploy(tree)
    assert list(tree.modules()) == before


def make_tree() -> nn.ModuleDict:
    """Blocks in every kind of container, one of them in several places, beside modules that are none of ours."""
    shared = BLOCKS['token_mixer']()
    tree = nn.ModuleDict(
        OrderedDict(
            first=nn.Sequential(BLOCKS['token_mixer_v1'](), nn.GELU(), shared, shared),
            second=nn.ModuleList([shared, nn.Sequential(nn.ModuleDict({'deep': ConvBN(6, 6, 3)}))]),
            head=nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)),
        )
    )
    return randomize(tree.double()).eval()


def run_tree(tree: nn.ModuleDict, x: Tensor) -> Tensor:
    x = tree['first'](x)
    x = tree['second'][1][0]['deep'](tree['second'][0](x))
    return tree['head'](x)


def test_switch_to_deploy_fuses_a_tree_in_place(x):
    tree = make_tree()
    expected, head = run_tree(tree, x), list(tree['head'].modules())
    assert len(set(reparam_blocks(tree))) == 3
    assert switch_to_deploy(tree) is tree
    assert not any(isinstance(module, ReparamBlock) for module in tree.modules())
    assert relative_error(run_tree(tree, x), expected) < TOLERANCE
    assert list(tree['head'].modules()) == head, "another module's BatchNorm is left alone"
    assert [module for module in tree.modules() if isinstance(module, _BatchNorm)] == [tree['head'][1]]
    assert type(tree['second'][0]) is nn.Conv2d
    assert tree['second'][0] is tree['first'][2] is tree['first'][3], 'a shared block is one shared convolution'


def test_switch_to_deploy_of_a_block_returns_the_convolution(block, x):
    conv = switch_to_deploy(block)
    assert type(conv) is nn.Conv2d
    assert relative_error(conv(x), block(x)) < TOLERANCE


def test_switch_to_deploy_leaves_a_fused_tree_alone():
    tree = switch_to_deploy(make_tree())
    before, tensors = list(tree.modules()), copy.deepcopy(tree.state_dict())
    assert switch_to_deploy(tree) is tree
    assert list(tree.modules()) == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in tree.state_dict().items())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('requires_grad', [True, False], ids=['learning', 'frozen'])
def test_deployed_convolution_keeps_what_the_block_was(block, dtype, training, requires_grad):
    block.to(dtype).train(training).requires_grad_(requires_grad)
    exact = copy.deepcopy(block).double().equivalent_kernel()
    conv = switch_to_deploy(nn.Sequential(block))[0]
    assert conv.training is training
    for actual, expected in zip((conv.weight, conv.bias), exact, strict=True):
        assert isinstance(actual, nn.Parameter) and actual.is_leaf
        assert actual.requires_grad is requires_grad
        assert actual.dtype is dtype
        assert torch.equal(actual, expected.to(dtype)), 'folded in float64, then rounded once'


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a second device')
def test_deployed_convolution_stays_on_its_device(block, x):
    block, x = block.cuda(), x.cuda()
    assert fusion_error(block, x) < TOLERANCE
    assert block.to_conv().weight.device == x.device


def test_deployed_block_has_no_statistics(block):
    assert any(name.endswith(STATISTICS) for name in block.state_dict()) == bool(norms(block))
    assert list(switch_to_deploy(block).state_dict()) == ['weight', 'bias']


@pytest.fixture
def folds(block, monkeypatch) -> list[ReparamBlock]:
    """Grows each time that the kernel of ``block`` is computed from its parameters."""
    computed = []
    branches_of = type(block).folded_branches

    def counted(self) -> KernelSum:
        if self is block:
            computed.append(self)
        return branches_of(self)

    monkeypatch.setattr(type(block), 'folded_branches', counted)
    return computed


def is_current(block: ReparamBlock, x: Tensor) -> bool:
    """Whether the block, run without gradients as it is, computes what its branches do."""
    with torch.no_grad():
        actual = block(x)
        with plain_formulation(block):
            return relative_error(actual, block(x)) < TOLERANCE


def write_elements(block: ReparamBlock, write: Callable[[Tensor], None]) -> None:
    """Apply a write to each floating-point tensor of a block, and check that no version counter tells of it."""
    for tensor in block.state_dict().values():
        if tensor.is_floating_point():
            version, before = tensor._version, tensor.clone()
            write(tensor)
            assert tensor._version == version and not torch.equal(tensor, before)


def one_channel(tensor: Tensor) -> None:
    tensor.data[-1].mul_(1.5)


def through_numpy(tensor: Tensor) -> None:
    tensor.detach().numpy()[...] *= 1.5


def swap_channels(tensor: Tensor) -> None:
    tensor.data.copy_(tensor.data.flip(0).clone() if len(tensor) > 1 else 1.5 * tensor.data)


def through_a_vector(block: ReparamBlock) -> None:
    vector = nn.utils.parameters_to_vector(block.parameters())
    nn.utils.vector_to_parameters(1.5 * vector, block.parameters())


def new_data(block: ReparamBlock) -> None:
    for parameter in block.parameters():
        parameter.data = 1.5 * parameter.data


def one_element(block: ReparamBlock) -> None:
    weight = next(block.parameters()).data
    weight.view(-1)[-1] += 1e-3


def with_low_rank(block: ReparamBlock) -> None:
    """As LoRA does."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Parameter(torch.tensor(0.5).double())

        def forward(self, weight: Tensor) -> Tensor:
            return weight + self.more

    for module in list(block.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(module, 'weight', Added())


def pruned(block: ReparamBlock) -> None:
    for module in list(block.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            prune.random_unstructured(module, 'weight', 0.5)
            module.weight_orig.data.mul_(1.5)


WRITES = {
    'one channel': lambda block: write_elements(block, one_channel),
    'numpy': lambda block: write_elements(block, through_numpy),
    'channels swapped': lambda block: write_elements(block, swap_channels),
    'a vector': through_a_vector,
    'new data': new_data,
    'one element': one_element,
    'low rank': with_low_rank,
    'pruned': pruned,
    'another kind': lambda block: nn.Sequential(block).to(torch.float64),
    'assigned': lambda block: block.load_state_dict({n: 1.5 * t for n, t in block.state_dict().items()}, assign=True),
}
"""What can change a block and no version counter tells of."""


class TestKeptKernel:
    """Without gradients a kernel is computed once, and again as soon as it can have changed."""

    def test_computed_once(self, block, x, folds):
        for _ in range(3):
            assert is_current(block, x)
        assert len(folds) == 1

    def test_not_kept_where_gradients_flow(self, block, x, folds):
        for count in (1, 2):
            block(x).sum().backward()
            assert len(folds) == count

    def test_kept_where_nothing_learns(self, block, x, folds):
        block.requires_grad_(False)
        x.requires_grad_()
        for _ in range(2):
            block(x).sum().backward()
        assert len(folds) == 1
        block.requires_grad_(True)
        block(x).sum().backward()
        assert len(folds) == 2 and all(parameter.grad is not None for parameter in block.parameters())

    @torch.no_grad()
    def test_each_changed_tensor_is_noticed(self, block, x):
        is_current(block, x)
        for name, tensor in block.state_dict().items():
            if not name.endswith('num_batches_tracked'):
                tensor.mul_(1.5)
                assert is_current(block, x), name

    @torch.no_grad()
    def test_replaced_parameter_and_norm_are_noticed(self, block, x):
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                is_current(block, x)
                module.weight = nn.Parameter(module.weight * 1.5)
                assert is_current(block, x)
        replace_norms(block, lambda channels: randomize(nn.BatchNorm2d(channels, eps=0.1).double()).eval())
        assert is_current(block, x)

    @pytest.mark.parametrize('write', WRITES)
    def test_no_write_goes_unnoticed(self, block, x, write):
        assert is_current(block, x)
        with torch.no_grad():
            before = block(x)
        WRITES[write](block)
        assert is_current(block, x)
        if write != 'another kind':
            with torch.no_grad():
                assert relative_error(block(x), before) > 1e-8, 'the write changes what the block computes'

    @torch.no_grad()
    def test_another_epsilon_is_noticed(self, block, x):
        is_current(block, x)
        for norm in norms(block):
            norm.eps = 0.1
        assert is_current(block, x)

    @since_torch('2.4', 'AdamW(fused=True) on a CPU')
    def test_fused_optimizer(self, block, x):
        optimizer = torch.optim.AdamW(block.parameters(), lr=0.1, fused=True)
        assert is_current(block, x)
        for _ in range(2):
            before = copy.deepcopy(block.state_dict())
            block(x).square().sum().backward()
            optimizer.step()
            assert any(not torch.equal(before[name], p) for name, p in block.named_parameters())
            assert is_current(block, x)

    def test_copies_bring_their_own(self, block, x):
        for copied in (copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))):
            assert is_current(block, x)
            other = copied(block)
            new_data(other)
            assert is_current(other, x) and is_current(block, x)

    def test_kernel_of_inference_mode_serves_outside_it(self, block, x, folds):
        block.requires_grad_(False)
        with torch.inference_mode():
            block(x)
        x.requires_grad_()
        block(x).sum().backward()
        assert len(folds) == 1 and x.grad is not None

    def test_network_made_in_inference_mode_runs(self, x):
        with torch.inference_mode():
            block = randomize(ConvBN(6, 6).double()).eval()
            assert relative_error(block(x), block.branches(x)) < TOLERANCE


WIDER: dict[str, Callable[[int], ReparamBlock]] = {
    'conv_bn': lambda channels: ConvBN(channels, 2 * channels),
    'depthwise': lambda channels: ConvBN(channels, channels, 3, groups=channels),
    'token_mixer': lambda channels: TokenMixer(channels, norm_after_sum=True),
    'mobileone': lambda channels: MobileOneBlock(channels, channels, 1, num_convs=2),
    'layer_scale': lambda channels: LayerScale(nn.Conv2d(2 * channels, channels, 1), channels, 0.1),
}
"""Makes blocks of other widths than those of ``BLOCKS``."""


class TestManyKernels:
    """Kernels of many blocks at once are those of one block after the other."""

    @pytest.fixture
    def blocks(self) -> list[ReparamBlock]:
        blocks = [make().double() for make in BLOCKS.values() for _ in range(3)]
        return [randomize_otherwise(block, index).eval() for index, block in enumerate(blocks)]

    @staticmethod
    def run(blocks: list[ReparamBlock], kernels: dict[ReparamBlock, Kernel]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        tensors = [tensor for block in blocks for tensor in kernels[block]]
        loss = sum((t * torch.randn(t.shape, generator=generator).double()).sum() for t in tensors)
        parameters = [parameter for block in blocks for parameter in block.parameters() if parameter.requires_grad]
        return [*tensors, *torch.autograd.grad(loss, parameters)]

    @pytest.fixture(params=['all', 'some weights frozen', 'some norms frozen'])
    def mixed(self, request, blocks) -> list[ReparamBlock]:
        """Blocks of several widths, of which parts may not learn."""
        blocks += [randomize_otherwise(make(8).double(), 99).eval() for make in WIDER.values()]
        blocks[0].bn.eps = 0.1  # It is of a kind of its own then.
        for block in blocks[::3]:
            for parameter in block.parameters():
                frozen = parameter.ndim == 4 if request.param == 'some weights frozen' else parameter.ndim == 1
                parameter.requires_grad_(request.param == 'all' or not frozen)
        return blocks

    def test_same_kernels_and_gradients(self, mixed):
        expected = self.run(mixed, {block: block.equivalent_kernel() for block in mixed})
        actual = self.run(mixed, equivalent_kernels(mixed))
        assert len(actual) == len(expected)
        assert max(map(relative_error, actual, expected)) < TOLERANCE

    def test_second_derivatives(self, blocks):
        """They take gradients that are not overwritten."""

        def penalty(kernels: dict[ReparamBlock, Kernel]) -> Tensor:
            loss = sum(tensor.pow(3).sum() for block in blocks for tensor in kernels[block])
            parameters = [p for block in blocks for p in block.parameters()]
            return sum(g.pow(2).sum() for g in torch.autograd.grad(loss, parameters, create_graph=True))

        parameters = [p for block in blocks for p in block.parameters()]
        expected = torch.autograd.grad(penalty({b: b.equivalent_kernel() for b in blocks}), parameters)
        actual = torch.autograd.grad(penalty(equivalent_kernels(blocks)), parameters)
        assert max(map(relative_error, actual, expected)) < TOLERANCE

    def test_gradients_of_several_losses_at_once(self, blocks):
        """By ``vmap`` over the backward pass."""
        kernels = equivalent_kernels(blocks)
        outputs = torch.cat([tensor.flatten()[:1] for block in blocks for tensor in kernels[block]])
        parameters = [p for block in blocks for p in block.parameters()]
        options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
        batch = torch.eye(len(outputs)).double()
        together = torch.autograd.grad(outputs, parameters, batch, is_grads_batched=True, **options)
        for index in (0, len(outputs) // 2, len(outputs) - 1):
            alone = torch.autograd.grad(outputs[index], parameters, **options)
            assert all(torch.equal(several[index], one) for several, one in zip(together, alone, strict=True))

    def test_block_in_several_places(self, block, x):
        learning = nn.Sequential(block, nn.GELU(), block)
        if block(x).shape != x.shape:
            pytest.skip('its output does not fit its input')
        with plain_formulation(block):
            expected = gradients(learning, x)
        with kernels_together(learning):
            actual = gradients(learning, x)
        assert max(relative_error(actual[name], gradient) for name, gradient in expected.items()) < TOLERANCE

    def test_block_with_a_parametrization_is_folded_by_itself(self, blocks):
        for block in blocks[::2]:
            with_low_rank(block)
        expected = self.run(blocks, {block: block.equivalent_kernel() for block in blocks})
        assert max(map(relative_error, self.run(blocks, equivalent_kernels(blocks)), expected)) < TOLERANCE

    def test_takes_as_many_operations_for_more_blocks_of_a_kind(self):
        def operations(count: int) -> int:
            blocks = [BLOCKS['token_mixer']() for _ in range(count)]
            with Operations() as counted:
                for kernel in equivalent_kernels(blocks).values():
                    assert kernel.weight.shape == (6, 1, 3, 3)
            return len(counted.names)

        assert operations(9) == operations(3)

    def test_blocks_use_them_within_the_context_alone(self, block, x, folds):
        learning = nn.Sequential(block)
        with plain_formulation(block):
            expected = gradients(learning, x)
        with kernels_together(learning):
            folds.clear()
            actual = gradients(learning, x)
            assert not folds
        assert max(relative_error(actual[name], gradient) for name, gradient in expected.items()) < TOLERANCE
        block(x)
        assert len(folds) == 1
        with pytest.raises(KeyError), kernels_together(learning):
            folds.clear()
            raise KeyError
        block(x)
        assert len(folds) == 1

    def test_live_blocks_are_left_alone(self, block, x, folds):
        block.train()
        with kernels_together(block):
            block(x)
        assert bool(folds) == (not norms(block))

    def test_blocks_that_do_not_learn_get_no_gradients(self, blocks):
        for block in blocks[::2]:
            block.requires_grad_(False)
        for block, kernel in equivalent_kernels(blocks).items():
            assert kernel.weight.requires_grad == any(p.requires_grad for p in block.parameters())


class TestHooksInside:
    """What is hooked to a module inside a block sees it called, frozen or not."""

    @pytest.mark.parametrize('learning', [False, True])
    def test_hook_is_called(self, block, x, learning):
        for module in list(block.modules())[1:]:
            if isinstance(module, nn.ModuleList):
                continue
            seen = []
            handle = module.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
            with torch.set_grad_enabled(learning):
                output = block(x)
                with plain_formulation(block):
                    assert relative_error(output, block(x)) < TOLERANCE
            assert len(seen) == 2 and relative_error(*seen) < TOLERANCE
            handle.remove()
            block(x)
            assert len(seen) == 2

    def test_weight_that_a_hook_computes_is_not_fused(self, block):
        pruned(block)
        before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        with pytest.raises(ValueError, match=r'computes .*weight of a .*permanent'):
            switch_to_deploy(nn.Sequential(block))
        assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())

    def test_pruning_made_permanent_is_fused(self, block, x):
        pruned(block)
        expected = block(x)
        for module in list(block.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear):
                prune.remove(module, 'weight')
        assert relative_error(switch_to_deploy(block)(x), expected) < TOLERANCE
