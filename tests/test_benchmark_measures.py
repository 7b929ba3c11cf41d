"""What the benchmark counts: arithmetic and memory, by hand and by published figures."""

from contextlib import ExitStack

import pytest
import torch
from helpers import SMALL, largest_error, randomize, slow_but
from torch import nn

from repvit_mm import FastViT, MobileOne, RepViT, switch_to_deploy
from repvit_mm.deploy.benchmark import measures
from repvit_mm.deploy.benchmark.measures import count_macs, count_parameters, matrix_product, peak_bytes, saved_bytes
from repvit_mm.deploy.benchmark.routes import plain_copy
from repvit_mm.deploy.benchmark.synthetic import make_trained_like
from repvit_mm.deploy.benchmark.training import LOSSES, measure_gradients, measure_traffic
from repvit_mm.fastvit import RepMixer

CPU = torch.device('cpu')


# G at 224x224, from the authors' README; their classifiers add less than 0.001.
@pytest.mark.parametrize(
    ('arch', 'published'),
    [
        ('m0_9', 0.8),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [('m1_0', 1.1), ('m1_1', 1.3), ('m1_5', 2.3), ('m2_3', 4.5)]
        ),
    ],
)
def test_macs_are_the_published_ones(arch, published):
    network = switch_to_deploy(RepViT(arch).eval())
    assert round(count_macs(network, torch.zeros(1, 3, 224, 224)) / 1e9, 1) == published


def test_macs_and_parameters_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 1, 1, groups=8)).eval()
    assert count_macs(network, torch.zeros(1, 3, 8, 8)) == 16 * 8 * 27 + 16 * 8 * 9
    assert count_parameters(network) == (8 * 27 + 8) + 16 + (8 * 9 + 8)


def test_matrix_product_has_as_many_multiply_accumulates(monkeypatch):
    monkeypatch.setitem(measures.MATRIX_SIZE, 'cpu', 64)
    product, macs = matrix_product(CPU, torch.float32)
    assert product().shape == (64, 64) and macs == 64**3


class TestMemory:
    def test_saved_for_backward_by_hand(self):
        """The convolution keeps its input, GELU the convolution's output, the sum of two views one tensor once."""
        network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU())
        image = torch.randn(2, 3, 8, 8)
        numbers = image.numel() + 2 * 4 * 8 * 8
        assert saved_bytes(lambda: network(image).sum().backward(), network) == 4 * numbers

        def views():
            hidden = network(image)
            (hidden[:, :2] * hidden[:, 2:]).sum().backward()

        assert saved_bytes(views, network) == 4 * (numbers + 2 * 4 * 8 * 8)

    def test_frozen_block_saves_less_than_its_branches(self):
        network = randomize(RepViT(SMALL['repvit'][1], norm_eval=True)).train()
        images = torch.randn(2, 3, 128, 128)
        with ExitStack() as stack:
            plain = plain_copy(network, stack)
            saved = [
                saved_bytes(lambda model=model: sum(x.sum() for x in model(images)).backward(), model)
                for model in (plain, network)
            ]
        assert saved[1] < saved[0]

    def test_peak_by_hand(self):
        def run():
            first = torch.zeros(1000)
            second = first.neg()
            del first
            return second.neg()

        # Two tensors of 4000 bytes live at once, never three.
        assert peak_bytes(run, CPU) == 8000


class TestTraffic:
    def test_by_hand(self):
        """In bytes: of 64 float32 numbers each way, but for what is a view, a product or repeated."""
        x, number = torch.ones(8, 8), 64 * 4
        with measures.Traffic() as traffic:
            y = x.t() + x  # reads two, writes one
            y.add_(x[:1].expand(8, 8))  # reads y and one row, writes y
            y @ x
            torch.empty_like(x).copy_(y)  # reads one, writes one
            torch.zeros_like(x)  # writes one
        assert traffic.operations == 5
        assert traffic.elementwise_bytes == 3 * number + (2 * number + number // 8) + 2 * number + number
        assert traffic.bias_bytes == 0

    @pytest.mark.parametrize('bias', [False, True])
    def test_of_a_convolution_only_the_bias_counts_and_apart(self, bias):
        conv, x = nn.Conv2d(3, 4, 1, bias=bias), torch.zeros(1, 3, 8, 8)
        with measures.Traffic() as traffic:
            conv(x)
        assert (traffic.operations, traffic.elementwise_bytes) == (1, 0)
        assert traffic.bias_bytes == (2 * 4 * 64 * 4 if bias else 0)

    def test_backward_counts(self):
        x = torch.ones(8, 8, requires_grad=True)
        with measures.Traffic() as traffic:
            torch.nn.functional.gelu(x).backward(torch.ones(8, 8))  # ones, GELU and its gradient
        assert traffic.operations == 3 and traffic.elementwise_bytes == (1 + 2 + 3) * 64 * 4

    def test_folded_training_moves_less_than_the_branches(self):
        """The more of it the larger the maps are in terms of the kernels."""
        arch = dict(channels=(8, 16, 24, 32), depths=(6, 4, 4, 1))
        rows = measure_traffic('small', randomize(RepViT(arch, norm_eval=True)).train(), 1, (384, 384))
        routes = ('plain', 'folded', 'folded, all maps kept', 'deployed')
        assert [(row['name'], row['route']) for row in rows] == [
            (f'small {precision}', route) for precision in ('float32', 'mixed') for route in routes
        ]
        assert all(row['operations'] > 100 and row['bias_bytes'] > 0 for row in rows)
        for plain, folded, keeping, deployed in (rows[:4], rows[4:]):
            assert plain['times_plain'] == 1
            assert folded['times_plain'] == folded['elementwise_bytes'] / plain['elementwise_bytes']
            assert deployed['operations'] < keeping['operations'] < folded['operations']
            assert deployed['elementwise_bytes'] < keeping['elementwise_bytes'] < folded['elementwise_bytes']
        plain, folded, *_ = rows[:4]
        assert folded['times_plain'] < 0.6 and folded['operations'] < plain['operations']
        # Where a processor does not add a float32 bias inside the convolution, it is a pass of its own. Together they
        # are the same everywhere.
        plain, folded = (row['elementwise_bytes'] + row['bias_bytes'] for row in rows[4:6])
        assert folded < 0.75 * plain
        assert folded < 0.6 * (rows[1]['elementwise_bytes'] + rows[1]['bias_bytes']), 'maps are half as large'


NETWORKS = {
    'fastvit': (FastViT, dict(channels=(8, 16, 32, 64), depths=(1, 1, 12, 1), mlp_ratio=2)),
    'attention': (FastViT, dict(channels=(8, 16, 32, 64), depths=(1, 1, 6, 4), mlp_ratio=2, attention=True)),
    'mobileone': (MobileOne, dict(channels=(16, 32, 48, 64), depths=(1, 3, 6, 1), num_convs=2)),
}


class TestGradients:
    """In mixed precision they are no farther from float64 than the branches', however deep the network is."""

    def times_plain(self, name: str) -> list[float]:
        cls, arch = NETWORKS[name]
        networks = []
        for seed in range(2):
            torch.manual_seed(seed)
            networks.append(cls(arch, norm_eval=True))
            make_trained_like(networks[-1], torch.randn(2, 3, 96, 96))
        plain, folded = measure_gradients(name, [network.train() for network in networks], 2, (64, 64))
        assert (plain['route'], folded['route']) == ('plain', 'folded')
        assert all(1e-3 < row[loss] < 0.2 for row in (plain, folded) for loss in LOSSES)
        assert all(folded[f'{loss}_times_plain'] == folded[loss] / plain[loss] for loss in LOSSES)
        return [folded[f'{loss}_times_plain'] for loss in LOSSES]

    @pytest.mark.parametrize('name', slow_but(['attention'], NETWORKS))
    def test_no_farther_than_those_of_the_branches(self, name):
        assert max(self.times_plain(name)) < 1

    @pytest.mark.slow
    def test_residual_sums_in_bfloat16_are_noticed(self, monkeypatch):
        """Twin: the branches' layer scale keeps them in float32."""
        monkeypatch.delattr(RepMixer, 'forward')
        assert max(self.times_plain('fastvit')) > 1


def test_weights_like_trained_ones():
    """No branch is hidden: a change in the last block of all shows in the maps."""
    network = RepViT(SMALL['repvit'][1])
    images = torch.randn(2, 3, 128, 128)
    make_trained_like(network, images)
    assert not network.training
    with torch.no_grad():
        before = network(images)
        network.stages[0][0].channel_mixer.project.bn.weight.mul_(1.1)
        assert largest_error(network(images), before) > 1e-3
        assert all(0.1 < map_.std() < 10 for map_ in before)
