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


class Claim:
    """A folder that this process alone writes into, until it ends or lets go, however it ends.

    The claim is a lock of the operating system: it leaves no file. Where the file system knows no locks, nothing is
    claimed. A process that is forked has no part in it, so that the claim does not outlive the one that made it.

    Args:
        folder: The folder, which has to exist.

    Raises:
        BlockingIOError: if another process claims the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.file: int | None = None
        if fcntl is None:
            return
        self.file = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise
        except OSError:
            self.close()
        os.register_at_fork(after_in_child=self.close)

    def close(self) -> None:
        """Let go of this process's part."""
        if self.file is not None:
            os.close(self.file)
            self.file = None
