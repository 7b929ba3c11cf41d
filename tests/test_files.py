"""Files that are there whole or not at all."""

import errno
import os
import signal
import time

import pytest

from repvit_mm.files import UNFINISHED, Claim, write_whole


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


def test_folder_is_claimed_once(tmp_path):
    claim = Claim(tmp_path)
    with pytest.raises(BlockingIOError):
        Claim(tmp_path)
    claim.close()
    Claim(tmp_path).close()
    assert not [*tmp_path.iterdir()]


def test_claim_does_not_outlive_its_process(tmp_path):
    """A forked process, such as a data loader's worker, may live on for a while."""
    read, write = os.pipe()
    claiming = os.fork()
    if not claiming:
        Claim(tmp_path)
        worker = os.fork()
        if worker:
            os.write(write, f'{worker}\n'.encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(read, 20))
    with pytest.raises(BlockingIOError):
        Claim(tmp_path)
    os.kill(claiming, signal.SIGKILL)
    os.waitpid(claiming, 0)
    os.kill(worker, 0)  # it lives
    Claim(tmp_path).close()
    os.kill(worker, signal.SIGKILL)
