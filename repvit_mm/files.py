"""Files that are there whole or not at all, and folders that one process writes into."""

import os
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

UNFINISHED = '.repvit_mm-unfinished'
"""What the name of a file ends with while it is written. Only a killed process leaves one."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file and the folders above it: beside its place, flushed to the disk, then renamed.

    Raises:
        OSError: if it cannot be written; it names the file. What was at its place stays.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open('wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:  # an interrupt too
        with suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError) and error.filename is None:  # a full disk's names nothing
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


CLAIMED: dict[tuple[int, int], int] = {}
"""The folders that this process claims, each by its device and number -> the open file that holds the claim."""


def claim(folder: Path) -> None:
    """Claim a folder for this process alone, until it releases it or ends, however it ends.

    The claim is a lock of the operating system: it leaves no file. Where the file system knows no locks, nothing is
    claimed. A process that is forked has no part in it: a claim does not outlive the process that made it.

    Raises:
        BlockingIOError: if another process claims the folder.
    """
    if fcntl is None:
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        if isinstance(error, BlockingIOError) and identity(folder) not in CLAIMED:
            raise
    else:
        CLAIMED[identity(folder)] = file


def release(folder: Path) -> None:
    """Release a folder that may be claimed."""
    with suppress(FileNotFoundError):
        if (file := CLAIMED.pop(identity(folder), None)) is not None:
            os.close(file)


def identity(folder: Path) -> tuple[int, int]:
    """What a folder is known by, whatever path leads to it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def forget_claims() -> None:
    """Close a forked process's copies of what its parent claims."""
    while CLAIMED:
        os.close(CLAIMED.popitem()[1])


if fcntl is not None:
    os.register_at_fork(after_in_child=forget_claims)
