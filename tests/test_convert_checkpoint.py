"""The converter: what it says of a file, that it changes names alone, and what it refuses."""

import hashlib
import importlib
import re
import resource
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import ENDS, FAMILIES, GOLDENS, HEADS, TYPICAL, Golden, goldens_of, image, largest_error, slow_but
from mmengine.logging import HistoryBuffer
from programs import TOOLS, launch, launch_anew

from repvit_mm import RepViT
from repvit_mm.checkpoint import CheckpointError, read_checkpoint
from repvit_mm.conversion import content_of, convert

sys.path.append(str(TOOLS))
main = importlib.import_module('convert_checkpoint').main

SOURCES = {golden.name: golden for golden in GOLDENS}
SMALLEST = SOURCES['repvit_m0_6']
KINDS = [*TYPICAL, SOURCES['timm_repvit_m1']]
# The variants of a family differ in depths and widths, and FastViT's in attention; "typical" ones have every block.
EVERY_KIND = [*KINDS, *(golden for golden in ENDS if golden not in KINDS)]
FIRST = [goldens_of(family)[0] for family in FAMILIES]


def origin(golden: Golden) -> str:
    return 'timm' if golden.timm else 'authors'


def weights(golden: Golden) -> dict:
    """A released classifier's tensors."""
    return {name: tensor.float() for name, tensor in golden.state_dict().items()}


def layout(golden: Golden) -> dict:
    """A released classifier as its owners lay it out."""
    container = None if golden.timm else golden.family.container
    return weights(golden) if container is None else {container: weights(golden)}


def tensors_of(content: dict, golden: Golden, to: str) -> dict:
    """The tensors of a file where readers of such names look for them."""
    container = {'ours': 'state_dict', 'authors': golden.family.container, 'timm': None}[to]
    tensors = content if container is None else content[container]
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    return tensors


def without_heads(tensors: dict) -> dict:
    return {name: value for name, value in tensors.items() if not name.startswith(HEADS)}


def read(path: Path) -> dict:
    """What a file holds, read by torch alone: nothing of this package may be needed for it."""
    return torch.load(path, weights_only=True)


def equal(first: dict, second: dict) -> bool:
    """Whether tensors have the same names, in the same order, and are equal bit by bit."""
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def maps(tensors: dict, golden: Golden, **options) -> tuple:
    network = golden.backbone(golden.arch, tap=list(golden.taps)[-1], **options).eval()
    network.load_state_dict(tensors)
    with torch.no_grad():
        return network(image())


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('released')


@pytest.fixture
def released(folder, golden) -> Path:
    """A released classifier, written once."""
    path = folder / f'{golden.name}.pth'
    if not path.exists():
        torch.save(layout(golden), path)
    return path


@pytest.fixture(scope='module')
def smallest(tmp_path_factory) -> Path:
    """The authors' m0_6 classifier."""
    path = tmp_path_factory.mktemp('smallest') / 'repvit_m0_6.pth'
    torch.save(layout(SMALLEST), path)
    return path


@pytest.fixture(scope='module')
def ours(smallest) -> Path:
    """The same by our names."""
    path = smallest.with_name('ours.pth')
    main([str(smallest), str(path)])
    return path


@pytest.fixture(scope='module')
def detector(smallest) -> Path:
    """A detector of the authors', wrapped for running in parallel, with what training leaves in a file."""
    tensors = {f'module.backbone.{name}': tensor for name, tensor in without_heads(weights(SMALLEST)).items()}
    tensors |= {'module.rpn_head.rpn_cls.weight': torch.ones(3, 4, 1, 1), 'module.neck.bias': torch.arange(5.0)}
    meta = {'CLASSES': ('cat', 'dog'), 'epoch': 12, 'config': 'model = dict()'}
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    path = smallest.with_name('detector.pth')
    torch.save({'meta': meta, 'state_dict': tensors, 'optimizer': {'lr': 0.1}, 'message_hub': history}, path)
    return path


class TestEveryArch:
    @pytest.mark.parametrize('golden', slow_but(FIRST, GOLDENS))
    def test_names_change_and_nothing_else(self, tmp_path, capsys, golden, released):
        main([str(released), '--check'])
        backbone = without_heads(weights(golden))
        whose = {'timm': "timm's", 'authors': "the authors'"}[origin(golden)]
        title = f'{golden.backbone.__name__} {golden.arch}'
        verdict = f'{title}, training form, {whose} names: {len(backbone)} backbone tensors, '
        assert capsys.readouterr().out == f'{released}: {verdict}{len(golden.shapes) - len(backbone)} ' + (
            'of classification heads\n'
        )

        first = tmp_path / 'ours.pth'
        main([str(released), str(first)])
        ours = read(first)['state_dict']
        assert all(torch.equal(a, b) for a, b in zip(ours.values(), backbone.values(), strict=True))
        assert ours.keys() == golden.backbone(golden.arch).state_dict().keys()
        for to in ('authors', 'timm'):
            there, back = tmp_path / f'{to}.pth', tmp_path / f'{to}_ours.pth'
            main([str(first), str(there), '--to', to])
            main([str(there), str(back)])
            assert equal(read(back)['state_dict'], ours)
            tensors = tensors_of(read(there), golden, to)
            assert tensors.keys() != ours.keys()
            if to == origin(golden):
                assert equal(tensors, backbone)
            twin = SOURCES.get(replace(golden, timm=to == 'timm').name)
            if twin:  # the other owners' own list of names
                assert {name: tuple(t.shape) for name, t in tensors.items()} == without_heads(twin.shapes)

    @pytest.mark.parametrize('golden', slow_but(FIRST, EVERY_KIND))
    def test_fused_names_go_there_and_back(self, tmp_path, capsys, golden, released):
        first = tmp_path / 'ours.pth'
        main([str(released), str(first), '--fuse'])
        ours = read(first)['state_dict']
        assert ours.keys() == golden.backbone(golden.arch, deploy=True).state_dict().keys()
        for to in ('authors', 'timm'):
            there, back = tmp_path / f'{to}.pth', tmp_path / f'{to}_ours.pth'
            main([str(released), str(there), '--to', to, '--fuse'])
            main([str(there), str(back), '--fuse'])
            assert equal(read(back)['state_dict'], ours)
            if not golden.family.owners_leave:
                before = read(there)
                main([str(first), str(there), '--to', to, '--force'])
                assert equal(*(tensors_of(content, golden, to) for content in (before, read(there))))
            else:
                with pytest.raises(
                    SystemExit, match=r'ours\.pth cannot get .* names: its backbone is fused further than'
                ):
                    main([str(first), str(there), '--to', to, '--force'])
                capsys.readouterr()
                main([str(there), '--check'])
                assert f'{golden.backbone.__name__} {golden.arch}, partly fused form' in capsys.readouterr().out
        main([str(back), '--check'])
        title = rf'{golden.backbone.__name__} (\w+ or )*{golden.arch}( or \w+)*'
        assert re.search(f'{title}, fused form', capsys.readouterr().out)


@pytest.mark.parametrize('golden', slow_but([SMALLEST], KINDS))
@pytest.mark.parametrize(('suffix', 'fuse'), [('pth', False), ('safetensors', True)], ids=['training', 'fused'])
@pytest.mark.parametrize('to', ['ours', 'authors', 'timm'])
def test_converted_networks_compute_what_the_reference_did(tmp_path, golden, released, suffix, fuse, to):
    out = tmp_path / f'out.{suffix}'
    main([str(released), str(out), '--to', to, *['--fuse'] * fuse])
    tensors = read(out) if suffix == 'pth' else safetensors.torch.load_file(out)
    entirely = fuse and (to == 'ours' or not golden.family.owners_leave)
    assert entirely != any('running_mean' in str(name) for name in flat(tensors))
    assert largest_error(maps(tensors, golden, deploy=fuse), golden.maps(list(golden.taps)[-1])) < 1e-5


def flat(content: dict) -> list[str]:
    return [name for key, value in content.items() for name in (value if isinstance(value, dict) else [key])]


def test_safetensors_hold_the_same_tensors(tmp_path, ours):
    main([str(ours), str(tmp_path / 'a.safetensors')])
    main([str(tmp_path / 'a.safetensors'), str(tmp_path / 'b.pth')])
    before, after = read(ours)['state_dict'], read(tmp_path / 'b.pth')['state_dict']
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_layout_of_each_convention(tmp_path, ours, detector):
    for to, keys, whole_keys in [
        ('ours', {'state_dict', 'meta'}, {'state_dict', 'meta'}),
        ('authors', {'model'}, {'state_dict', 'meta'}),
    ]:
        main([str(ours), str(tmp_path / f'{to}.pth'), '--to', to])
        main([str(detector), str(tmp_path / f'{to}_detector.pth'), '--to', to])
        assert read(tmp_path / f'{to}.pth').keys() == keys
        assert read(tmp_path / f'{to}_detector.pth').keys() == whole_keys
    assert read(tmp_path / 'ours.pth')['meta'] == {}
    main([str(ours), str(tmp_path / 'timm.pth'), '--to', 'timm'])
    assert all(isinstance(tensor, torch.Tensor) for tensor in read(tmp_path / 'timm.pth').values())


class TestHeads:
    def test_stay_as_long_as_the_names_do(self, tmp_path, smallest):
        main([str(smallest), str(tmp_path / 'a.pth'), '--to', 'authors'])
        assert equal(read(tmp_path / 'a.pth')['model'], weights(SMALLEST))

    @pytest.mark.parametrize('options', [['--to', 'timm'], ['--to', 'ours'], ['--to', 'authors', '--fuse']], ids=str)
    def test_are_set_aside_otherwise(self, tmp_path, capsys, smallest, options):
        main([str(smallest), str(tmp_path / 'a.pth'), *options])
        assert not any(name.startswith(HEADS) for name in flat(read(tmp_path / 'a.pth')))
        assert '14 of classification heads set aside' in capsys.readouterr().out


class TestDetector:
    def test_keeps_its_other_parts_and_its_classes_but_not_its_training(self, tmp_path, capsys, detector, ours):
        main([str(detector), str(tmp_path / 'a.pth')])
        assert 'backbone tensors under backbone.*, 2 of other parts of a model' in capsys.readouterr().out
        converted = read(tmp_path / 'a.pth')
        assert converted.keys() == {'state_dict', 'meta'} and converted['meta'] == {
            'CLASSES': ('cat', 'dog'),
            'tap': 'pre_downsample',
        }
        tensors = converted['state_dict']
        assert torch.equal(tensors.pop('neck.bias'), torch.arange(5.0))
        assert torch.equal(tensors.pop('rpn_head.rpn_cls.weight'), torch.ones(3, 4, 1, 1))
        assert equal(
            {name.removeprefix('backbone.'): tensor for name, tensor in tensors.items()}, read(ours)['state_dict']
        )

    def test_keeps_its_training_if_asked(self, tmp_path, detector):
        for to in ('ours', 'timm'):
            main([str(detector), str(tmp_path / f'{to}.pth'), '--to', to, '--keep-metadata'])
            converted = torch.load(tmp_path / f'{to}.pth', weights_only=False)
            assert converted.keys() == {'meta', 'state_dict', 'optimizer', 'message_hub'}
            assert converted['optimizer'] == {'lr': 0.1} and converted['meta']['epoch'] == 12
            assert converted['message_hub'].mean() == 1.5

    def test_is_fused_where_it_can_be(self, tmp_path, detector):
        main([str(detector), str(tmp_path / 'a.safetensors'), '--fuse'])
        tensors = safetensors.torch.load_file(tmp_path / 'a.safetensors')
        assert torch.equal(tensors['neck.bias'], torch.arange(5.0))
        fused = {name.removeprefix('backbone.'): t for name, t in tensors.items() if name.startswith('backbone.')}
        assert fused.keys() == RepViT('m0_6', deploy=True).state_dict().keys()


def test_fused_file_is_not_fused_again(tmp_path, capsys, ours):
    main([str(ours), str(tmp_path / 'a.pth'), '--fuse'])
    assert 'fused already' not in capsys.readouterr().out
    main([str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth'), '--fuse'])
    assert f'{tmp_path}/a.pth is fused already' in capsys.readouterr().out
    assert equal(read(tmp_path / 'a.pth')['state_dict'], read(tmp_path / 'b.pth')['state_dict'])


def test_old_files_without_batch_counters(tmp_path, ours):
    tensors = {name: t for name, t in read(ours)['state_dict'].items() if not name.endswith('num_batches_tracked')}
    torch.save({'state_dict_ema': tensors}, tmp_path / 'old.pth')
    main([str(tmp_path / 'old.pth'), str(tmp_path / 'a.pth')])
    assert equal(read(tmp_path / 'a.pth')['state_dict'], tensors)
    for source in (ours, tmp_path / 'old.pth'):
        main([str(source), str(tmp_path / f'{source.stem}_fused.pth'), '--fuse'])
    assert equal(*(read(tmp_path / f'{stem}_fused.pth')['state_dict'] for stem in ('ours', 'old')))


def test_precision_stays(tmp_path, ours):
    half = {name: t.half() if t.is_floating_point() else t for name, t in read(ours)['state_dict'].items()}
    torch.save(half, tmp_path / 'half.pth')
    main([str(tmp_path / 'half.pth'), str(tmp_path / 'a.pth'), '--fuse'])
    assert {tensor.dtype for tensor in read(tmp_path / 'a.pth')['state_dict'].values()} == {torch.float16}


def test_views_of_larger_tensors_become_their_own(tmp_path, ours):
    tensors = read(ours)['state_dict']
    first = next(iter(tensors))
    tensors[first] = torch.stack([tensors[first]] * 3000)[0]
    torch.save(tensors, tmp_path / 'large.pth')
    main([str(tmp_path / 'large.pth'), str(tmp_path / 'a.pth')])
    assert (tmp_path / 'large.pth').stat().st_size > ours.stat().st_size + 1e6
    assert abs((tmp_path / 'a.pth').stat().st_size - ours.stat().st_size) < 1e4


class TestWriting:
    def test_folder_gets_a_name_with_the_digest(self, tmp_path, smallest):
        out = tmp_path / 'zoo'
        main([str(smallest), f'{out}/'])
        (path,) = out.iterdir()
        assert path.name == f'repvit_m0_6-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth'
        main([str(smallest), str(out), '--force'])
        assert list(out.iterdir()) == [path], 'the same content has the same name'
        with pytest.raises(SystemExit, match=r'is there already: --force replaces it'):
            main([str(smallest), str(out)])

    def test_nothing_is_replaced_unless_asked(self, tmp_path, smallest):
        out = tmp_path / 'a.pth'
        out.write_text('precious')
        with pytest.raises(SystemExit, match=r'a\.pth is there already: --force replaces it'):
            main([str(smallest), str(out)])
        assert out.read_text() == 'precious' and list(tmp_path.iterdir()) == [out]
        main([str(smallest), str(out), '--force'])
        assert 'state_dict' in read(out) and list(tmp_path.iterdir()) == [out]

    def test_no_half_file_is_left_when_the_disk_is_full(self, tmp_path, smallest):
        """A real process that may not write more than a megabyte."""
        done = launch(tmp_path, 'convert_checkpoint.py', smallest, tmp_path / 'a.pth', first=fill_the_disk)
        assert done.returncode == 1 and 'Traceback' not in done.stderr
        assert f'{tmp_path}/a.pth cannot be written: ' in done.stderr.splitlines()[-1]
        assert list(tmp_path.iterdir()) == []

    def test_folder_that_is_a_file(self, tmp_path, smallest):
        (tmp_path / 'file').touch()
        with pytest.raises(SystemExit, match=r'file/a\.pth cannot be written: '):
            main([str(smallest), str(tmp_path / 'file' / 'a.pth')])


def fill_the_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def drop(tensors: dict, name: str) -> dict:
    assert name in tensors
    return {key: tensor for key, tensor in tensors.items() if key != name}


BAD = {
    'missing tensor': (
        lambda t: drop(t, 'features.1.token_mixer.0.conv.bn.bias'),
        r'no whole RepViT: compared with m0_6, tensors missing: 1 \(stages\.0\.0\.token_mixer\.conv3x3\.bn\.bias\)',
    ),
    'unexplained tensor': (
        lambda t: {**t, 'features.1.extra.weight': torch.ones(1)},
        r'compared with m0_6, tensors unexplained: 1 \(features\.1\.extra\.weight\)',
    ),
    'tensor of another shape': (
        lambda t: {**t, 'features.0.0.c.weight': torch.ones(1, 3, 3, 3)},
        r'compared with m0_6, tensors of another shape: 1 '
        r'\(stem\.conv1\.conv\.weight: \(1, 3, 3, 3\) for \(20, 3, 3, 3\)\)',
    ),
    'another network': (
        lambda t: {'layer1.0.conv1.weight': torch.ones(1)},
        r'holds no (\w+ or )+\w+: its first tensor is layer1\.0\.conv1\.weight',
    ),
    'no tensor': (lambda t: {'epoch': 3}, r'holds no (\w+ or )+\w+: it holds no tensor at all'),
    'no dict': (lambda t: [1, 2], r'holds no (\w+ or )+\w+: it holds no tensor at all'),
}


@pytest.mark.parametrize('options', [['--check'], ['out.pth']], ids=str)
@pytest.mark.parametrize('case', BAD)
def test_bad_file_is_refused(tmp_path, monkeypatch, case, options):
    monkeypatch.chdir(tmp_path)
    change, message = BAD[case]
    torch.save(change(weights(SMALLEST)), 'in.pth')
    with pytest.raises(SystemExit, match=rf'^in\.pth .*{message}$'):
        main(['in.pth', *options])
    assert [path.name for path in tmp_path.iterdir()] == ['in.pth']


@pytest.mark.parametrize(
    ('content', 'message'),
    [(b'', 'is empty'), (b'<!DOCTYPE html>', 'is a web page'), (b'x' * 99, 'is damaged'), (None, 'not found')],
)
def test_file_that_cannot_be_read_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / 'in.pth').write_bytes(content)
    with pytest.raises(SystemExit, match=rf'in\.pth {message}'):
        main([str(tmp_path / 'in.pth'), '--check'])


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_code_runs_only_if_it_is_trusted(tmp_path):
    file, target = tmp_path / 'in.pth', tmp_path / 'was_run'
    torch.save({'model': weights(SMALLEST), 'args': Payload(target)}, file)
    with pytest.raises(SystemExit, match='--trust-checkpoint'):
        main([str(file), '--check'])
    assert not target.exists()
    main([str(file), '--check', '--trust-checkpoint'])
    assert target.exists()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['in.pth', 'out.onnx'], r'out\.onnx: expected a name that ends in \.pth or \.safetensors, or a folder'),
        (['in.pth', 'out.safetensors', '--keep-metadata'], r'--keep-metadata: out\.safetensors can hold nothing but'),
    ],
)
def test_wrong_use_gets_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments)


@pytest.mark.slow
def test_as_a_program(tmp_path, smallest):
    done = launch_anew(tmp_path, 'convert_checkpoint.py', smallest, tmp_path / 'a.pth', '--to', 'timm', '--fuse')
    # MMEngine 0.8 warns as it is imported.
    said = [line for line in done.stderr.splitlines() if 'pkg_resources' not in line]
    assert done.returncode == 0 and not any('Warning' in line for line in said)
    assert done.stdout.splitlines()[0].startswith(f'{smallest}: RepViT m0_6, training form')
    done = launch(tmp_path, 'convert_checkpoint.py', tmp_path / 'a.pth', '--check')
    assert done.returncode == 0 and "fused form, timm's names" in done.stdout
    done = launch(tmp_path, 'convert_checkpoint.py', tmp_path / 'b.pth', '--check')
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'the nearest is' in done.stderr
    done = launch(tmp_path, 'convert_checkpoint.py', tmp_path / 'a.pth')
    assert done.returncode == 2 and 'OUT is missing' in done.stderr


class TestWithoutTheTool:
    def test_same_tensors(self, tmp_path, smallest):
        main([str(smallest), str(tmp_path / 'a.pth'), '--to', 'timm', '--fuse'])
        content = content_of(read_checkpoint(smallest))
        converted = convert(content, 'timm', fuse=True)
        assert (converted.to, converted.container, converted.fused, converted.set_aside) == ('timm', None, 56, 14)
        assert equal(converted.tensors, read(tmp_path / 'a.pth'))
        assert not convert(content_of(converted.tensors), 'timm', fuse=True).fused

    def test_what_was_given_stays(self, smallest):
        checkpoint = read_checkpoint(smallest)
        before = {name: tensor.clone() for name, tensor in checkpoint['model'].items()}
        converted = convert(content_of(checkpoint), 'authors')
        for tensor in converted.tensors.values():
            tensor.zero_()
        assert equal(checkpoint['model'], before)

    def test_bad_checkpoint_is_an_error_that_can_be_caught(self):
        with pytest.raises(CheckpointError, match=r'^the checkpoint holds no .*: it holds no tensor at all$'):
            content_of({'epoch': 3})
        fastvit = SOURCES['fastvit_t8']
        fused = fastvit.backbone(fastvit.arch, deploy=True).state_dict()
        with pytest.raises(CheckpointError, match=r"^a\.pth cannot get timm's names: .* fused further"):
            convert(content_of(fused, 'a.pth'), 'timm')
