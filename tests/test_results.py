"""The folder of results: what others can read in it, and that nothing in it is half-written."""

import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.mask import decode

from repvit_mm.deploy.prediction import Detections, LabelMap
from repvit_mm.deploy.results import H264Writer, ResultFolder
from repvit_mm.deploy.sources import Source

CLASSES, PALETTE = ('cat', 'dog <b>'), ((250, 10, 10), (10, 10, 250))


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (60, 81, 3), dtype=np.uint8)


def two_detections(seed: int = 0, masks: bool = True) -> Detections:
    drawn = np.random.default_rng(seed).random((2, 60, 81)) > 0.5
    boxes = np.float32([[1.25, 2, 30, 40], [10, 10, 80, 59.5]])
    return Detections(boxes, np.float32([0.9, 0.4]), np.array([1, 0]), drawn if masks else None)


class Gallery(HTMLParser):
    """What a page shows and links to, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ''
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.addresses += [unquote(value) for name, value in attributes if name in ('src', 'href')]

    def handle_data(self, data):
        self.text += data


def test_json_is_what_coco_reads(tmp_path):
    sources = [Source('photos/a.jpg'), Source('photos/b.jpg')]
    with ResultFolder(tmp_path, 'detection', CLASSES, PALETTE) as results:
        for seed, source in enumerate(sources):
            results.add_image(source, image(seed), two_detections(seed))
    coco = COCO(tmp_path / 'predictions.json')
    assert [coco.imgs[i]['file_name'] for i in sorted(coco.imgs)] == ['photos/a.jpg', 'photos/b.jpg']
    assert {category['name']: category['id'] for category in coco.cats.values()} == {'cat': 1, 'dog <b>': 2}
    for number, seed in ((1, 0), (2, 1)):
        annotations = coco.loadAnns(coco.getAnnIds(number))
        found = two_detections(seed)
        assert [a['category_id'] for a in annotations] == [2, 1]
        assert [a['score'] for a in annotations] == pytest.approx([0.9, 0.4], abs=1e-5)
        assert annotations[0]['bbox'] == pytest.approx([1.25, 2, 28.75, 38])
        for annotation, mask in zip(annotations, found.masks, strict=True):
            assert np.array_equal(decode(annotation['segmentation']), mask)
            assert annotation['area'] == mask.sum()


def test_boxes_have_their_own_area_where_there_are_no_masks(tmp_path):
    with ResultFolder(tmp_path, 'detection', CLASSES) as results:
        results.add_image(Source('a.jpg'), image(), two_detections(masks=False))
    first, second = json.loads((tmp_path / 'predictions.json').read_text())['annotations']
    assert first['area'] == pytest.approx(28.75 * 38) and 'segmentation' not in first
    assert second['area'] == pytest.approx(70 * 49.5)


def test_json_of_no_detection_says_so(tmp_path):
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, int))
    with ResultFolder(tmp_path, 'detection', CLASSES) as results:
        results.add_image(Source('a.jpg'), image(), nothing)
    content = json.loads((tmp_path / 'predictions.json').read_text())
    assert len(content['images']) == 1 and content['annotations'] == []


@pytest.mark.parametrize(('highest', 'mode'), [(1, 'P'), (255, 'P'), (700, 'I;16')])
def test_label_png_holds_the_indices(tmp_path, highest, mode):
    labels = np.random.default_rng(0).integers(0, highest + 1, (60, 81))
    labels[0, 0] = highest
    with ResultFolder(tmp_path, 'segmentation', CLASSES, PALETTE) as results:
        results.add_image(Source('a.jpg'), image(), LabelMap(labels))
    content = json.loads((tmp_path / 'predictions.json').read_text())
    assert content['categories'] == [{'id': 0, 'name': 'cat'}, {'id': 1, 'name': 'dog <b>'}]
    with Image.open(tmp_path / content['images'][0]['label_file']) as png:
        assert png.mode == mode and np.array_equal(np.array(png), labels)
        if highest == 1:
            assert np.array_equal(np.array(png.convert('RGB'))[labels == 1][0], PALETTE[1])


def test_gallery_shows_every_picture_from_the_disk(tmp_path):
    names = ['one/a.jpg', 'two/a.jpg', 'b #1 50%?.png', 'c <script>.png']
    with ResultFolder(tmp_path, 'detection', CLASSES, PALETTE, title='A & B') as results:
        for name in names:
            results.add_image(Source(name), image(), two_detections())
        results.skip('d.jpg is <empty>')
    gallery = Gallery(tmp_path / 'index.html')
    assert all((tmp_path / address).is_file() for address in gallery.addresses)
    assert {Path(address).name for address in gallery.addresses} == {
        path.name for path in (tmp_path / 'pictures').iterdir()
    }
    assert len(list((tmp_path / 'pictures').iterdir())) == len(names)
    for text in (*names, 'A & B', 'cat 1', 'dog <b> 1', 'd.jpg is <empty>'):
        assert text in gallery.text


def test_pictures_are_of_their_images(tmp_path):
    with ResultFolder(tmp_path, 'detection', CLASSES, PALETTE) as results:
        results.add_image(Source('a.jpg'), image(), two_detections())
        expected = results.painter(image(), two_detections())
    assert np.array_equal(np.array(Image.open(tmp_path / 'pictures/a.png'))[..., ::-1], expected)


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_video_is_kept_frame_by_frame(tmp_path, task):
    with (
        ResultFolder(tmp_path, task, CLASSES, PALETTE) as results,
        results.video(Source('clips/film.avi', 'video'), 10.0) as add_frame,
    ):
        for seed in range(4):
            add_frame(image(), two_detections(seed) if task == 'detection' else LabelMap(np.full((60, 81), seed % 2)))
    with av.open(str(tmp_path / 'pictures/film.mp4')) as film:
        stream = film.streams.video[0]
        assert stream.codec_context.name == 'h264' and stream.average_rate == 10
        assert len(list(film.decode(stream))) == 4
    content = json.loads((tmp_path / 'predictions.json').read_text())
    assert [(entry['file_name'], entry['frame_id']) for entry in content['images']] == [
        ('clips/film.avi', number) for number in range(4)
    ]
    if task == 'detection':
        assert len(content['annotations']) == 8
    else:
        maps = [np.array(Image.open(tmp_path / entry['label_file'])) for entry in content['images']]
        assert [labels.max() for labels in maps] == [0, 1, 0, 1]
    assert Gallery(tmp_path / 'index.html').addresses == ['pictures/film.mp4']


def test_what_was_predicted_is_kept_when_something_fails(tmp_path):
    with pytest.raises(RuntimeError), ResultFolder(tmp_path, 'detection', CLASSES) as results:
        results.add_image(Source('a.jpg'), image(), two_detections())
        with results.video(Source('film.mp4', 'video'), 10.0) as add_frame:
            add_frame(image(), two_detections())
            raise RuntimeError
    assert len(json.loads((tmp_path / 'predictions.json').read_text())['images']) == 2
    with av.open(str(tmp_path / 'pictures/film.mp4')) as film:
        assert len(list(film.decode(video=0))) == 1
    assert 'pictures/film.mp4' in Gallery(tmp_path / 'index.html').addresses


def test_no_video_is_left_of_no_frame(tmp_path):
    with pytest.raises(RuntimeError), H264Writer(tmp_path / 'film.mp4', 25):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
