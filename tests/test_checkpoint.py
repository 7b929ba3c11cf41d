"""Checkpoints of anybody: read without running anything, loaded whole or refused in one line."""

import argparse
import copy
import datetime
import os
import pickle
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
from helpers import FAMILIES, TYPICAL, Golden, fuse_as_owners, image, largest_error, slow_but
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, load_checkpoint
from safetensors.torch import save_file
from torch import nn

from repvit_mm import RepViT, switch_to_deploy
from repvit_mm.checkpoint import CheckpointError, download, read_checkpoint, trust
from repvit_mm.loading import shapes_of
from repvit_mm.reparam import plain_formulation
from repvit_mm.safe_globals import STATISTICS


class Detector(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Conv2d(3, 3, 1)


@pytest.fixture(scope='module', params=slow_but(TYPICAL[:1], TYPICAL))
def golden(request: pytest.FixtureRequest) -> Golden:
    return request.param


@pytest.fixture(scope='module')
def build(golden: Golden) -> Callable[..., nn.Module]:
    return partial(golden.backbone, golden.arch)


@pytest.fixture(scope='module')
def weights(golden: Golden) -> dict[str, torch.Tensor]:
    """The reference's state dict, under the reference's names."""
    return golden.state_dict()


@pytest.fixture(scope='module')
def expected(golden: Golden, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under our names, by hand."""
    names = golden.backbone.naming.translate(weights)
    return {names[name]: tensor.float() for name, tensor in weights.items() if names[name]}


def check(network: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    actual = network.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


@pytest.mark.parametrize('key', [None, 'model', 'state_dict', 'model_ema'])
def test_classifier_file_loads(tmp_path, weights, expected, key, build):
    """The authors' classification files keep their tensors under ``model``."""
    file = str(tmp_path / 'classifier.pth')
    torch.save(weights if key is None else {key: weights, 'epoch': 299}, file)
    network = build(init_cfg=dict(type='Pretrained', checkpoint=file))
    network.init_weights()
    check(network, expected)
    network = build()
    load_checkpoint(network, file, strict=True)
    check(network, expected)


def test_detector_file_loads(tmp_path, weights, expected, build):
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
    for options in ({'prefix': 'backbone.'}, {}):
        network = build(init_cfg=dict(type='Pretrained', checkpoint=file, **options))
        network.init_weights()
        check(network, expected)
    wrapped = nn.DataParallel(Detector(build()))
    wrapped.load_state_dict({f'module.{name}': tensor for name, tensor in whole.items()}, strict=True)
    check(wrapped.module.backbone, expected)


def test_fused_weights_load_into_a_fused_network(expected, build):
    network = build()
    network.load_state_dict(expected, strict=True)
    fused = switch_to_deploy(network).state_dict()
    network = build(deploy=True)
    network.load_state_dict({'state_dict': fused}, strict=True)
    check(network, fused)


@pytest.mark.parametrize('convention', ['authors', 'timm'])
@torch.no_grad()
def test_file_fused_by_the_owners_code_is_fused_on_as_it_loads(weights, build, log, convention):
    network = build().double().eval()
    network.load_state_dict(weights)
    with plain_formulation(network):
        expected = network(image().double())
    tensors = translate_tensors(fuse_as_owners(network), convention)
    for taken in (tensors, {'state_dict': tensors | {'head.weight': torch.zeros(1000, 1)}}):
        fused = build(deploy=True).double()
        log.clear()
        fused.load_state_dict(taken, strict=True)
        assert fused.deployed and largest_error(fused(image().double()), expected) < 1e-9
        assert any('fused form, ' in line for line in log)
    part = build(deploy=True, out_indices=(0, 1)).double()
    part.load_state_dict(tensors, strict=True)
    assert largest_error(part(image().double()), expected[:2]) < 1e-9


def test_loading_leaves_the_given_state_dict_alone(weights, build):
    before = list(weights.items())
    build().load_state_dict(weights, strict=True)
    assert all(a == b and x is y for (a, x), (b, y) in zip(weights.items(), before, strict=True))


class TestVerdict:
    """What does not fit is refused in one line that says what the file is, whatever ``strict`` says."""

    @pytest.fixture
    def refused(self, tmp_path, golden) -> Callable[..., str]:
        def refused(network, tensors) -> str:
            file = str(tmp_path / 'file.pth')
            torch.save(tensors, file)
            with pytest.raises(CheckpointError) as error:
                load_checkpoint(network, file, strict=False)
            message = str(error.value)
            title = f'{golden.backbone.__name__} {golden.arch}'
            assert message.startswith(f'{file} does not fit {title}: ') and '\n' not in message
            return message

        return refused

    @pytest.mark.parametrize(
        ('cls', 'other'), [(RepViT, 'm2'), *((family.cls, family.goldens[1]) for family in FAMILIES)], ids=str
    )
    def test_other_variant(self, refused, golden, build, cls, other):
        with torch.device('meta'):  # what tensors hold does not matter
            mine, fused, network = build(), build(deploy=True), cls(other)
        where = '' if type(network) is golden.backbone else f"type='{type(network).__name__}', "
        advice = f"it holds {type(network).__name__} {other}: set {where}arch='{other}'"
        for convention in ('ours', 'authors', 'timm'):
            assert advice in refused(mine, without_numbers(translate_tensors(network, convention)))
        if other == 'm2':  # fused it is m1_1
            return
        for convention in ('ours', 'authors', 'timm'):
            tensors = translate_tensors(fuse_as_owners(network), convention)
            assert advice in refused(mine, without_numbers(tensors))
        assert advice in refused(fused, without_numbers(switch_to_deploy(network).state_dict()))

    def test_fused_file_meets_training_network(self, refused, build):
        advice = 'this network is for training: build it with deploy=True or take an unfused file'
        assert f'it is fused and {advice}' in refused(build(), build(deploy=True).state_dict())
        as_owners = fuse_as_owners(build())
        form = 'fused' if as_owners.deployed else 'partly fused'
        for tensors in (as_owners.state_dict(), translate_tensors(as_owners, 'authors')):
            assert f'it is {form} and {advice}' in refused(build(), tensors)

    def test_incomplete_and_foreign_files(self, refused, weights, build):
        part = dict(list(weights.items())[1:])
        first = next(name for name in build().state_dict())
        assert f'missing: 1 ({first})' in refused(build(), part)
        assert 'it holds another network' in refused(build(), {'conv1.weight': torch.zeros(1)})
        own = build().state_dict()
        some = {name: own[name] for name in list(own)[:7]}
        missing = len(shapes_of(own)) - len(shapes_of(some))
        assert f'tensors missing: {missing} ({list(own)[7]})' in refused(build(), some)
        for network, tensors in ((build(), {}), (Detector(build()), weights)):
            with pytest.raises(CheckpointError, match='it holds no tensor for it'):
                network.load_state_dict(tensors, strict=False)

    def test_batch_counters_may_be_absent(self, weights, expected, build):
        network = build()
        network.load_state_dict({n: t for n, t in weights.items() if not n.endswith('num_batches_tracked')})
        check(network, expected)

    def test_one_line_in_the_log(self, tmp_path, golden, weights, log, build):
        torch.save({'model': weights}, tmp_path / 'a.pth')
        load_checkpoint(build(), str(tmp_path / 'a.pth'), logger='current')
        (line,) = (line for line in log if 'backbone tensors' in line)
        count = len(build().state_dict())
        assert line == (
            f"{tmp_path / 'a.pth'}: {golden.backbone.__name__} {golden.arch}, training form, the authors' names: "
            f'{count}/{count} backbone tensors loaded; {len(weights) - count} set aside (classification head)'
        )

    def test_what_was_read_can_be_saved_and_read_again(self, tmp_path, weights):
        torch.save({'model': weights}, tmp_path / 'a.pth')
        torch.save(read_checkpoint(tmp_path / 'a.pth'), tmp_path / 'b.pth')
        again = read_checkpoint(tmp_path / 'b.pth')['model']
        assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())

    @pytest.mark.parametrize('copied', [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
    def test_copies_load_for_themselves(self, weights, expected, build, copied):
        network = build()
        before = copy.deepcopy(network.state_dict())
        twin = copied(network)
        twin.load_state_dict(weights)
        check(twin, expected)
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    def test_other_tap_is_warned_of(self, tmp_path, log):
        golden = TYPICAL[0]
        build, weights = partial(golden.backbone, golden.arch), golden.state_dict()
        detector = {f'backbone.{name}': tensor for name, tensor in weights.items()} | {'rpn_head.x': torch.zeros(1)}
        segmentor = {f'backbone.{name}': tensor for name, tensor in weights.items()} | {'decode_head.x': torch.zeros(1)}
        cfg = "custom_imports = dict(imports=['repvit_mm'])\nmodel = dict(backbone=dict(tap='pre_downsample'))"
        ours = {'state_dict': segmentor, 'meta': {'cfg': cfg}}
        for content, trained in ((detector, 'pre_downsample'), (segmentor, 'stage_end'), (ours, 'pre_downsample')):
            torch.save(content if content is ours else {'state_dict': content}, tmp_path / 'a.pth')
            for tap in ('stage_end', 'pre_downsample'):
                log.clear()
                load_checkpoint(build(tap=tap), str(tmp_path / 'a.pth'))
                warned = [line for line in log if f"trained with tap='{trained}', this network has tap='{tap}'" in line]
                assert len(warned) == (tap != trained)

    @pytest.mark.slow
    @pytest.mark.needs_ops
    def test_detector_of_the_authors_loads_with_nothing_missing_or_left_over(self, tmp_path):
        """Their heads have today's names; `strict` makes the framework itself refuse anything else."""
        from mmdet.registry import MODELS
        from mmengine.config import Config
        from mmengine.registry import DefaultScope

        root = Path(__file__).parents[1]
        cfg = Config.fromfile(root / 'configs/det/mask_rcnn_repvit_m1_1_fpn_1x_coco.py')
        with DefaultScope.overwrite_default_scope('mmdet'):
            given, taken = (MODELS.build(dict(cfg.model)) for _ in range(2))
        heads = {n: t for n, t in given.state_dict().items() if not n.startswith('backbone.')}
        backbone = translate_tensors(given.backbone, 'authors')
        state = {**{f'backbone.{name}': tensor for name, tensor in backbone.items()}, **heads}
        torch.save(
            {'state_dict': state, 'meta': {'CLASSES': ('person',), 'mmdet_version': '2.28.2'}}, tmp_path / 'a.pth'
        )
        load_checkpoint(taken, str(tmp_path / 'a.pth'), strict=True)
        check(taken, given.state_dict())


def translate_tensors(network, convention):
    tensors = network.state_dict()
    names = network.naming.translate(tensors, convention)
    return {names[name]: tensor for name, tensor in tensors.items()}


def without_numbers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the same shapes and types that take no room in a file."""
    return {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in tensors.items()}


def reach_for_more(function, *arguments):
    """An object that has torch's own, allowed helper call a function of the file's choice."""
    return torch._tensor._rebuild_from_type_v2, (function, torch.Tensor, arguments, {})


RECONSTRUCT, SCALAR = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]

ARRAYS = [
    np.arange(6.0).reshape(2, 3).T,
    np.array([True, False]),
    np.array(['x', 'yz']),
    np.array([b'abc']),
    np.array([1, 2], '>i4'),
    np.array([1 + 2j], np.complex64),
    np.float16([[0.5]]),
]
"""Of every kind of number and text."""


class TestReading:
    """A checkpoint file is data: reading it runs nothing."""

    def test_training_metadata_survives(self, tmp_path):
        history = HistoryBuffer([3.0, 1.0, 2.0], [1, 1, 1])
        metadata = {'loss': history, 'lr': np.float64(0.1), 'order': np.arange(3), 'names': np.array(['a']), 'iter': 7}
        torch.save({'message_hub': metadata, 'args': argparse.Namespace(lr=0.1)}, tmp_path / 'a.pth')
        file = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'))
        read = file['message_hub']
        assert file['args'].lr == 0.1
        assert read['lr'] == metadata['lr'] and read['iter'] == 7
        assert all(np.array_equal(read[name], metadata[name]) for name in ('order', 'names'))
        assert all(read['loss'].statistics(name) == history.statistics(name) for name in STATISTICS)

    def test_history_without_entries_survives(self, tmp_path):
        torch.save({'loss': HistoryBuffer()}, tmp_path / 'a.pth')
        assert [len(data) for data in read_checkpoint(str(tmp_path / 'a.pth'))['loss'].data] == [0, 0]

    def test_plain_metadata_survives(self, tmp_path):
        """What others keep beside their weights and what cannot do anything."""
        counts = defaultdict(list, a=[1])
        made = datetime.datetime(2024, 5, 6, 7, 8, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
        config = ConfigDict(model=dict(type='RepViT', arch='m1_1'), steps=[1, 2])
        torch.save(
            dict(path=Path('runs/a'), other=PureWindowsPath('c:/b'), counts=counts, made=made, cfg=config, none=b''),
            tmp_path / 'a.pth',
        )
        read = read_checkpoint(tmp_path / 'a.pth')
        assert read == dict(
            path=PurePosixPath('runs/a'),
            other=PureWindowsPath('c:/b'),
            counts={'a': [1]},
            made=made,
            cfg={'model': {'type': 'RepViT', 'arch': 'm1_1'}, 'steps': [1, 2]},
            none=b'',
        )
        assert type(read['counts']) is dict and type(read['cfg']) is type(read['cfg']['model']) is dict

    @pytest.mark.parametrize('array', ARRAYS, ids=lambda array: f'{array.dtype}{array.shape}')
    def test_arrays_survive(self, tmp_path, array):
        """And are written again as NumPy's own."""
        torch.save({'a': array, 'b': array.ravel()[:1][0]}, tmp_path / 'a.pth')
        for _ in range(2):
            read = read_checkpoint(tmp_path / 'a.pth')
            # NumPy turns bytes into the machine's order.
            np.testing.assert_array_equal(read['a'], array.astype(array.dtype.newbyteorder('=')), strict=True)
            assert read['b'] == array.ravel()[0] and type(read['b']) is type(array.ravel()[0])
            torch.save(read, tmp_path / 'a.pth')
        assert type(torch.load(tmp_path / 'a.pth', weights_only=False)['a']) is np.ndarray

    @pytest.mark.parametrize(
        ('reduced', 'message'),
        [
            # NumPy itself crashes on this one.
            ((np.dtype, ('f8', False, True), (3, '<', None, -1, -1, 0)), None),
            ((np.dtype, ('f8', False, True), (3, 'x', None, None, None, -1, -1, 0)), 'byte order'),
            ((np.dtype, ('O8', False, True)), "arrays of type 'O8'"),
            ((RECONSTRUCT, (np.ndarray, (0,), b'b'), (1, (3,), np.dtype('f8'), False, bytes(8))), 'has 8 bytes'),
            ((RECONSTRUCT, (np.ndarray, (0,), b'b'), (1, (-1,), np.dtype('f8'), False, bytes(8))), 'something else'),
            ((RECONSTRUCT, (np.ndarray, (0,), b'b'), (1, (1,), np.dtype('f8'), False, [1.0])), 'something else'),
            ((SCALAR, (np.dtype('f8'), bytes(4))), 'something else'),
        ],
        ids=['state', 'order', 'objects', 'too short', 'negative', 'list', 'scalar'],
    )
    def test_damaged_arrays_are_refused(self, tmp_path, reduced, message):
        class Payload:
            def __reduce__(self):
                return reduced

        torch.save({'a': Payload()}, tmp_path / 'a.pth')
        if message is None:
            assert read_checkpoint(tmp_path / 'a.pth')['a'].dtype == np.float64
        else:
            with pytest.raises(CheckpointError, match=f'is damaged or no checkpoint .*{message}'):
                read_checkpoint(tmp_path / 'a.pth')

    @pytest.mark.parametrize('reduced', [(bytes, (10**12,)), (int, ('1',)), (list, (b'abc',))], ids=str)
    def test_builtin_types_are_not_called(self, tmp_path, reduced):
        class Payload:
            def __reduce__(self):
                return reduced

        torch.save({'a': Payload()}, tmp_path / 'a.pth')
        with pytest.raises(CheckpointError, match='is damaged or no checkpoint') as error:
            read_checkpoint(tmp_path / 'a.pth')
        assert '\n' not in str(error.value)

    @pytest.mark.parametrize(
        ('reduced', 'named'),
        [
            ((os.system, ('touch {}',)), 'posix.system'),
            ((eval, ('open({!r}, "w")',)), 'eval'),
            ((getattr, (HistoryBuffer, '__init__')), 'getattr of'),
            ((getattr, (np.ndarray, 'tofile')), 'getattr of'),
            ((getattr, (torch.Tensor, 'min')), 'getattr of'),
            (reach_for_more(getattr, HistoryBuffer, '__init__'), 'getattr of'),
            (reach_for_more(open, '{}', 'w'), 'open'),
        ],
        ids=['system', 'eval', 'init', 'tofile', 'min', 'reach_getattr', 'reach_open'],
    )
    def test_file_that_runs_something_is_refused(self, tmp_path, reduced, named):
        def with_target(value):
            if isinstance(value, tuple):
                return tuple(map(with_target, value))
            return value.format(str(tmp_path / 'was_run')) if isinstance(value, str) else value

        class Payload:
            def __reduce__(self):
                return with_target(reduced)

        file = str(tmp_path / 'a.pth')
        torch.save({'state_dict': {'a': torch.zeros(1)}, 'meta': Payload()}, file)
        for read in (read_checkpoint, CheckpointLoader.load_checkpoint, partial(load_checkpoint, nn.Linear(1, 1))):
            with pytest.raises(CheckpointError, match='--trust-checkpoint') as error:
                read(file)
            assert named in str(error.value) and '\n' not in str(error.value)
        assert not (tmp_path / 'was_run').exists()

    def test_trusted_file_runs_what_it_holds(self, tmp_path, monkeypatch, trusted):
        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / 'was_run'),)

        torch.save({'a': torch.zeros(1), 'meta': Payload()}, tmp_path / 'a.pth')
        monkeypatch.chdir(tmp_path)
        trust('a.pth')
        assert CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'))['a'] == 0
        assert (tmp_path / 'was_run').exists() and trusted == {str(tmp_path / 'a.pth')}

    def test_nothing_stays_allowed(self, tmp_path):
        """Torch's own reader is as strict after ours as before."""
        torch.save({'loss': HistoryBuffer([1.0], [1])}, tmp_path / 'a.pth')
        read_checkpoint(str(tmp_path / 'a.pth'))
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / 'a.pth', weights_only=True)

    def test_safetensors(self, tmp_path, weights, expected, build):
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / 'a.safetensors')
        network = build()
        load_checkpoint(network, str(tmp_path / 'a.safetensors'))
        check(network, expected)

    @pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
    def test_bad_files_get_one_line(self, tmp_path, suffix):
        whole = tmp_path / 'whole.pth'
        torch.save({'a': torch.zeros(1000)}, whole)
        bad = {
            'is empty': b'',
            'is a web page': b'\n<!DOCTYPE html><html>Not Found</html>',
            'is damaged': whole.read_bytes()[:-500],
            'is damaged or no': b'just some text, no checkpoint',
        }
        for message, content in bad.items():
            file = tmp_path / f'bad.{suffix}'
            file.write_bytes(content)
            with pytest.raises(CheckpointError, match=message) as error:
                CheckpointLoader.load_checkpoint(str(file))
            assert str(file) in str(error.value) and '\n' not in str(error.value)

    def test_file_that_is_not_there(self, tmp_path):
        torch.save({}, tmp_path / 'epoch_12.pth')
        with pytest.raises(CheckpointError, match=r'epoch_21\.pth not found; the nearest is .*epoch_12\.pth'):
            CheckpointLoader.load_checkpoint(str(tmp_path / 'epoch_21.pth'))
        with pytest.raises(CheckpointError, match='is a folder'):
            CheckpointLoader.load_checkpoint(str(tmp_path))

    def test_addresses(self, tmp_path, monkeypatch):
        """A file that was fetched before is taken; one that cannot be fetched is said to be so. All read safely."""
        monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
        address = 'http://127.0.0.1:9/released.pth'
        with pytest.raises(CheckpointError, match=f'{address} cannot be downloaded .* not at {tmp_path}'):
            CheckpointLoader.load_checkpoint(address)
        torch.save({'a': torch.ones(1)}, tmp_path / 'checkpoints/released.pth')
        assert CheckpointLoader.load_checkpoint(address)['a'] == 1
        assert download(address) == tmp_path / 'checkpoints/released.pth'
        torch.save({'a': os.system}, tmp_path / 'checkpoints/released.pth')
        with pytest.raises(CheckpointError, match=r'posix\.system'):
            CheckpointLoader.load_checkpoint(address)

    def test_home_folder_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv('HOME', str(tmp_path))
        torch.save({'a': 1}, tmp_path / 'a.pth')
        assert read_checkpoint('~/a.pth') == {'a': 1}
