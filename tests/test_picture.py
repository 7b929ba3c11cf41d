"""The picture of a result shows what was predicted, where it is, in colours that can be told apart and read."""

import numpy as np
import pytest
import supervision as sv

from repvit_mm.datasets.shapes import CLASSES, PALETTE, SEG_CLASSES, SEG_PALETTE
from repvit_mm.deploy.picture import Painter, enlargement, legible_on, montage, regions_of
from repvit_mm.deploy.prediction import Detections, LabelMap

GREY = np.full((300, 400, 3), 128, np.uint8)


def one_detection(masks: bool = False, label: int = 1) -> Detections:
    boxes = np.float32([[100, 90, 220, 200]])
    mask = np.zeros((1, *GREY.shape[:2]), bool)
    mask[0, 100:190, 120:200] = True
    return Detections(boxes, np.float32([0.87]), np.array([label]), mask if masks else None)


def bgr(color: tuple[int, int, int]) -> np.ndarray:
    return np.array(color[::-1])


def test_box_is_drawn_in_the_colour_of_its_class():
    picture = Painter(CLASSES, PALETTE)(GREY, one_detection())
    assert picture.shape == (600, 800, 3) and picture.dtype == np.uint8  # small ones are enlarged
    assert np.array_equal(picture[300, 200], bgr(PALETTE[1]))  # the left edge
    assert np.array_equal(picture[400, 300], bgr(PALETTE[1]))  # the lower edge
    assert np.array_equal(picture[300, 300], GREY[0, 0])  # the inside
    assert np.array_equal(picture[550, 700], GREY[0, 0])


def test_mask_shows_the_class_over_the_image():
    picture = Painter(CLASSES, PALETTE)(GREY, one_detection(masks=True))
    blend = (bgr(PALETTE[1]) + GREY[0, 0]) / 2
    assert np.abs(picture[300, 300] - blend).max() <= 1
    assert np.array_equal(picture[300, 220], GREY[0, 0])  # in the box, beside the mask


def test_name_and_score_stand_above_the_box():
    painter = Painter(CLASSES, PALETTE)
    plain = painter(GREY, one_detection())
    label = plain[155:178, 202:280]
    assert (label == bgr(PALETTE[1])).all(2).mean() > 0.4  # its background
    ink = painter.text_colors.by_idx(1)
    assert (np.abs(label - np.array(ink.as_bgr())).max(2) < 60).mean() > 0.05
    other = Painter(['x', 'another'], PALETTE)(GREY, one_detection())
    assert not np.array_equal(other[155:178], plain[155:178])


def test_image_itself_stays_as_it_is():
    image = GREY.copy()
    Painter(CLASSES, PALETTE)(image, one_detection(masks=True))
    Painter(SEG_CLASSES, SEG_PALETTE)(image, LabelMap(np.ones(GREY.shape[:2], np.int32)))
    assert np.array_equal(image, GREY)


def test_nothing_is_drawn_where_nothing_was_found():
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, int))
    large = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    assert np.array_equal(Painter(CLASSES, PALETTE)(large, none), large)
    with_masks = Detections(none.boxes, none.scores, none.labels, np.zeros((0, 900, 1200), bool))
    assert np.array_equal(Painter(CLASSES, PALETTE)(large, with_masks), large)


def test_label_map_lies_over_the_image_with_names():
    labels = np.zeros(GREY.shape[:2], np.int32)
    labels[:, 200:] = 3
    picture = Painter(SEG_CLASSES, SEG_PALETTE)(GREY, LabelMap(labels))
    for column, label in ((100, 0), (700, 3)):
        blend = (bgr(SEG_PALETTE[label]) + GREY[0, 0]) / 2
        assert np.abs(picture[20, column] - blend).max() <= 1
        half = picture[:, :400] if label == 0 else picture[:, 400:]
        assert (half == bgr(SEG_PALETTE[label])).all(2).sum() > 200  # what is not blended is the name's background


def test_names_of_a_label_map_lie_in_their_regions():
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 5, (6, 8)), np.ones((40, 40), int))
    labels[3, 3] = 9  # too small to name
    regions, spots = regions_of(labels)
    assert regions.class_id.tolist() == np.unique(labels).tolist()
    assert 9 not in spots.class_id and set(spots.class_id) == set(np.unique(labels)) - {9}
    for (x, y, _, _), label in zip(spots.xyxy.astype(int), spots.class_id, strict=True):
        assert (labels[y - 8 : y + 8, x - 8 : x + 8] == label).all()


def test_text_is_legible_on_every_colour():
    """WCAG 2 asks for a contrast of 4.5; black or white always gives it."""
    colors = [sv.Color(*map(int, color)) for color in np.random.default_rng(0).integers(0, 256, (500, 3))]

    def luminance(color: sv.Color) -> float:
        parts = np.array(color.as_rgb()) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    for color in [*colors, sv.Color.BLACK, sv.Color.WHITE]:
        high, low = sorted((luminance(color), luminance(legible_on(color))), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize('palette', [(), PALETTE[:2]], ids=['none', 'too short'])
def test_classes_without_colours_get_some(palette):
    picture = Painter(CLASSES, palette)(GREY, one_detection(label=5))
    assert not np.array_equal(picture[300, 200], GREY[0, 0])


def test_class_without_a_name_is_shown_by_its_number():
    assert Painter(CLASSES, PALETTE).name(17) == '17'


@pytest.mark.parametrize(('shape', 'factor'), [((192, 192), 5), ((300, 400), 2), ((800, 600), 1), ((5, 801), 1)])
def test_small_pictures_are_enlarged(shape, factor):
    assert enlargement(shape) == factor


def test_montage_puts_pictures_in_rows_with_white_between_them():
    colors = np.arange(1, 7).reshape(2, 3) * 30
    picture = montage([[np.full((10, 20, 3), color, np.uint8) for color in row] for row in colors], height=30, frame=2)
    assert picture.shape == (2 * 34, 3 * 64, 3)
    assert np.array_equal(picture[17::34, 32::64, 0], colors)
    assert (picture[:, [0, 1, 62, 63, 64, 65, 190, 191]] == 255).all()
    assert (picture[[0, 1, 32, 33, 34, 35, 66, 67]] == 255).all()
