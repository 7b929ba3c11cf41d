"""Damaged checkpoints: each is read rightly or refused in one line, whatever is wrong with it."""

import argparse
import datetime
import io
import random
import resource
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from repvit_mm.checkpoint import CheckpointError, read_checkpoint


def checkpoint() -> dict:
    """A small one with everything that is allowed in it."""
    return {
        'state_dict': {'a.weight': torch.arange(12.0).view(3, 4), 'a.num_batches_tracked': torch.tensor(3)},
        'meta': {'epoch': 1, 'cfg': ConfigDict(type='RepViT'), 'path': Path('a/b'), 'args': argparse.Namespace(lr=0.1)},
        'message_hub': {'loss': HistoryBuffer([1.0, 2.0], [1, 1]), 'none': HistoryBuffer(), 'lr': np.float64(0.5)},
        'extra': [defaultdict(list, a=[1]), datetime.datetime(2024, 1, 2), np.array(['x', 'yz']), b'', (1, 2.5, None)],
    }


def content(form: str) -> bytes:
    """The bytes of a whole file."""
    if form == 'safetensors':
        return safetensors.torch.save(checkpoint()['state_dict'], {'format': 'pt'})
    file = io.BytesIO()
    torch.save(checkpoint(), file, _use_new_zipfile_serialization=form == 'zip')
    return file.getvalue()


def mutate(whole: bytes, generator: random.Random) -> bytes:
    """Damage of one kind or several: bits, bytes, pieces cut out, doubled, moved or filled, and ends cut off."""
    data = bytearray(whole)
    for _ in range(generator.choice((1, 1, 2, 5))):
        start = generator.randrange(len(data))
        stop = min(len(data), start + generator.choice((1, 2, 8, 64)))
        kind = generator.randrange(7)
        if kind == 0:
            data[start] ^= 1 << generator.randrange(8)
        elif kind == 1:
            data[start:stop] = generator.randbytes(stop - start)
        elif kind == 2 and len(data) > 2 * (stop - start):
            del data[start:stop]
        elif kind == 3:
            data[start:start] = data[start:stop]
        elif kind == 4:
            data[start:stop] = bytes([generator.choice((0, 255))]) * (stop - start)
        elif kind == 5:
            other = generator.randrange(len(data))
            data[start:stop] = data[other : other + stop - start] or b'\0'
        elif start > 8:
            del data[start:]
    return bytes(data)


@pytest.mark.parametrize('form', ['zip', 'legacy', 'safetensors'])
@pytest.mark.parametrize('count', [100, pytest.param(2000, marks=pytest.mark.torture)])
def test_damaged_file_is_read_or_refused_in_one_line(tmp_path, tried, torture_seed, form, count):
    path = tmp_path / ('a.safetensors' if form == 'safetensors' else 'a.pth')
    whole = content(form)
    path.write_bytes(whole)
    expected = read_checkpoint(path)
    assert expected
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    generator = random.Random(f'{form} {count} {torture_seed}')
    read = 0
    for number in range(count):
        tried()
        damaged = mutate(whole, generator)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
            read += 1
        except CheckpointError as error:
            message = str(error)
            assert str(path) in message and '\n' not in message and len(message) < 1000, (number, message)
        assert [child.name for child in tmp_path.iterdir()] == [path.name]
    assert read < count, 'some damage is noticed'
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200, f'{grown:.0f} MiB for files of {len(whole)} bytes'
