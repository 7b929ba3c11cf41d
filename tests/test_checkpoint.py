"""Other people's checkpoints: tensor names translated one to one, files read by the framework's own machinery."""

import os
import pickle
import re

import numpy as np
import pytest
import torch
from helpers import GOLDENS, HEADS, Golden
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from repvit_mm import switch_to_deploy
from repvit_mm.checkpoint import STATISTICS, read_checkpoint, translate, unwrap

golden_names = pytest.mark.parametrize('golden', GOLDENS, ids=lambda golden: golden.name)


def our_shapes(golden: Golden, deploy: bool = False) -> dict[str, tuple[int, ...]]:
    network = golden.backbone(golden.arch, deploy=deploy)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def fuse_names(names: list[str]) -> list[str]:
    """The tensors that a reference network is left with once its owners' code has fused it."""
    fused = {}
    for name in names:
        # A convolution and its norm become one; so do all branches of a re-parameterizable depthwise block.
        name = re.sub(r'(\.c)?\.weight$|\.bn\.weight$', '.weight', name)
        name = re.sub(r'(\.bn)?\.(bias|running_mean|running_var|num_batches_tracked)$', '.bias', name)
        name = re.sub(r'(token_mixer(\.0)?)\.conv1?\.(weight|bias)$', r'\1.\3', name)
        fused[name] = None
    return list(fused)


@golden_names
def test_names_map_one_to_one_onto_ours_with_the_same_shapes(golden):
    ours = translate(golden.shapes)
    assert list(ours) == list(golden.shapes)
    heads = {name for name in golden.shapes if name.startswith(HEADS)}
    assert heads and {name for name, mine in ours.items() if mine is None} == heads
    mapped = [(ours[name], shape) for name, shape in golden.shapes.items() if name not in heads]
    assert len(dict(mapped)) == len(mapped), 'no two tensors share a name'
    assert dict(mapped) == our_shapes(golden)


@golden_names
def test_fused_names_map_one_to_one_onto_those_of_a_fused_network(golden):
    names = fuse_names([name for name in golden.shapes if not name.startswith(HEADS)])
    assert not any('.bn.' in name or '.c.' in name for name in names)
    ours = translate(names)
    assert sorted(ours.values()) == sorted(our_shapes(golden, deploy=True))


@golden_names
@pytest.mark.parametrize('deploy', [False, True], ids=['unfused', 'fused'])
def test_our_names_stay_ours(golden, deploy):
    names = list(our_shapes(golden, deploy))
    assert translate(names) == dict(zip(names, names, strict=True))


@pytest.mark.parametrize('golden', [GOLDENS[0], GOLDENS[-1]], ids=lambda golden: golden.name)
def test_names_of_truncated_networks_map_alike(golden):
    """A checkpoint that ends with some stage still says where its stages begin."""
    whole = translate(golden.shapes)
    for stages in (1, 2, 3):
        part = [name for name, ours in whole.items() if ours and not re.match(rf'stages\.[{stages}-3]\.', ours)]
        # The last block of a stage is a part of the downsample behind it under timm's names: cut in front of it.
        part = [name for name in part if not name.startswith(f'stages.{stages}.downsample')]
        assert 0 < len(part) < len(whole)
        assert translate(part) == {name: whole[name] for name in part}


@golden_names
def test_unknown_names_are_left_alone(golden):
    unknown = ['neck.conv.weight', 'backbone.stem.conv1.c.weight', 'features', 'features.x.weight', 'weight', '']
    translated = translate([*golden.shapes, *unknown])
    assert {name: translated[name] for name in unknown} == dict(zip(unknown, unknown, strict=True))


@pytest.mark.parametrize('key', ['state_dict', 'model'])
def test_unwrap_replaces_a_checkpoint_by_its_tensors(key):
    tensors = {'a': torch.zeros(1), 'b': torch.ones(1)}
    checkpoint = {key: tensors, 'epoch': 3, 'optimizer': {'state': {}}}
    unwrap(checkpoint)
    assert checkpoint == tensors
    unwrap(checkpoint)
    assert checkpoint == tensors


class Detector(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Conv2d(3, 3, 1)


golden = GOLDENS[0]


def build(**options) -> nn.Module:
    return golden.backbone(golden.arch, **options)


@pytest.fixture(scope='module')
def weights() -> dict[str, torch.Tensor]:
    """The reference's state dict, under the reference's names."""
    return golden.state_dict()


@pytest.fixture(scope='module')
def expected(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under our names, by hand."""
    names = translate(weights)
    return {names[name]: tensor.float() for name, tensor in weights.items() if names[name]}


def check(network: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    actual = network.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


@pytest.mark.parametrize('key', [None, 'model', 'state_dict'])
def test_classifier_file_loads(tmp_path, weights, expected, key):
    """The authors' classification files keep their tensors under ``model``."""
    file = str(tmp_path / 'classifier.pth')
    torch.save(weights if key is None else {key: weights, 'epoch': 299}, file)
    network = build(init_cfg=dict(type='Pretrained', checkpoint=file))
    network.init_weights()
    check(network, expected)
    network = build()
    load_checkpoint(network, file, strict=True)
    check(network, expected)


def test_detector_file_loads(tmp_path, weights, expected):
    """The authors' detection files hold a detector under ``state_dict``."""
    file = str(tmp_path / 'detector.pth')
    neck = {name: torch.full_like(tensor, 2) for name, tensor in nn.Conv2d(3, 3, 1).state_dict().items()}
    whole = {f'backbone.{name}': tensor for name, tensor in weights.items()}
    whole |= {f'neck.{name}': tensor for name, tensor in neck.items()}
    torch.save({'state_dict': whole, 'meta': {}}, file)
    detector = Detector(build())
    load_checkpoint(detector, file, strict=True)
    check(detector.backbone, expected)
    check(detector.neck, neck)
    network = build(init_cfg=dict(type='Pretrained', prefix='backbone.', checkpoint=file))
    network.init_weights()
    check(network, expected)
    wrapped = nn.DataParallel(Detector(build()))
    wrapped.load_state_dict({f'module.{name}': tensor for name, tensor in whole.items()}, strict=True)
    check(wrapped.module.backbone, expected)


def test_fused_weights_load_into_a_fused_network(expected):
    network = build()
    network.load_state_dict(expected, strict=True)
    fused = switch_to_deploy(network).state_dict()
    network = build(deploy=True)
    network.load_state_dict({'state_dict': fused}, strict=True)
    check(network, fused)


def test_loading_leaves_the_given_state_dict_alone(weights):
    before = list(weights.items())
    build().load_state_dict(weights, strict=True)
    assert all(a == b and x is y for (a, x), (b, y) in zip(weights.items(), before, strict=True))


class TestReading:
    """A checkpoint file is data: reading it runs nothing."""

    def test_training_metadata_survives(self, tmp_path):
        history = HistoryBuffer([3.0, 1.0, 2.0], [1, 1, 1])
        metadata = {'loss': history, 'lr': np.float64(0.1), 'order': np.arange(3), 'names': np.array(['a']), 'iter': 7}
        torch.save({'message_hub': metadata}, tmp_path / 'a.pth')
        read = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'))['message_hub']
        assert read['lr'] == metadata['lr'] and read['iter'] == 7
        assert all(np.array_equal(read[name], metadata[name]) for name in ('order', 'names'))
        assert all(read['loss'].statistics(name) == history.statistics(name) for name in STATISTICS)

    def test_history_without_entries_survives(self, tmp_path):
        torch.save({'loss': HistoryBuffer()}, tmp_path / 'a.pth')
        assert [len(data) for data in read_checkpoint(str(tmp_path / 'a.pth'))['loss'].data] == [0, 0]

    @pytest.mark.parametrize(
        ('function', 'arguments'),
        [
            (os.system, ('touch {}',)),
            (eval, ('open({!r}, "w")',)),
            (getattr, (HistoryBuffer, '__init__')),
            (getattr, (np.ndarray, 'tofile')),
            (getattr, (torch.Tensor, 'min')),
        ],
        ids=str,
    )
    def test_file_that_runs_something_is_refused(self, tmp_path, function, arguments):
        class Payload:
            def __reduce__(self):
                target = str(tmp_path / 'was_run')
                return function, tuple(a.format(target) if isinstance(a, str) else a for a in arguments)

        file = str(tmp_path / 'a.pth')
        torch.save({'state_dict': {'a': torch.zeros(1)}, 'meta': Payload()}, file)
        for read in (read_checkpoint, CheckpointLoader.load_checkpoint):
            with pytest.raises(pickle.UnpicklingError):
                read(file)
        with pytest.raises(pickle.UnpicklingError):
            load_checkpoint(nn.Linear(1, 1), file)
        assert not (tmp_path / 'was_run').exists()

    def test_nothing_stays_allowed(self, tmp_path):
        """Torch's own reader is as strict after ours as before."""
        torch.save({'loss': HistoryBuffer([1.0], [1])}, tmp_path / 'a.pth')
        read_checkpoint(str(tmp_path / 'a.pth'))
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / 'a.pth', weights_only=True)

    def test_missing_file_is_named(self, tmp_path):
        for read in (read_checkpoint, CheckpointLoader.load_checkpoint):
            with pytest.raises(FileNotFoundError, match=r'nowhere\.pth'):
                read(str(tmp_path / 'nowhere.pth'))

    def test_home_folder_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv('HOME', str(tmp_path))
        torch.save({'a': 1}, tmp_path / 'a.pth')
        assert read_checkpoint('~/a.pth') == {'a': 1}
