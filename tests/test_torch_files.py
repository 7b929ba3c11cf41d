"""The reader of ``torch.save``'s files: torch's own tensors bit by bit, and nothing that could do anything."""

import copyreg
import io
import pickle
import pickletools
import struct
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from helpers import since_torch
from mmengine.logging import HistoryBuffer
from torch import nn

from repvit_mm.checkpoint import CheckpointError, read_checkpoint
from repvit_mm.unpickling import ACTIONS

FORMATS = {'zip': True, 'legacy': False}


@pytest.fixture(params=FORMATS)
def save(request: pytest.FixtureRequest, tmp_path: Path):
    """Writes a file in one of torch's two formats; returns its path."""

    def save(content) -> Path:
        path = tmp_path / 'a.pth'
        torch.save(content, path, _use_new_zipfile_serialization=FORMATS[request.param])
        return path

    return save


@pytest.fixture
def save_pickle(tmp_path: Path):
    """Writes an archive with a pickle of one's own, and records; returns its path."""

    def save_pickle(content: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
        path = tmp_path / 'a.pth'
        with zipfile.ZipFile(path, 'w', compression) as archive:
            for name, data in {'data.pkl': content, **records}.items():
                archive.writestr(f'archive/{name}', data)
        return path

    return save_pickle


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)
    return str(error.value)


def assert_same(found, expected) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype is expected.dtype and found.shape == expected.shape and found.stride() == expected.stride()
        assert found.requires_grad == expected.requires_grad and found.storage_offset() == expected.storage_offset()
        assert found.device == expected.device and found.is_leaf
        assert bytes(found.untyped_storage()) == bytes(expected.untyped_storage())
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
        assert getattr(found, '_metadata', None) == getattr(expected, '_metadata', None)
    elif isinstance(expected, list | tuple):
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected


def trained() -> dict:
    """What a run saves: a model with statistics, an optimizer with state, a scheduler."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.05)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return dict(
        model=model.state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(), epoch=2**40
    )


DTYPES = ['float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'int16', 'int8', 'uint8', 'bool', 'complex64']


def tensors() -> dict:
    """Tensors of every kind, and several in one storage."""
    base = torch.randn(4, 6)
    return dict(
        kinds=[torch.randn(3).mul(5).to(getattr(torch, name)) for name in DTYPES],
        whole=base,
        views=[base[1:, ::2], base.T, base[2, 3], base[:0], torch.tensor(1.0).expand(3, 4)],
        others=(nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)),
        wanting=torch.zeros(2, requires_grad=True),
        nothing=[torch.empty(0), torch.empty(0, 3), torch.tensor(7)],
        types=[torch.float32, torch.Size((1, 2)), torch.device('cpu')],
    )


def plain() -> list:
    return [OrderedDict(b=1, a=[2.5, None, True]), {'ä': -1, 3: 2**100}, (), ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4))]


@pytest.mark.parametrize('content', [trained, tensors, plain])
def test_equals_what_torch_reads(save, content):
    path = save(content())
    assert_same(read_checkpoint(path), torch.load(path, weights_only=False))


def test_further_plain_values(save):
    path = save([{1, 2}, bytearray(b'\xff'), b'\x00\x80', 1 + 2j, Counter('aab')])
    assert read_checkpoint(path) == [{1, 2}, bytearray(b'\xff'), b'\x00\x80', 1 + 2j, {'a': 2, 'b': 1}]


def test_tensors_share_their_storage_again(save):
    base = torch.zeros(4)
    found = read_checkpoint(save({'a': base, 'b': base[1:], 'c': torch.zeros(4)}))
    found['b'][0] = 1
    assert found['a'].tolist() == [0, 1, 0, 0] and found['c'].sum() == 0


@since_torch('2.3', 'uint16')
def test_types_without_a_storage_class(tmp_path):
    """Torch itself does not read them from the older format."""
    path = tmp_path / 'a.pth'
    numbers = torch.tensor([1, 2, 3, 65535], dtype=torch.uint16)
    torch.save({'a': numbers[2:], 'b': torch.ones(3).to(torch.float8_e4m3fn)}, path)
    assert_same(read_checkpoint(path), torch.load(path, weights_only=False))


def test_attributes_of_tensors_are_left_out(save):
    tensor, parameter = torch.ones(2), nn.Parameter(torch.ones(3))
    tensor.note = parameter.note = 'mine'
    found = read_checkpoint(save([tensor, parameter]))
    assert [type(value) for value in found] == [torch.Tensor, nn.Parameter]
    assert not any(hasattr(value, 'note') for value in found)


def to_meta(storage: torch.UntypedStorage, place: str) -> torch.UntypedStorage | None:
    return torch.UntypedStorage(storage.nbytes(), device='meta') if place == 'cpu' else None


@pytest.mark.parametrize(
    'where',
    ['meta', torch.device('meta'), {'cpu': 'meta'}, to_meta],
    ids=['name', 'device', 'table', 'function'],
)
def test_places_of_tensors(save, where):
    path = save({'a': torch.ones(2, 3)})
    found = read_checkpoint(path, where)['a']
    assert found.is_meta and found.shape == (2, 3)
    assert read_checkpoint(path, lambda storage, place: None)['a'].device.type == 'cpu'


@since_torch('2.7', 'mapping by default')
def test_files_are_mapped_where_torch_maps_them(save):
    path = save({'a': torch.arange(6.0).view(2, 3)})
    with torch.utils.serialization.config.patch('load.mmap', True):
        found = read_checkpoint(path)['a']
    assert str(path) in Path('/proc/self/maps').read_text()
    found += 1
    assert found.tolist() == [[1, 2, 3], [4, 5, 6]] and read_checkpoint(path)['a'][0, 0] == 0


# --------------------------------------------------------------------------------------- pickles that want to do things
MARK, BUILD, REDUCE, STOP, EMPTY_DICT = b'(', b'b', b'R', b'.', b'}'


def text(value: str) -> bytes:
    return b'X' + struct.pack('<I', len(value)) + value.encode()


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition('.')
    return f'c{module}\n{attribute}\n'.encode()


GETATTR, HISTORY = named('builtins.getattr'), named('mmengine.logging.history_buffer.HistoryBuffer')
STATE = EMPTY_DICT + text('make') + text('x') + b's'

GADGETS = {
    'state of a class': (named('collections.OrderedDict') + STATE + BUILD, 'sets the state of a Maker'),
    'state of a function': (named('_codecs.encode') + STATE + BUILD, 'sets the state of a Maker'),
    'state of a type of numbers': (named('torch.float32') + STATE + BUILD, 'sets the state of a dtype'),
    'state of a method': (
        GETATTR + HISTORY + text('min') + b'\x86R'
        + STATE + BUILD,
        'sets the state of a function',
    ),
    'state of a list': (b']' + STATE + BUILD, 'sets the state of a list'),
    'state that hides a method': (
        named('collections.OrderedDict') + b')R' + EMPTY_DICT + text('items') + text('x') + b's' + BUILD,
        'the state of a OrderedDict is none',
    ),
    'class of its own': (
        named('argparse.Namespace') + b')\x81' + EMPTY_DICT + text('__class__') + text('x') + b's' + BUILD,
        'the state of a Namespace is none',
    ),
    'extension code': (b'\x82\x01', 'EXT1'),
    'extension code 2': (b'\x83\x01\x00', 'EXT2'),
    'extension code 4': (b'\x84\x01\x00\x00\x00', 'EXT4'),
    'old instance': (b'(' + b'ios\nsystem\n', 'INST'),
    'old object': (b'(' + named('collections.OrderedDict') + b'o', 'OBJ'),
    'names on the stack': (text('os') + text('system') + b'\x93', 'STACK_GLOBAL'),
    'keyword arguments': (named('argparse.Namespace') + b')}\x92', 'NEWOBJ_EX'),
    'persistent text': (b'Pstorage\n', 'PERSID'),
    'persistent list': (b']Q', 'a storage is none'),
    'persistent module': (text('module') + b']\x86Q', 'a storage is none'),
    'buffer': (b'\x97', 'NEXT_BUFFER'),
    'call of a text': (text('os.system') + b')' + REDUCE, 'calls a str'),
    'call of a method': (
        GETATTR + HISTORY + text('min') + b'\x86R)R',
        'calls a function',
    ),
    'arguments that are no tuple': (named('collections.OrderedDict') + b']' + REDUCE, 'calls a Maker'),
    'items of a size': (named('torch.Size') + b')R' + text('a') + text('b') + b's', 'fills a Size'),
    'entries of a tuple': (b')' + text('b') + b'a', 'fills a tuple'),
    'getattr of a tensor': (GETATTR + named('torch.Tensor') + text('min') + b'\x86R', "getattr of 'min'"),
    'getattr of more': (
        GETATTR + HISTORY + text('__init__') + b'\x86R',
        "getattr of '__init__'",
    ),
    'compression': (named('_codecs.encode') + text('abc') + text('zlib') + b'\x86R', 'bytes are written as'),
    'length of bytes': (named('builtins.bytearray') + b'J\xff\xff\xff\x7f\x85R', 'bytes are written as no file does'),
    'text as a path': (named('pathlib.PosixPath') + b']\x85R', 'a path is none'),
    'type of a tensor': (
        named('torch._tensor._rebuild_from_type_v2') + MARK + named('_codecs.encode') + named('torch.Tensor')
        + text('abc') + text('latin1') + b'\x86' + EMPTY_DICT + b'tR',
        'a tensor is none',
    ),
    'several modules': (named('torch.nn.modules.linear.Linear') + b')\x81', 'refers to torch.nn.modules.linear.Linear'),
    'name with a dot': (b'ctorch\nTensor.__init__\n', 'refers to torch.Tensor.__init__'),
    'unprintable name': (b'cos\nsys\x1b[2Jtem\n', r'refers to os.sys\x1b[2Jtem'),
    'end without beginning': (b't', 'damaged'),
    'nothing': (b'', 'damaged'),
    'unknown in the memo': (b'h\x07', 'damaged'),
}  # fmt: skip


@pytest.mark.parametrize('name', GADGETS)
def test_gadget_is_refused(save_pickle, name):
    content, message = GADGETS[name]
    assert message in refusal(save_pickle(b'\x80\x02' + content + STOP))


def test_what_is_not_listed_is_not_even_imported(save_pickle, tmp_path, monkeypatch):
    (tmp_path / 'not_imported_before.py').write_text('')
    monkeypatch.syspath_prepend(tmp_path)
    path = save_pickle(b'\x80\x02' + named('not_imported_before.run') + STOP)
    assert 'refers to not_imported_before.run' in refusal(path)
    assert 'not_imported_before' not in sys.modules


def test_extension_registry_is_not_asked(save_pickle, monkeypatch):
    monkeypatch.setitem(copyreg._inverted_registry, 1, ('os', 'system'))
    assert 'EXT1' in refusal(save_pickle(b'\x80\x02\x82\x01.'))


def test_only_the_opcodes_of_protocol_2_have_a_meaning():
    known = {code.name: code for code in pickletools.opcodes}
    assert ACTIONS.keys() <= known.keys()
    assert all(known[name].proto <= 2 for name in ACTIONS)
    assert not ACTIONS.keys() & {'EXT1', 'EXT2', 'EXT4', 'INST', 'OBJ', 'PERSID', 'STACK_GLOBAL', 'NEWOBJ_EX'}


def test_statistics_of_a_file_stay_in_the_file(tmp_path):
    """MMEngine would have every history use them from then on."""
    history = HistoryBuffer([1.0], [1])
    before = dict(HistoryBuffer._statistics_methods)
    state = {**vars(history), 'statistics_methods': {'mean': 'no function'}}

    class Other:
        def __reduce__(self):
            return HistoryBuffer, (), state

    torch.save({'a': Other()}, tmp_path / 'a.pth')
    assert read_checkpoint(tmp_path / 'a.pth')['a'].statistics('mean') == 1
    assert HistoryBuffer._statistics_methods == before


class TestMemory:
    """What is read takes no more than its file."""

    def test_copies_of_one_list(self, save_pickle):
        items = MARK + text('a') * 1000 + b'tq\x00'
        content = b'\x80\x02](' + items + (named('builtins.set') + b'h\x00\x85R') * 5000 + b'e.'
        assert 'it grows as it is read' in refusal(save_pickle(content))

    @pytest.mark.parametrize(
        ('offset', 'size', 'stride'),
        [
            (0, (5,), (1,)), (1, (4,), (1,)), (0, (2, 3), (2, 1)), (4, (1,), (1,)), (-1, (1,), (1,)), (0, (-1,), (1,)),
            (0, (2,), (-1,)), (0, (2**62, 4), (0, 0)), (0, (2,), (2**63,)), (0, (2, 2), (1,)), (True, (1,), (1,)),
            (0, (1,) * 65, (1,) * 65),
        ],
    )  # fmt: skip
    def test_tensor_outside_of_its_storage(self, save, offset, size, stride):
        base = torch.zeros(4)

        class Larger:
            def __reduce__(self):
                function, arguments = base.__reduce_ex__(2)
                return function, (arguments[0], offset, size, stride, *arguments[4:])

        assert 'tensor' in refusal(save({'a': Larger()}))

    def test_size_that_a_file_does_not_have(self, save_pickle):
        def storage(length: int, key: str = '0') -> bytes:
            described = text('storage') + named('torch.FloatStorage') + text(key) + text('cpu')
            return MARK + described + b'\x8a\x08' + struct.pack('<q', length) + b'tQ'

        numbers = {'data/0': bytes(16)}
        assert 'number of bytes' in refusal(save_pickle(b'\x80\x02' + storage(2**40) + STOP, **numbers))
        assert 'is damaged' in refusal(save_pickle(b'\x80\x02' + storage(4, '1') + STOP, **numbers))
        assert read_checkpoint(save_pickle(b'\x80\x02' + storage(4) + STOP, **numbers)).length == 4

    def test_records_that_lie_in_the_same_place(self, save_pickle):
        """A thousand storages of the same thousand bytes would take a thousand times their file."""
        path = save_pickle(b'\x80\x02](' + b''.join(
            MARK + text('storage') + named('torch.ByteStorage') + text(str(key)) + text('cpu') + b'M\xe8\x03tQ'
            for key in range(1000)
        ) + b'e.', **{f'data/{key}': bytes(1000 if key == 0 else 0) for key in range(1000)})  # fmt: skip
        content = bytearray(path.read_bytes())
        place = content.index(b'PK\1\2')
        first = None
        while content[place : place + 4] == b'PK\1\2':
            lengths = struct.unpack_from('<HHH', content, place + 28)
            name = content[place + 46 : place + 46 + lengths[0]]
            if name == b'archive/data/0':
                first = content[place + 16 : place + 28], content[place + 42 : place + 46]
            elif name.startswith(b'archive/data/'):
                content[place + 16 : place + 28], content[place + 42 : place + 46] = first
            place += 46 + sum(lengths)
        path.write_bytes(content)
        assert 'damaged' in refusal(path)

    def test_compressed_archive(self, save_pickle):
        assert 'it is compressed' in refusal(save_pickle(b'\x80\x02' + bytes(10**6) + b'.', zipfile.ZIP_DEFLATED))


class TestOtherFiles:
    """What is no file of ``torch.save``, or one that is not read."""

    def test_program(self, tmp_path):
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / 'a.pth')
        assert 'it is a program of TorchScript' in refusal(tmp_path / 'a.pth')

    def test_other_byte_order(self, save_pickle):
        order = 'big' if sys.byteorder == 'little' else 'little'
        assert 'byte order' in refusal(save_pickle(b'\x80\x02N.', byteorder=order.encode()))
        assert read_checkpoint(save_pickle(b'\x80\x02N.', byteorder=sys.byteorder.encode())) is None

    def test_archive_of_something_else(self, tmp_path):
        with zipfile.ZipFile(tmp_path / 'a.pth', 'w') as archive:
            archive.writestr('a/b.txt', 'x')
        assert 'without data.pkl' in refusal(tmp_path / 'a.pth')

    def test_tar_file(self, tmp_path):
        with tarfile.open(tmp_path / 'a.pth', 'w') as archive:
            archive.addfile(tarfile.TarInfo('storages'), io.BytesIO())
        assert 'is damaged or no checkpoint' in refusal(tmp_path / 'a.pth')

    def test_plain_pickle(self, tmp_path):
        (tmp_path / 'a.pth').write_bytes(pickle.dumps({'a': 1}, protocol=2))
        assert 'it is no file of torch.save' in refusal(tmp_path / 'a.pth')

    def test_sparse_tensor(self, save):
        assert 'refers to torch._utils._rebuild_sparse_tensor' in refusal(save({'a': torch.eye(2).to_sparse()}))

    def test_whole_model(self, save):
        assert 'refers to torch.nn.modules.linear.Linear' in refusal(save(nn.Linear(1, 1)))

    def test_state_dict_that_holds_itself(self, save_pickle):
        path = save_pickle(b'\x80\x02}q\x00' + text('state_dict') + b'h\x00s.')
        found = read_checkpoint(path)
        assert found['state_dict'] is found

    def test_damaged_legacy_file(self, tmp_path):
        path = tmp_path / 'a.pth'
        torch.save({'a': torch.ones(3)}, path, _use_new_zipfile_serialization=False)
        whole = path.read_bytes()
        size = whole.rindex(struct.pack('<q', 3))
        for content, message in (
            (whole[:-1], 'its tensors take more bytes than it has'),
            (whole[:size] + struct.pack('<q', 4) + whole[size + 8 :], 'another size'),
        ):
            path.write_bytes(content)
            assert message in refusal(path)
