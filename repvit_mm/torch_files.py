"""Reading the files of ``torch.save`` without torch's own reader, which before torch 2.6 can be made to run code.

``torch.load(weights_only=True)`` of those versions has no allow-list under names of one's choice either. This reader is
the same beside every torch. It reads the zip format (since torch 1.6) and the one before it, but no tar files (before
0.1.10). Nothing that a file claims is believed: what it takes in memory is bounded by its size, and a tensor lies
within its storage.
"""

import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from .compat.pytorch import maps_checkpoints
from .unpickling import Listing, Machine, Maker

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
"""What a file of the older format begins with."""

PROTOCOL = 1001
"""The version of the older format; there was no other."""

LARGEST = 2**63 - 1

OTHER_ORDER = 'its numbers are in the byte order of another processor'

MapLocation = str | torch.device | dict[str, str] | Callable | None
"""Where storages go, as ``torch.load`` takes it."""


class Stored(NamedTuple):
    """Part of a storage, counted in elements. Without a storage only the file's structure is being looked at."""

    storage: torch.UntypedStorage | None
    dtype: torch.dtype
    start: int
    length: int


def refuse(condition: bool, message: str) -> None:
    """Raise an error if a condition holds."""
    if condition:
        raise pickle.UnpicklingError(message)


def are_lengths(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value <= LARGEST for value in values)


# -------------------------------------------------------------------------------------------------------------- tensors
def view(stored: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    """The tensor that lies in a storage at an offset; torch's ``set_`` would enlarge a storage that is too small."""
    refuse(type(stored) is not Stored, 'a tensor has no storage')
    shaped = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 64
    refuse(not (shaped and are_lengths(offset, *size, *stride)), 'the shape of a tensor is none')
    count, last = 1, offset
    for length, step in zip(size, stride, strict=True):
        count *= length
        last += (length - 1) * step
    refuse(count > LARGEST or (count > 0 and last >= stored.length), 'a tensor is larger than its storage')
    if stored.storage is None:
        return torch.empty(0, dtype=stored.dtype)
    empty = torch.empty(0, dtype=stored.dtype, device=stored.storage.device)
    return empty.set_(stored.storage, stored.start + offset if count else 0, size, stride)


def rebuild_tensor(
    stored: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    bits: Any = None,
) -> Tensor:
    """Stand-in for ``_rebuild_tensor`` and ``_rebuild_tensor_v2``. Hooks are none in files of today."""
    refuse(bool(bits), 'a tensor is conjugated or negated')
    return view(stored, offset, size, stride).requires_grad_(requires_grad is True)


def rebuild_tensor_of_type(
    stored: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    bits: Any = None,
) -> Tensor:
    """Stand-in for ``_rebuild_tensor_v3``: the storage is one of bytes."""
    refuse(type(stored) is not Stored or not isinstance(dtype, torch.dtype), 'a tensor has no type')
    refuse(stored.dtype is not torch.uint8, 'a tensor has two types')
    elements = Stored(stored.storage, dtype, 0, stored.length // bytes_per_element(dtype))
    return rebuild_tensor(elements, offset, size, stride, requires_grad, hooks, bits)


def rebuild_parameter(data: Any, requires_grad: Any = True, hooks: Any = None, state: Any = None) -> torch.nn.Parameter:
    """Stand-in for ``Parameter``, ``_rebuild_parameter`` and ``_rebuild_parameter_with_state``, without the state."""
    refuse(not isinstance(data, Tensor), 'a parameter has no tensor')
    return torch.nn.Parameter(data, requires_grad is True)


def rebuild_with_attributes(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Tensor:
    """Stand-in for ``_rebuild_from_type_v2``: a tensor without the attributes that it was given in Python."""
    known = type(rebuild) is Maker and type(arguments) is tuple and kind in (TENSOR, PARAMETER)
    refuse(not known, 'a tensor is of a type of its own')
    tensor = rebuild.make(*arguments)
    refuse(not isinstance(tensor, Tensor), 'a tensor is none')
    return tensor


def make_size(lengths: Any = ()) -> torch.Size:
    """Stand-in for ``torch.Size``."""
    refuse(not (isinstance(lengths, tuple | list) and are_lengths(*lengths)), 'a size is none')
    return torch.Size(lengths)


def make_device(kind: Any, index: Any = None) -> torch.device:
    """Stand-in for ``torch.device``."""
    refuse(type(kind) is not str or type(index) not in (int, type(None)), 'a device is none')
    return torch.device(kind) if index is None else torch.device(kind, index)


def make_empty(*_: Any) -> Tensor:
    raise pickle.UnpicklingError('a tensor is written as torch wrote it before 0.4')


@cache
def bytes_per_element(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


TENSOR = Maker(make_empty)
PARAMETER = Maker(rebuild_parameter)

DTYPES = {f'torch.{name}': value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

STORAGES = {
    f'torch.{prefix}{name}Storage': dtype
    for prefix in ('', 'cuda.')
    for name, dtype in (
        ('Double', torch.float64),
        ('Float', torch.float32),
        ('Half', torch.float16),
        ('BFloat16', torch.bfloat16),
        ('Long', torch.int64),
        ('Int', torch.int32),
        ('Short', torch.int16),
        ('Char', torch.int8),
        ('Byte', torch.uint8),
        ('Bool', torch.bool),
        ('ComplexDouble', torch.complex128),
        ('ComplexFloat', torch.complex64),
    )
} | {'torch.storage.UntypedStorage': torch.uint8}
"""The type of the elements, which is what counts of a storage's class."""

TENSORS = {
    'torch.Tensor': TENSOR,
    'torch.nn.parameter.Parameter': PARAMETER,
    'torch._utils._rebuild_tensor': Maker(rebuild_tensor),
    'torch._utils._rebuild_tensor_v2': Maker(rebuild_tensor),
    'torch._utils._rebuild_tensor_v3': Maker(rebuild_tensor_of_type),
    'torch._utils._rebuild_parameter': PARAMETER,
    'torch._utils._rebuild_parameter_with_state': PARAMETER,
    'torch._tensor._rebuild_from_type_v2': Maker(rebuild_with_attributes),
    'torch.Size': Maker(make_size),
    'torch.device': Maker(make_device),
    **DTYPES,
    **STORAGES,
}
"""What files of ``torch.save`` refer to for their tensors. Sparse, quantized and nested tensors are not among them."""


# ------------------------------------------------------------------------------------------------------------- storages
@dataclass
class Reader:
    """What the two formats have in common.

    Args:
        file: The file, open.
        path: Its path.
        size: Its size in bytes.
        map_location: Where storages go.
        listing: What the file may refer to.
    """

    file: IO[bytes]
    path: Path
    size: int
    map_location: MapLocation
    listing: Listing
    storages: dict[str, torch.UntypedStorage] = field(default_factory=dict)
    taken: int = 0

    def unpickle(self, stream: IO[bytes], length: int, persistent_load: Callable[[Any], Any]) -> Any:
        """The object of a pickle that is so many bytes long at most."""
        return Machine(self.listing, persistent_load, budget=8 * length + 1000).load(stream)

    def described(self, saved: Any, count: int) -> tuple:
        """What a pickle calls a storage: its elements' type, key, location, number of elements, and what else."""
        refuse(type(saved) is not tuple or len(saved) != count or saved[0] != 'storage', 'a storage is none')
        _, dtype, key, location, length, *_ = saved
        typed = isinstance(dtype, torch.dtype) and type(key) is str and type(location) is str
        refuse(not (typed and are_lengths(length)), 'a storage has no type, place or size')
        return saved[1:]

    def read_storage(self, start: int, length: int, location: str) -> torch.UntypedStorage:
        """Bytes of the file as a storage, where it belongs."""
        self.taken += length
        refuse(self.taken > self.size or start + length > self.size, 'its tensors take more bytes than it has')
        if maps_checkpoints():
            storage = torch.UntypedStorage.from_file(str(self.path), False, self.size)[start : start + length]
        else:
            content = torch.empty(length, dtype=torch.uint8)
            self.file.seek(start)
            refuse(self.file.readinto(content.numpy()) != length, 'it ends within a tensor')
            storage = content.untyped_storage()
        return place(storage, location, self.map_location)


def place(storage: torch.UntypedStorage, location: str, map_location: MapLocation) -> torch.UntypedStorage:
    """A storage at its place: as ``torch.load`` decides on it."""
    if callable(map_location):
        placed = map_location(storage, location)
        if placed is not None:
            return placed
    elif isinstance(map_location, dict):
        location = map_location.get(location, location)
    elif map_location is not None:
        location = str(map_location)
    return torch.serialization.default_restore_location(storage, location)


class ZipReader(Reader):
    """The format since torch 1.6: an archive with a pickle, ``data.pkl``, and a record for each storage."""

    def read(self) -> Any:
        """The object that was saved."""
        with zipfile.ZipFile(self.file) as archive:
            self.records = {record.filename.partition('/')[2]: record for record in archive.infolist()}
        refuse('constants.pkl' in self.records, 'it is a program of TorchScript')
        refuse('data.pkl' not in self.records, 'it is an archive without data.pkl')
        if 'byteorder' in self.records:
            refuse(self.content('byteorder') != sys.byteorder.encode(), OTHER_ORDER)
        pickled = self.content('data.pkl')
        return self.unpickle(io.BytesIO(pickled), len(pickled), self.load_storage)

    def span(self, name: str) -> tuple[int, int]:
        """Where the bytes of a record begin, and how many they are."""
        record = self.records[name]
        refuse(record.compress_type != zipfile.ZIP_STORED, 'it is compressed, which torch.save never does')
        # The lengths of a record's name and of its extra field stand here; the archive's directory may have others.
        self.file.seek(record.header_offset)
        signature, name_length, extra_length = struct.unpack('<4s22xHH', self.file.read(30))
        refuse(signature != b'PK\3\4', 'its directory is wrong')
        return record.header_offset + 30 + name_length + extra_length, record.file_size

    def content(self, name: str) -> bytes:
        """The bytes of a record. Their checksum means nothing: ``torch.save`` may be told to leave it out."""
        start, length = self.span(name)
        refuse(start + length > self.size, 'it ends too early')
        self.file.seek(start)
        return self.file.read(length)

    def load_storage(self, saved: Any) -> Stored:
        """The storage that the pickle refers to."""
        dtype, key, location, length = self.described(saved, 5)
        if key not in self.storages:
            start, count = self.span(f'data/{key}')
            refuse(count != length * bytes_per_element(dtype), 'a tensor has another number of bytes than it says')
            self.storages[key] = self.read_storage(start, count, location)
        storage = self.storages[key]
        refuse(length * bytes_per_element(dtype) > storage.nbytes(), 'a storage has two sizes')
        return Stored(storage, dtype, 0, length)


class BoundedFile:
    """A file as ``pickletools`` reads it, which never asks for more bytes than are left: they would be reserved."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size, self.tell, self.readline = file, size, file.tell, file.readline

    def read(self, count: int) -> bytes:
        return self.file.read(count if count < io.DEFAULT_BUFFER_SIZE else min(count, self.size - self.file.tell()))


class LegacyReader(Reader):
    """The format before torch 1.6: several pickles, and behind them the bytes of the storages."""

    def read(self) -> Any:
        """The object that was saved."""
        for expected in (MAGIC_NUMBER, PROTOCOL):
            refuse(self.load(self.load_nothing) != expected, 'it is no file of torch.save')
        refuse(self.load(self.load_nothing).get('little_endian') is not (sys.byteorder == 'little'), OTHER_ORDER)
        # The sizes of the storages stand in the pickle, which is followed by their bytes. So it is read twice.
        start = self.file.tell()
        self.found: dict[str, tuple[torch.dtype, int, str]] = {}
        self.load(self.note_storage)
        keys = self.load(self.load_nothing)
        refuse(type(keys) is not list or set(keys) != set(self.found), 'its tensors are not those that it lists')
        for key in keys:
            dtype, length, location = self.found[key]
            refuse(self.file.read(8) != struct.pack('<q', length), 'a tensor has another size than it says')
            begin, count = self.file.tell(), length * bytes_per_element(dtype)
            self.storages[key] = self.read_storage(begin, count, location)
            self.file.seek(begin + count)
        self.file.seek(start)
        return self.load(self.load_storage)

    def load(self, persistent_load: Callable[[Any], Any]) -> Any:
        return self.unpickle(BoundedFile(self.file, self.size), self.size, persistent_load)

    def load_nothing(self, saved: Any) -> None:
        raise pickle.UnpicklingError('it has a tensor where none belongs')

    def note_storage(self, saved: Any) -> Stored:
        """Note what storages there are; their bytes follow."""
        dtype, key, location, length, part = self.described(saved, 6)
        known = self.found.setdefault(key, (dtype, length, location))
        refuse(known != (dtype, length, location), 'a storage is described in two ways')
        return self.part_of(None, dtype, length, part)

    def load_storage(self, saved: Any) -> Stored:
        """The storage that the pickle refers to, or the part of it."""
        dtype, key, _, length, part = self.described(saved, 6)
        return self.part_of(self.storages[key], dtype, length, part)

    def part_of(self, storage: torch.UntypedStorage | None, dtype: torch.dtype, length: int, part: Any) -> Stored:
        if part is None:
            return Stored(storage, dtype, 0, length)
        refuse(type(part) is not tuple or len(part) != 3 or not are_lengths(*part[1:]), 'part of a storage is none')
        _, start, count = part
        refuse(start + count > length, 'part of a storage lies outside of it')
        return Stored(storage, dtype, start, count)


def read_torch_file(path: Path, map_location: MapLocation, listing: Listing) -> Any:
    """What a file of ``torch.save`` holds.

    Args:
        path: Path of the file.
        map_location: As in ``torch.load``.
        listing: What the file may refer to besides :data:`TENSORS`.

    Raises:
        RefusedError: if it refers to anything else.
        pickle.UnpicklingError: if it does what no file of ``torch.save`` does.
        Exception: of any kind, if it is damaged.
    """
    listing = Listing({**TENSORS, **listing.globals}, listing.states)
    with path.open('rb') as file:
        is_zip = file.read(4) == b'PK\3\4'
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        return (ZipReader if is_zip else LegacyReader)(file, path, size, map_location, listing).read()
