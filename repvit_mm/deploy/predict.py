"""Predicts on images and videos, with an exported file or any other :class:`Predictor`. Needs no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import supervision as sv

from .metadata import Task
from .picture import to_supervision
from .prediction import Detections, LabelMap, Prediction, fit_image, predict
from .results import ResultFolder
from .runtimes import RuntimeFileError, open_file
from .sources import Source, UnreadableError, open_film, read_image


class Predictor(Protocol):
    """Predicts on an image.

    Attributes:
        task: ``'detection'`` or ``'segmentation'``.
        classes: Class names.
        palette: An RGB colour for each class, or empty.
        score_threshold: Detections below it should not be drawn.
    """

    task: Task
    classes: Sequence[str]
    palette: Sequence[Sequence[int]]
    score_threshold: float

    def __call__(self, image: np.ndarray) -> Prediction:
        """What is seen in an image ``(H, W, 3)``, uint8, BGR, in its own pixels."""


class FilePredictor:
    """Predicts with an exported file.

    Args:
        path: The file.
        threads: How many threads it computes in; ``None`` leaves that to the library.

    Raises:
        RuntimeFileError: if the file cannot be opened, or holds only a backbone.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        self.runtime = open_file(path, threads)
        info = self.runtime.info
        if info.task == 'backbone':
            raise RuntimeFileError(f'{path} is a backbone, which predicts nothing: export with --what model')
        self.task, self.classes, self.palette = info.task, info.classes, info.palette
        self.score_threshold = info.score_threshold

    def __call__(self, image: np.ndarray) -> Prediction:
        return predict(self.runtime, fit_image(image, self.runtime.info))


class SlicedPredictor:
    """Predicts on overlapping slices of an image and on the whole of it, for large images with small objects.

    If two detections of one class share more than half of the smaller one, the one with the higher score stays. (SAHI
    merges them by default, which joins loose boxes to tight ones: on mosaics of the shapes that gave a box AP of 25
    instead of 40.) A label map takes each pixel from the slice in which it is farthest from the border.

    Args:
        predictor: What predicts on a slice.
        size: Height and width of a slice in pixels.
        overlap: What part of a slice each neighbour shares.
    """

    def __init__(self, predictor: Predictor, size: int = 640, overlap: float = 0.2) -> None:
        self.predictor = predictor
        self.size = size
        self.shared = round(size * overlap)
        self.task, self.classes, self.palette = predictor.task, predictor.classes, predictor.palette
        self.score_threshold = predictor.score_threshold

    def __call__(self, image: np.ndarray) -> Prediction:
        if max(image.shape[:2]) <= self.size:
            return self.predictor(image)
        return self._label_map(image) if self.task == 'segmentation' else self._detections(image)

    def _detections(self, image: np.ndarray) -> Detections:
        slicer = sv.InferenceSlicer(
            lambda part: to_supervision(self.predictor(np.ascontiguousarray(part))),
            slice_wh=self.size,
            overlap_wh=self.shared,
            overlap_filter=sv.OverlapFilter.NONE,
            compact_masks=True,
        )
        found = sv.Detections.merge([slicer(image), to_supervision(self.predictor(image))])
        found = found.with_nms(threshold=0.5, overlap_metric=sv.OverlapMetric.IOS)
        found = found[np.argsort(-found.confidence, kind='stable')]
        return Detections(found.xyxy.astype(np.float32), found.confidence, found.class_id, found.mask)

    def _label_map(self, image: np.ndarray) -> LabelMap:
        labels = np.zeros(image.shape[:2], np.int32)
        rows, columns = (slices(side, self.size, self.shared) for side in image.shape[:2])
        for top, bottom, first_row, last_row in rows:
            for left, right, first_column, last_column in columns:
                part = self.predictor(np.ascontiguousarray(image[top:bottom, left:right])).labels
                labels[first_row:last_row, first_column:last_column] = part[
                    first_row - top : last_row - top, first_column - left : last_column - left
                ]
        return LabelMap(labels)


def slices(length: int, size: int, shared: int) -> list[tuple[int, int, int, int]]:
    """Cut a side of an image into overlapping slices.

    Returns:
        For each slice its start and end, and start and end of the part that is used: up to the middle of each overlap.
    """
    starts = [*range(0, max(length - size, 0), size - shared), max(length - size, 0)]
    ends = [min(start + size, length) for start in starts]
    cuts = [0, *((start + end) // 2 for start, end in zip(starts[1:], ends[:-1], strict=True)), length]
    return list(zip(starts, ends, cuts[:-1], cuts[1:], strict=True))


@dataclass(frozen=True)
class Step:
    """One image or one frame that is done, or an input that was left out.

    Args:
        source: Where it is from.
        frame: Number of the frame in a video, from 0.
        frames: How many frames the source has, as far as known.
        problem: Why the source cannot be read, or ``None``.
    """

    source: Source
    frame: int = 0
    frames: int | None = 1
    problem: str | None = None


def predict_all(
    predictor: Predictor,
    sources: Sequence[Source],
    results: ResultFolder,
    score_threshold: float | None = None,
    max_frames: int | None = None,
) -> Iterator[Step]:
    """Predict on everything, one step at a time.

    Args:
        predictor: What predicts.
        sources: What to predict on.
        results: Where predictions are kept, inside its ``with`` block.
        score_threshold: Detections below it are left out; ``None`` for the predictor's own.
        max_frames: How many frames of a video or a camera are taken at most.

    Yields:
        A step for each image and each frame. A source that cannot be read gives one that says why.
    """

    threshold = predictor.score_threshold if score_threshold is None else score_threshold

    def see(image: np.ndarray) -> Prediction:
        prediction = predictor(image)
        return prediction.above(threshold) if isinstance(prediction, Detections) else prediction

    for source in sources:
        try:
            if source.kind == 'image':
                image = read_image(source.name)
                results.add_image(source, image, see(image))
                yield Step(source)
            else:
                film = open_film(source)
                with results.video(source, film.rate) as add_frame:
                    for number, image in enumerate(islice(film.frames, max_frames)):
                        add_frame(image, see(image))
                        yield Step(source, number, film.length)
        except UnreadableError as error:
            # What prepares an image does not know its name.
            problem = str(error) if source.name in str(error) else f'{source.name} {error}'
            results.skip(problem)
            yield Step(source, problem=problem)
