"""Inputs to predict on: images, folders, patterns, videos, cameras and streams. Needs numpy and OpenCV only."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm')
"""Suffixes of files in a folder that count as images."""

VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv')
"""Suffixes of files that count as videos."""

LIVE_RATE = 25.0
"""Frames a second of a camera or a stream that does not report its rate."""


class SourceError(ValueError):
    """An input names nothing; the message is one line that says why."""


class UnreadableError(RuntimeError):
    """A file or a camera cannot be read; the message is one line that names it."""


@dataclass(frozen=True)
class Source:
    """One input.

    Args:
        name: A path, a camera's number or an address.
        kind: ``'live'`` is a camera or a stream, which does not end by itself.
    """

    name: str
    kind: Literal['image', 'video', 'live'] = 'image'


@dataclass(frozen=True)
class Film:
    """An open video, camera or stream.

    Args:
        frames: Its frames, ``(H, W, 3)`` uint8, BGR.
        rate: Frames a second.
        length: Number of frames according to the file's header; ``None`` if it is not there.
    """

    frames: Iterator[np.ndarray]
    rate: float
    length: int | None


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """What the inputs on a command line name, each once, in their order.

    Args:
        inputs: Each the path of an image or a video, a folder (searched through with its subfolders), a pattern such as
            ``'*.jpg'`` or ``'**/*.png'``, the number of a camera, or the address of a stream.

    Raises:
        SourceError: if one of them names nothing.
    """
    return list(dict.fromkeys(source for name in inputs for source in sources_of(name)))


def sources_of(name: str) -> list[Source]:
    """What one input names."""
    path = Path(name).expanduser()
    if path.is_dir():
        found = [of_file(file) for file in sorted(path.rglob('*')) if file.suffix.lower() in (*IMAGES, *VIDEOS)]
        if not found:
            raise SourceError(f'{name} is a folder without images and videos: expected {", ".join((*IMAGES, *VIDEOS))}')
        return found
    if path.exists():  # before the patterns: a file may be called a[1].jpg
        return [of_file(path)]
    if name.isdecimal() or '://' in name:
        return [Source(name, 'live')]
    found = [of_file(Path(file)) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]
    if not found:
        raise SourceError(
            f'{name} not found: expected an image, a video, a folder, a pattern or the number of a camera'
        )
    return found


def of_file(path: Path) -> Source:
    """A file as an input."""
    return Source(str(path), 'video' if path.suffix.lower() in VIDEOS else 'image')


def read_image(path: str) -> np.ndarray:
    """An image file as ``(H, W, 3)`` uint8, BGR, turned upright as its EXIF entry says, as mmcv reads it.

    Raises:
        UnreadableError: if it is no image, or cannot be read.
    """
    try:
        content = np.fromfile(path, np.uint8)  # OpenCV itself cannot open every name on every system
        image = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
    except (OSError, cv2.error) as error:
        raise UnreadableError(f'{path} cannot be read: {" ".join(str(error).split())}') from None
    if image is None:
        raise UnreadableError(f'{path} is {"no image or a damaged one" if content.size else "empty"}')
    return image


def open_film(source: Source) -> Film:
    """Open a video, a camera or a stream.

    Raises:
        UnreadableError: if it cannot be opened, or has no frame.
    """
    capture = cv2.VideoCapture(int(source.name) if source.name.isdecimal() else source.name)
    seen, first = capture.read() if capture.isOpened() else (False, None)
    if not seen:
        capture.release()
        what = {'video': 'is no video or a damaged one', 'live': 'is no camera or stream that can be opened'}
        raise UnreadableError(f'{source.name} {what[source.kind]}')
    rate, length = capture.get(cv2.CAP_PROP_FPS), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    return Film(read_frames(capture, first), rate if 0 < rate <= 1000 else LIVE_RATE, length if length > 0 else None)


def read_frames(capture: cv2.VideoCapture, first: np.ndarray) -> Iterator[np.ndarray]:
    """The frames of an open capture, which is closed after the last one."""
    frame = first
    try:
        while frame is not None:
            yield frame
            seen, frame = capture.read()
            frame = frame if seen else None
    finally:
        capture.release()
