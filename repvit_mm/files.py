"""Files that are there whole or not at all."""

import os
from pathlib import Path

UNFINISHED = '.repvit_mm-unfinished'
"""What the name of a file ends with while it is written. Only a killed process leaves one."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file and the folders above it: beside its place, flushed to the disk, then renamed.

    Raises:
        OSError: if it cannot be written. What was at its place stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with unfinished.open('wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:  # an interrupt too
        unfinished.unlink(missing_ok=True)
        raise
