"""The picture of a result: what was predicted, drawn over the image by supervision. Needs no torch."""

from collections.abc import Sequence

import cv2
import numpy as np
import supervision as sv

from .prediction import Detections, LabelMap, Prediction

SMALLEST = 800
"""Pictures are enlarged by a whole factor until their longer side has this many pixels: labels need room."""

OPACITY = 0.5
"""Opacity of masks and label maps."""

LABELLED = 0.004
"""The least part of the image that a region must cover to get a label."""


class Painter:
    """Draws predictions in the colours of their classes.

    Args:
        classes: Class names.
        palette: An RGB colour for each class; if there are fewer, supervision's own.
        scores: Whether detections are labelled with their scores.
    """

    def __init__(self, classes: Sequence[str], palette: Sequence[Sequence[int]] = (), scores: bool = True) -> None:
        self.classes = list(classes)
        self.scores = scores
        if len(palette) >= len(classes) > 0:
            self.colors = sv.ColorPalette([sv.Color(*color) for color in palette])
        else:
            self.colors = sv.ColorPalette.DEFAULT
        self.text_colors = sv.ColorPalette([legible_on(color) for color in self.colors.colors])

    def __call__(self, image: np.ndarray, prediction: Prediction) -> np.ndarray:
        """Draw a prediction.

        Args:
            image: ``(H, W, 3)`` uint8, BGR; it stays as it is.
            prediction: What was seen in it.

        Returns:
            The picture, BGR, as large as the image or a multiple of it. Images of one size give pictures of one size.
        """
        if isinstance(prediction, LabelMap):
            regions, spots = regions_of(prediction.labels)
            picture = enlarge(self._masks().annotate(image.copy(), regions))
            names = [self.name(label) for label in spots.class_id]
            return self._label(picture, spots, names, image.shape, sv.Position.CENTER)
        # The best last, so that they are drawn over the others.
        found = to_supervision(prediction)[::-1]
        picture = enlarge(self._masks().annotate(image.copy(), found))
        boxes = sv.BoxAnnotator(self.colors, thickness=max(2, round(min(picture.shape[:2]) / 300)))
        scored = zip(found.class_id, found.confidence, strict=True)
        names = [f'{self.name(label)} {score:.2f}' if self.scores else self.name(label) for label, score in scored]
        picture = boxes.annotate(picture, enlarged(found, image.shape))
        return self._label(picture, found, names, image.shape, sv.Position.TOP_LEFT)

    def name(self, label: int) -> str:
        """A class's name, its number if it has none."""
        return self.classes[label] if label < len(self.classes) else str(label)

    def _masks(self) -> sv.MaskAnnotator:
        return sv.MaskAnnotator(self.colors, opacity=OPACITY)

    def _label(
        self, picture: np.ndarray, found: sv.Detections, names: list[str], shape: tuple, position: sv.Position
    ) -> np.ndarray:
        annotator = sv.RichLabelAnnotator(
            self.colors,
            text_color=self.text_colors,
            font_size=max(12, round(min(picture.shape[:2]) / 36)),
            text_padding=max(3, round(min(picture.shape[:2]) / 160)),
            text_position=position,
            smart_position=True,
        )
        return annotator.annotate(picture, enlarged(found, shape), names)


def montage(rows: Sequence[Sequence[np.ndarray]], height: int = 360, frame: int = 2) -> np.ndarray:
    """Pictures in rows.

    Args:
        rows: Pictures ``(H, W, 3)`` uint8. Those that stand in one column have one aspect ratio.
        height: What each picture is resized to, in pixels.
        frame: Width in pixels of the white frame around each picture.

    Returns:
        ``(H, W, 3)`` uint8.
    """

    def framed(picture: np.ndarray) -> np.ndarray:
        size = round(height * picture.shape[1] / picture.shape[0]), height
        resized = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        return cv2.copyMakeBorder(resized, *[frame] * 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))

    return cv2.vconcat([cv2.hconcat([framed(picture) for picture in row]) for row in rows])


def legible_on(color: sv.Color) -> sv.Color:
    """Black or white, whichever has more contrast to a colour, as WCAG 2 defines contrast."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (color.r / 255, color.g / 255, color.b / 255)
    )
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return sv.Color.BLACK if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else sv.Color.WHITE


def enlargement(shape: tuple[int, ...]) -> int:
    """The factor by which a picture of an image of this shape is larger than the image."""
    return max(1, -(-SMALLEST // max(shape[:2])))


def enlarge(picture: np.ndarray) -> np.ndarray:
    """Enlarge a small picture."""
    factor = enlargement(picture.shape)
    return cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC) if factor > 1 else picture


def enlarged(found: sv.Detections, shape: tuple[int, ...]) -> sv.Detections:
    """Detections in an image of this shape, without masks, in the pixels of its picture."""
    boxes = found.xyxy * enlargement(shape)
    return sv.Detections(boxes, class_id=found.class_id, confidence=found.confidence)


def to_supervision(found: Detections) -> sv.Detections:
    """Detections in supervision's own form."""
    return sv.Detections(
        np.asarray(found.boxes, np.float32).reshape(-1, 4),
        mask=found.masks,
        confidence=np.asarray(found.scores, np.float32),
        class_id=np.asarray(found.labels, int),
    )


def regions_of(labels: np.ndarray) -> tuple[sv.Detections, sv.Detections]:
    """The classes in a label map, and where their names go.

    Args:
        labels: ``(H, W)`` int; what is negative belongs to no class.

    Returns:
        The mask of each class that is present; and a point for each class whose largest region is large enough, as a
        box without size. It is the point of that region that is farthest from its border.
    """
    present = np.unique(labels[labels >= 0])
    masks = labels == present[:, None, None]
    spots, named = [], []
    for label, mask in zip(present, masks, strict=True):
        _, parts, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
        largest = 1 + int(np.argmax(statistics[1:, cv2.CC_STAT_AREA]))
        if statistics[largest, cv2.CC_STAT_AREA] < LABELLED * mask.size:
            continue
        # A frame of zeros: the image's border is one too.
        region = np.pad((parts == largest).astype(np.uint8), 1)
        y, x = np.unravel_index(np.argmax(cv2.distanceTransform(region, cv2.DIST_L2, 3)), region.shape)
        spots.append((x - 1, y - 1, x - 1, y - 1))
        named.append(label)
    regions = sv.Detections(sv.mask_to_xyxy(masks).astype(np.float32), mask=masks, class_id=present.astype(int))
    return regions, sv.Detections(np.array(spots, np.float32).reshape(-1, 4), class_id=np.array(named, int))
