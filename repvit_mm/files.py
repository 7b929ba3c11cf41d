"""Files that are there whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path

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
