"""Files that are there whole or not at all."""

import errno
import os

import pytest

from repvit_mm.files import UNFINISHED, write_whole


def test_file_and_folders_are_made(tmp_path):
    write_whole(tmp_path / 'a/b/file', b'content')
    assert (tmp_path / 'a/b/file').read_bytes() == b'content'
    assert [path.name for path in (tmp_path / 'a/b').iterdir()] == ['file']


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
@pytest.mark.parametrize('before', [None, b'precious'])
def test_what_was_there_stays_if_writing_fails(tmp_path, monkeypatch, error, before):
    path = tmp_path / 'file'
    if before:
        path.write_bytes(before)

    def fail(file: int) -> None:
        assert (tmp_path / f'file{UNFINISHED}').exists()
        raise error

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(error):
        write_whole(path, b'content')
    assert {found.name: found.read_bytes() for found in tmp_path.iterdir()} == ({'file': before} if before else {})


def test_full_disk_is_told_with_the_name_of_the_file(tmp_path, monkeypatch):
    def fail(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/file'"):
        write_whole(tmp_path / 'file', b'content')
