"""Reading checkpoints without running anything in them."""

import difflib
import re
import socket
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, get_rank
from mmengine.runner import CheckpointLoader
from torch import Tensor

from .compat.openmmlab import replace_reader_of_addresses
from .compat.pytorch import WeakTensorKeyDictionary
from .messages import one_line
from .names import NAMINGS
from .safe_globals import METADATA
from .torch_files import read_torch_file
from .unpickling import RefusedError

CONTAINERS = ('state_dict', 'model', 'state_dict_ema', 'model_ema', 'ema_state_dict')
"""Keys under which checkpoints keep their tensors, the preferred one first."""


TRUSTED: set[str] = set()
"""Files that may run code as they are read; see :func:`trust`."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or does not fit; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Source:
    """Where a tensor was read from.

    Args:
        file: Path of the file.
        tap: The tap that its network was trained with, if the file tells.
    """

    file: str = 'the state dict'
    tap: str | None = None


# Not an attribute of the tensors: it would be saved with them.
_SOURCES: MutableMapping[Tensor, Source] = WeakTensorKeyDictionary()


def trust(*files: str | Path) -> None:
    """Allow these files to run code while they are read, because you trust their authors.

    This holds for every reader in this process: the package's own, and MMEngine's behind ``init_detector`` or
    ``load_from``. The tools have the option ``--trust-checkpoint`` for it.
    """
    TRUSTED.update(str(Path(file).expanduser().resolve()) for file in files)


def read_checkpoint(filename: str | Path, map_location: Any = None) -> Any:
    """Read a ``.pth`` or ``.safetensors`` file without running anything in it, unless :data:`TRUSTED` names it.

    The file is remembered for each tensor, so that later messages can name it.

    Args:
        filename: Path of the file.
        map_location: As in ``torch.load``.

    Returns:
        What the file holds.

    Raises:
        CheckpointError: if there is no such file, if it is no checkpoint or a damaged one, or if it holds anything
            but tensors, plain containers and harmless metadata.
    """
    path = Path(filename).expanduser()
    check_file(path)
    if path.suffix == '.safetensors':
        checkpoint = read_safetensors(path, map_location)
    else:
        checkpoint = read_pickle(path, map_location)
    remember_source(checkpoint, path)
    return checkpoint


def check_file(path: Path) -> None:
    """Raise a :class:`CheckpointError` unless ``path`` is a file that may be a checkpoint."""
    if path.is_dir():
        raise CheckpointError(f'checkpoint {path} is a folder: name the file in it')
    if not path.exists():
        names = [str(other) for suffix in ('pth', 'pt', 'safetensors') for other in path.parent.glob(f'*.{suffix}')]
        nearest = difflib.get_close_matches(str(path), names, n=1)
        raise CheckpointError(f'checkpoint {path} not found' + (f'; the nearest is {nearest[0]}' if nearest else ''))
    with path.open('rb') as file:
        start = file.read(64).lstrip().lower()
    if not start:
        raise CheckpointError(f'checkpoint {path} is empty: fetch it again')
    if start.startswith((b'<!doctype', b'<html', b'<?xml')):
        raise CheckpointError(
            f'checkpoint {path} is a web page, not a checkpoint: fetch the file that the page links to'
        )


def read_safetensors(path: Path, map_location: Any) -> dict[str, dict[str, Tensor]]:
    """The tensors of a ``.safetensors`` file, in the containers that MMSegmentation's ``init_model`` asks for."""
    # Imported here because only those who read such files need it.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    device = map_location if isinstance(map_location, str | torch.device) else 'cpu'
    try:
        return {'meta': {}, 'state_dict': load_file(path, device=str(device))}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f'checkpoint {path} is damaged or no safetensors file ({one_line(error, 120)})') from None


def read_pickle(path: Path, map_location: Any) -> Any:
    """What a file of ``torch.save`` holds."""
    trusted = str(path.resolve()) in TRUSTED
    try:
        return read_torch_file(path, map_location, METADATA)
    except RefusedError as error:
        if trusted:
            return read_trusted(path, map_location)
        raise CheckpointError(
            f'checkpoint {path} refers to {error.what}, which may run code as it is read: if you trust whoever made '
            'it, say so with --trust-checkpoint, or in Python with repvit_mm.checkpoint.trust(file)'
        ) from None
    except Exception as error:  # a damaged file may raise anything
        if trusted:
            return read_trusted(path, map_location)
        raise CheckpointError(f'checkpoint {path} is damaged or no checkpoint ({one_line(error, 120)})') from None


def read_trusted(path: Path, map_location: Any) -> Any:
    """What a file of ``torch.save`` holds; whatever code is in it runs."""
    try:
        return torch.load(path, map_location=map_location, weights_only=False)  # nosec B614
    except Exception as error:  # its own code may raise anything
        raise CheckpointError(f'checkpoint {path} cannot be read ({one_line(error, 120)})') from None


def tensors_of(checkpoint: Any) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint by name: its own, or those that it keeps under one of ``CONTAINERS``."""
    seen: list[Any] = []
    while isinstance(checkpoint, Mapping) and not any(checkpoint is other for other in seen):
        seen.append(checkpoint)
        inner = [checkpoint[key] for key in CONTAINERS if isinstance(checkpoint.get(key), Mapping)]
        if not inner:
            return {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
        checkpoint = inner[0]
    return {}


def trained_tap(checkpoint: Any) -> str | None:
    """The tap that a detector's or segmentor's checkpoint was trained with, if it tells."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    meta = meta if isinstance(meta, Mapping) else {}
    if isinstance(meta.get('tap'), str):  # a converted file says so
        return meta['tap']
    config = meta.get('cfg')
    if isinstance(config, str) and 'repvit_mm' in config:
        match = re.search(r"\btap='(\w+)'", config)
        return match[1] if match else 'stage_end'
    names = [name.removeprefix('module.') for name in tensors_of(checkpoint)]
    backbone = [name.removeprefix('backbone.') for name in names if name.startswith('backbone.')]
    for naming in NAMINGS:
        if naming.origin_of(backbone) == 'authors':
            is_detector = any(name.startswith('rpn_head.') for name in names)
            return naming.authors_detection_tap if is_detector else 'stage_end'
    return None


def remember_source(checkpoint: Any, path: Path) -> None:
    """Remember for each tensor which file it comes from, for as long as the tensor lives."""
    source = Source(str(path), trained_tap(checkpoint))
    for tensor in tensors_of(checkpoint).values():
        _SOURCES[tensor] = source


def source_of(tensors: Iterable[Tensor]) -> Source:
    """The file that tensors were read from: that of the first tensor for which it is known."""
    return next((_SOURCES[tensor] for tensor in tensors if tensor in _SOURCES), Source())


def cached(address: str, folder: str | None = None) -> Path:
    """Where the file of an address is kept: in torch's cache of checkpoints unless another folder is given."""
    return Path(folder or Path(torch.hub.get_dir(), 'checkpoints'), address.rpartition('/')[2].partition('?')[0])


def download(address: str, folder: str | None = None) -> Path:
    """Fetch a file into the cache, with a progress bar, unless it is there; it appears only when it is whole.

    Raises:
        CheckpointError: if it cannot be fetched.
    """
    path = cached(address, folder)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # seconds; urllib would wait for ever
        try:
            torch.hub.download_url_to_file(address, str(path))
        except (OSError, ValueError) as error:  # urllib's errors among them
            raise CheckpointError(
                f'checkpoint {address} cannot be downloaded ({one_line(error, 120)}) and is not at {path}'
            ) from None
        finally:
            socket.setdefaulttimeout(patience)
    return path


@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_local(filename: str, map_location: Any = None) -> Any:
    """MMEngine's reader of local files, replaced by one that runs nothing."""
    return read_checkpoint(filename, map_location)


@CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), force=True)
def load_from_http(filename: str, map_location: Any = None, model_dir: str | None = None, **_: Any) -> Any:
    """MMEngine's reader of addresses, replaced by one that runs nothing. A job's first process downloads for all."""
    if get_rank() == 0:
        download(filename, model_dir)
    barrier()
    return read_checkpoint(cached(filename, model_dir), map_location)


replace_reader_of_addresses(load_from_http)
