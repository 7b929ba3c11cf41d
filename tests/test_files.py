"""Files that are there whole or not at all."""

import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from repvit_mm.files import CLAIMED, UNFINISHED, claim, release, write_whole


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


@pytest.fixture
def claiming(tmp_path) -> Iterator[tuple[int, int]]:
    """Ids of a process that claims the folder, and of one that it has forked, such as a data loader's worker."""
    read, write = os.pipe()
    owner = os.fork()
    if not owner:
        claim(tmp_path)
        if worker := os.fork():
            os.write(write, f'{worker}\n'.encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(read, 20))
    yield owner, worker
    for process in (owner, worker):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def test_folder_is_claimed_by_one_process(tmp_path, claiming):
    """By whatever path; the claim ends with the process, though a forked one may live on for a while."""
    (tmp_path / 'link').symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / 'link'):
        with pytest.raises(BlockingIOError):
            claim(folder)
    owner, worker = claiming
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    os.kill(worker, 0)  # it lives
    claim(tmp_path)
    release(tmp_path)


def test_process_may_claim_again_what_it_claims(tmp_path):
    """A notebook, in which a run has failed before."""
    before = dict(CLAIMED)
    claim(tmp_path)
    claim(tmp_path)
    release(tmp_path)
    release(tmp_path)
    assert before == CLAIMED and not [*tmp_path.iterdir()]
