"""What the benchmark counts: arithmetic and memory, by hand and by published figures."""

from contextlib import ExitStack

import pytest
import torch
from helpers import SMALL, largest_error, randomize
from torch import nn

from repvit_mm import RepViT, switch_to_deploy
from repvit_mm.deploy.benchmark import measures
from repvit_mm.deploy.benchmark.measures import count_macs, count_parameters, matrix_product, peak_bytes, saved_bytes
from repvit_mm.deploy.benchmark.routes import plain_copy
from repvit_mm.deploy.benchmark.synthetic import make_trained_like

CPU = torch.device('cpu')


# G at 224x224, from the authors' README; their classifiers add less than 0.001.
@pytest.mark.parametrize(
    ('arch', 'published'), [('m0_9', 0.8), ('m1_0', 1.1), ('m1_1', 1.3), ('m1_5', 2.3), ('m2_3', 4.5)]
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
