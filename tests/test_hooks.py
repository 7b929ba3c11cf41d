"""The hook in MMEngine's own Runner: a backbone with a head that learns to tell dark images from bright ones."""

import copy
import logging
import re
import uuid
from collections.abc import Callable, Sequence
from functools import partialmethod
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from helpers import SMALL, randomize, slow_but
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import Tensor, nn
from torch.fx import GraphModule

import repvit_mm.hooks
from repvit_mm import FuseOnDeployHook
from repvit_mm.checkpoint import CheckpointError, read_checkpoint, read_pickle
from repvit_mm.compilation import CompilerError
from repvit_mm.reparam import reparam_blocks

FUSE = dict(type='FuseOnDeployHook')
HALF = dict(type='HalfPrecisionHook', dtype='bfloat16')
COMPILE = dict(type='CompileHook')
WHOLE = dict(type='WholeCheckpointHook')


class Net(BaseModel):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.LazyBatchNorm2d(), nn.LazyConv2d(1, 1))
        self.head(backbone(torch.zeros(2, 3, 64, 64))[-1])

    def forward(self, inputs: Tensor, label: Tensor, mode: str) -> dict[str, Tensor] | list[Tensor]:
        inputs = inputs.to(self.head[1].weight.dtype)
        outputs = self.head(self.backbone(inputs)[-1]).mean((1, 2, 3))
        return {'loss': (outputs - label).square().mean()} if mode == 'loss' else list(outputs)


class Outputs(BaseMetric):
    """The network's output for each image."""

    def process(self, data_batch: dict, data_samples: Sequence[Tensor]) -> None:
        self.results += [sample.item() for sample in data_samples]

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return {f'image{i}': output for i, output in enumerate(results)}


class Watch(Hook):
    """Counts the blocks left to fuse while the runner validates and tests."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.blocks: dict[str, list[int]] = {'val': [], 'test': []}

    def after_val_iter(self, runner: Runner, *args, **kwargs) -> None:
        self.blocks['val'].append(len(reparam_blocks(runner.model)))

    def after_test_iter(self, runner: Runner, *args, **kwargs) -> None:
        self.blocks['test'].append(len(reparam_blocks(runner.model)))


@pytest.fixture(params=slow_but(['repvit', 'fastvit'], SMALL))
def net(request: pytest.FixtureRequest) -> Net:
    cls, arch = SMALL[request.param]
    return randomize(Net(cls(arch)))


@pytest.fixture
def make_runner(tmp_path, monkeypatch) -> Callable[..., Runner]:
    """Makes a runner that can train, validate and test on four small images."""
    # Matplotlib's figures, on which nothing is drawn, take longer than all else of a runner.
    figure = MagicMock()
    monkeypatch.setattr(Visualizer, '_initialize_fig', lambda *_: (figure,) * 3)

    def make_runner(model: nn.Module, *hooks: dict | Hook, **options) -> Runner:
        generator = torch.Generator().manual_seed(0)
        data = [
            dict(inputs=torch.randn(3, 32, 64, generator=generator) + label, label=torch.tensor(float(label)))
            for label in (0, 1, 0, 1)
        ]
        loader = dict(
            batch_size=2,
            num_workers=0,
            dataset=data,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        )
        return Runner(
            model,
            work_dir=str(tmp_path),
            experiment_name=uuid.uuid4().hex,
            train_dataloader=copy.deepcopy(loader),
            train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05)),
            val_dataloader=copy.deepcopy(loader),
            val_cfg={},
            val_evaluator=[Outputs()],
            test_dataloader=copy.deepcopy(loader),
            test_cfg={},
            test_evaluator=[Outputs()],
            custom_hooks=list(hooks),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
            **options,
        )

    return make_runner


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """What the hook logs."""
    lines = []

    def print_log(message: str, logger: str, level: int) -> None:
        assert logger == 'current' and level == logging.INFO
        lines.append(message)

    monkeypatch.setattr(repvit_mm.hooks, 'print_log', print_log)
    return lines


def test_fuses_before_a_test_run(net, make_runner, lines):
    blocks = len(reparam_blocks(net))
    expected = make_runner(copy.deepcopy(net)).test()
    watch = Watch()
    runner = make_runner(net, FUSE, watch)
    assert runner.test() == pytest.approx(expected, rel=1e-4)
    assert len(set(expected.values())) == 4, 'the outputs tell the images apart'
    assert watch.blocks['test'] == [0, 0]
    assert isinstance(net.head[0], nn.BatchNorm2d), 'the head is not fused'
    found = re.fullmatch(rf'.*: fused {blocks} blocks; .* difference is (\S+), (\S+) of the largest output', *lines)
    assert 0 < float(found[2]) < 1e-4
    assert float(found[1]) > 0


def test_half_precision_gets_more_tolerance(net, make_runner, lines):
    expected = make_runner(copy.deepcopy(net)).test()
    assert make_runner(net.bfloat16(), FUSE).test() == pytest.approx(expected, abs=0.03)
    assert not reparam_blocks(net)
    relative = float(re.search(r'(\S+) of the largest output', *lines)[1])
    assert relative > FuseOnDeployHook().tolerance


def test_logged_difference_is_that_of_the_maps(net, make_runner, lines, monkeypatch):
    """A fused backbone whose maps are all off by a constant is caught out by just that constant."""

    def fuse_and_spoil(model: nn.Module) -> nn.Module:
        fuse(model)
        model.backbone.register_forward_hook(lambda module, args, maps: tuple(m + 1000 for m in maps))
        return model

    fuse = repvit_mm.hooks.switch_to_deploy
    monkeypatch.setattr(repvit_mm.hooks, 'switch_to_deploy', fuse_and_spoil)
    with pytest.raises(RuntimeError, match='BatchNorm statistics'):
        make_runner(net, FUSE).test()
    assert 'largest output difference is 1.00e+03,' in lines[0]


def test_fused_model_is_left_alone(net, make_runner, lines):
    make_runner(net, FUSE).test()
    modules = list(net.modules())
    lines.clear()
    make_runner(net, FUSE).test()
    assert list(net.modules()) == modules
    assert lines == ['FuseOnDeployHook: the backbone is fused already']


def test_stand_alone_validation_is_not_fused(net, make_runner, lines):
    blocks = len(reparam_blocks(net))
    make_runner(net, FUSE).val()
    assert len(reparam_blocks(net)) == blocks
    assert not lines


def test_run_that_trains_is_never_fused(net, make_runner, lines):
    blocks, before = len(reparam_blocks(net)), copy.deepcopy(net.state_dict())
    watch = Watch()
    runner = make_runner(net, FUSE, watch)
    runner.train()
    assert watch.blocks['val'] == [blocks] * 4, 'two epochs of two batches'
    assert not any(torch.equal(before[name], parameter) for name, parameter in net.named_parameters())
    runner.test()
    assert watch.blocks['test'] == [blocks] * 2
    assert lines == ['FuseOnDeployHook: this run trains, the model stays as it is']
    net.train()


@pytest.mark.parametrize('hooks', [[HALF], [FUSE, HALF], [HALF, FUSE]], ids=['unfused', 'fused', 'in other order'])
def test_half_precision_of_a_test_run(net, make_runner, lines, hooks):
    """In whatever order the hooks are named, kernels are folded before they are rounded: the log tells."""
    blocks = len(reparam_blocks(net))
    expected = make_runner(copy.deepcopy(net)).test()
    found = make_runner(net, *hooks).test()
    assert found != expected and found == pytest.approx(expected, abs=0.05)
    assert len(reparam_blocks(net)) == (0 if FUSE in hooks else blocks)
    assert all(float(re.search(r'(\S+) of the largest output', line)[1]) < 1e-4 for line in lines)


def test_half_precision_with_an_average(net, make_runner):
    expected = make_runner(copy.deepcopy(net)).test()
    found = make_runner(net, dict(type='EMAHook'), FUSE, HALF).test()
    assert found != expected and found == pytest.approx(expected, abs=0.05)


def test_run_that_trains_stays_in_float32(net, make_runner, lines):
    runner = make_runner(net, HALF)
    runner.train()
    runner.test()
    assert lines == ['HalfPrecisionHook: this run trains, the model stays as it is']
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    assert net.backbone.forward.__func__ is type(net.backbone).forward


@pytest.fixture
def compiled_graphs(monkeypatch) -> list[int]:
    """The number of operations of each graph that torch.compile hands to a compiler, which runs it as it is."""
    sizes = []

    def run_as_it_is(graph: GraphModule, inputs: list[Tensor]) -> Callable:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(nn.Module, 'compile', partialmethod(nn.Module.compile, backend=run_as_it_is))
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize('net', ['repvit', 'fastvit'], indirect=True)
@pytest.mark.parametrize(
    ('hooks', 'tolerance'),
    [([COMPILE], 1e-4), ([FUSE, COMPILE], 1e-4), ([COMPILE, HALF, FUSE], 0.05)],
    ids=['unfused', 'fused', 'in bfloat16, in other order'],
)
def test_compiled_test_run(net, make_runner, compiled_graphs, hooks, tolerance):
    """The backbone is one graph, and metrics stay."""
    expected = make_runner(copy.deepcopy(net)).test()
    assert not compiled_graphs
    assert make_runner(net, *hooks).test() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert len(compiled_graphs) == 1 and compiled_graphs[0] > 20


def test_run_that_trains_is_not_compiled(net, make_runner, compiled_graphs, lines):
    runner = make_runner(net, COMPILE)
    runner.train()
    runner.test()
    assert lines == ['CompileHook: this run trains, the model stays as it is'] and not compiled_graphs


def test_compiler_that_is_missing_ends_the_run(net, make_runner, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    with pytest.raises(CompilerError, match=r'^torch\.compile needs a C\+\+ compiler: install g\+\+'):
        make_runner(net, COMPILE).test()


@pytest.mark.parametrize('position', [0, -1], ids=['stem', 'last_stage'])
@pytest.mark.parametrize('value', [float('nan'), -1.0])
def test_broken_statistics_end_the_run(net, make_runner, position, value):
    norms = [module for module in net.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[position].running_var.fill_(value)
    with pytest.raises(RuntimeError, match='check the checkpoint for broken BatchNorm statistics'):
        make_runner(net, FUSE).test()


def test_difference_beyond_the_tolerance_ends_the_run(net, make_runner):
    with pytest.raises(RuntimeError, match=r'more than tolerance=0\.00e\+00'):
        make_runner(net, FuseOnDeployHook(tolerance=0.0)).test()


def test_model_without_our_backbone_ends_the_run(net, make_runner):
    class Foreign(nn.Module):
        def forward(self, x):
            return (x,)

    with pytest.raises(RuntimeError, match='no backbone of repvit_mm'):
        make_runner(Net(Foreign()), FUSE).test()


@pytest.mark.needs_ops
def test_hook_resolves_from_every_scope():
    import mmdet.registry
    import mmseg.registry

    for registry in (HOOKS, mmdet.registry.HOOKS, mmseg.registry.HOOKS):
        assert isinstance(registry.build({**FUSE, 'tolerance': 0.1}), FuseOnDeployHook)


class TestAveraged:
    """EMAHook tests with an averaged copy of the weights that it exchanges with the model's, one by one in order."""

    @pytest.mark.parametrize('net', slow_but(['repvit'], SMALL), indirect=True)
    @pytest.mark.parametrize('update_buffers', [False, True])
    def test_trained_average(self, net, make_runner, tmp_path, update_buffers):
        ema = dict(type='EMAHook', momentum=0.2, update_buffers=update_buffers)
        start = copy.deepcopy(net)
        make_runner(net, ema, FUSE).train()
        file = str(tmp_path / 'epoch_2.pth')
        averaged, last = read_checkpoint(file)['state_dict'], net.state_dict()
        moved = [not torch.equal(averaged[name], last[name]) for name, _ in net.named_parameters()]
        assert sum(moved) >= len(moved) - 1, "the head's norm takes away what the last bias adds"

        start.load_state_dict(averaged)
        expected = make_runner(copy.deepcopy(start)).test()
        assert make_runner(net).test() != pytest.approx(expected, rel=1e-2), 'the average is not the last network'
        unfused = make_runner(copy.deepcopy(start), ema, load_from=file).test()
        fused = make_runner(copy.deepcopy(start), ema, FUSE, load_from=file).test()
        assert unfused == pytest.approx(expected, rel=1e-4)
        assert fused == pytest.approx(expected, rel=1e-4)

    class Average(Hook):
        """Gives the averaged copy weights of its own, before anything is fused."""

        priority = 'HIGHEST'

        def __init__(self, net: Net) -> None:
            self.net = net

        def before_test(self, runner: Runner) -> None:
            ema = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
            ema.ema_model.module.load_state_dict(self.net.state_dict())

    @pytest.fixture
    def other(self, net: Net) -> Net:
        other = copy.deepcopy(net)
        for parameter in other.parameters():
            parameter.data.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2))
        return other

    @pytest.mark.parametrize('net', slow_but(['repvit'], SMALL), indirect=True)
    @pytest.mark.parametrize('fuse', [[FUSE], []], ids=['fused', 'unfused'])
    def test_average_is_exchanged_tensor_by_tensor(self, net, other, make_runner, fuse):
        """Under the kernels, too, that the unfused network keeps between passes."""
        expected, before = (make_runner(copy.deepcopy(network)).test() for network in (other, net))
        assert expected != pytest.approx(before, rel=1e-2)
        runner = make_runner(net, dict(type='EMAHook'), *fuse, self.Average(other))
        with torch.no_grad():
            net.eval().backbone(torch.zeros(1, 3, 64, 64))
        assert all(block._kept is not None for block in reparam_blocks(net.backbone))
        assert runner.test() == pytest.approx(expected, rel=1e-4)
        assert bool(reparam_blocks(net)) != bool(fuse)
        assert make_runner(net).test() == pytest.approx(before, rel=1e-4), 'and exchanged back'

    def test_average_that_is_not_fused_is_noticed(self, net, other, make_runner, monkeypatch):
        """Twin: fusing the model alone mixes tensors up."""
        monkeypatch.setattr(repvit_mm.hooks, 'EMAHook', type('NoHook', (), {}))
        with pytest.raises(RuntimeError, match='size of tensor'):
            make_runner(net, dict(type='EMAHook'), FUSE, self.Average(other)).test()


def test_distributed_wrapper(net, make_runner, tmp_path):
    expected = make_runner(copy.deepcopy(net)).test()
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        watch = Watch()
        metrics = make_runner(MMDistributedDataParallel(net), dict(type='EMAHook'), FUSE, watch).test()
    finally:
        dist.destroy_process_group()
    assert metrics == pytest.approx(expected, rel=1e-4)
    assert watch.blocks['test'] == [0, 0]
    assert not reparam_blocks(net)


class TestWholeCheckpoint:
    """A checkpoint must have all that the backbone does not see to itself."""

    @pytest.mark.parametrize(
        ('prefix', 'hooks'),
        [('module.', []), ('', [dict(type='EMAHook'), FUSE])],
        ids=['wrapped for running in parallel', 'beside other hooks'],
    )
    def test_whole_file_is_taken_and_read_once(self, net, make_runner, tmp_path, monkeypatch, prefix, hooks):
        expected = make_runner(copy.deepcopy(net)).test()
        file = tmp_path / 'a.pth'
        torch.save({'state_dict': {prefix + name: tensor for name, tensor in net.state_dict().items()}}, file)
        net.head[1].weight.data.zero_()
        reads = []
        monkeypatch.setattr(
            'repvit_mm.checkpoint.read_pickle', lambda *given: reads.append(given) or read_pickle(*given)
        )
        assert make_runner(net, WHOLE, *hooks, load_from=str(file)).test() == pytest.approx(expected, rel=1e-4)
        assert len(reads) == 1

    @pytest.mark.parametrize(
        ('change', 'message'),
        [
            (lambda t: t.pop('head.1.bias'), r'missing: 1 \(head\.1\.bias\)$'),
            (
                lambda t: t.update({'head.1.weight': torch.zeros(2, 3)}),
                r'of another shape: 1 \(head\.1\.weight: \(2, 3\) for \(1, \d+, 1, 1\)\)$',
            ),
            (
                lambda t: [t.pop(name) for name in list(t) if name.startswith('head.')],
                r'missing: 6 \(head\.0\.weight\)$',
            ),
        ],
        ids=['missing', 'shape', 'backbone alone'],
    )
    def test_other_file_is_refused(self, net, make_runner, tmp_path, change, message):
        """Without the hook MMEngine tests with what the file does not have at random."""
        tensors = net.state_dict()
        change(tensors)
        torch.save({'state_dict': tensors}, tmp_path / 'a.pth')
        options = dict(load_from=str(tmp_path / 'a.pth'))
        make_runner(copy.deepcopy(net), **options).test()
        with pytest.raises(
            CheckpointError, match=rf'a\.pth is not of this config: outside the backbone tensors {message}'
        ):
            make_runner(net, WHOLE, **options).test()

    def test_counters_and_other_tensors_do_not_matter(self, net, make_runner, tmp_path):
        tensors = {name: t for name, t in net.state_dict().items() if not name.startswith('head.0.num_batches')}
        torch.save({'state_dict': {**tensors, 'auxiliary_head.weight': torch.ones(1)}}, tmp_path / 'a.pth')
        make_runner(net, WHOLE, load_from=str(tmp_path / 'a.pth')).test()

    def test_file_without_tensors_is_named(self, net, make_runner, tmp_path):
        torch.save({'state_dict': {}}, tmp_path / 'a.pth')
        options = dict(load_from=str(tmp_path / 'a.pth'))
        with pytest.raises(CheckpointError, match=r'checkpoint .*a\.pth is not of this config'):
            make_runner(net, WHOLE, cfg=Config(options), **options).test()
