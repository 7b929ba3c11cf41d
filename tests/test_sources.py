"""What inputs name, and how images and videos are read."""

import cv2
import numpy as np
import pytest
from PIL import Image

from repvit_mm.deploy.results import H264Writer
from repvit_mm.deploy.sources import Source, SourceError, UnreadableError, find_sources, open_film, read_image


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with images and other files in it, which is the current one."""
    for name in ('b.jpg', 'a.png', 'deep/er/c.JPEG', 'd[1].png', 'film.mp4', 'notes.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ('inputs', 'expected'),
    [
        (['a.png'], ['a.png']),
        (['notes.txt'], ['notes.txt']),  # whoever names it will hear that it is no image
        (['d[1].png'], ['d[1].png']),
        (['*.png'], ['a.png', 'd[1].png']),
        (['**/*.JPEG'], ['deep/er/c.JPEG']),
        (['.'], ['a.png', 'b.jpg', 'd[1].png', 'deep/er/c.JPEG', 'film.mp4']),
        (['b.jpg', '.'], ['b.jpg', 'a.png', 'd[1].png', 'deep/er/c.JPEG', 'film.mp4']),
    ],
    ids=str,
)
def test_inputs_name_files(folder, inputs, expected):
    assert [source.name for source in find_sources(inputs)] == expected


def test_inputs_name_videos_cameras_and_streams(folder):
    kinds = [source.kind for source in find_sources(['film.mp4', '0', 'rtsp://camera/1', 'a.png'])]
    assert kinds == ['video', 'live', 'live', 'image']


@pytest.mark.parametrize(
    ('name', 'words'),
    [('absent.jpg', 'absent.jpg not found'), ('*.gif', '*.gif not found'), ('empty', 'a folder without')],
)
def test_input_that_names_nothing_is_refused(folder, name, words):
    (folder / 'empty').mkdir()
    with pytest.raises(SourceError) as error:
        find_sources(['a.png', name])
    assert words in str(error.value) and '\n' not in str(error.value)


def test_image_is_read_as_mmcv_reads_it(tmp_path):
    import mmcv

    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6  # on its side
    picture.save(tmp_path / 'turned.jpg', exif=exif)
    picture.convert('L').save(tmp_path / 'grey.png')
    picture.convert('RGBA').save(tmp_path / 'clear é.png')
    for name, shape in (('turned.jpg', (30, 20, 3)), ('grey.png', (20, 30, 3)), ('clear é.png', (20, 30, 3))):
        image = read_image(str(tmp_path / name))
        assert image.shape == shape
        assert np.array_equal(image, mmcv.imread(tmp_path / name))


@pytest.mark.parametrize(('content', 'words'), [(b'', 'is empty'), (b'text', 'is no image'), (None, 'cannot be read')])
def test_unreadable_image_is_named(tmp_path, content, words):
    path = tmp_path / 'image.png'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableError) as error:
        read_image(str(path))
    assert str(path) in str(error.value) and words in str(error.value) and '\n' not in str(error.value)


@pytest.fixture
def film(tmp_path):
    """A video of seven frames, each a little brighter than the one before."""
    path = tmp_path / 'film.mp4'
    with H264Writer(path, 12.5) as video:
        for number in range(7):
            video.write(np.full((48, 65, 3), 30 * number, np.uint8))
    return path


def test_video_is_read_frame_by_frame(film):
    opened = open_film(Source(str(film), 'video'))
    assert opened.rate == 12.5 and opened.length == 7
    brightness = [frame.mean() for frame in opened.frames]
    assert brightness == pytest.approx([30 * number for number in range(7)], abs=4)


@pytest.mark.parametrize('kind', ['video', 'live'])
def test_unreadable_film_is_named(tmp_path, kind):
    path = tmp_path / 'film.mp4'
    path.write_text('no film')
    with pytest.raises(UnreadableError, match=r'film\.mp4 is no'):
        open_film(Source(str(path), kind))


def test_number_opens_a_camera(film, monkeypatch):
    opened = []

    capture = cv2.VideoCapture

    def open_camera(source: int) -> cv2.VideoCapture:
        opened.append(source)
        return capture(str(film))

    monkeypatch.setattr(cv2, 'VideoCapture', open_camera)
    assert len(list(open_film(Source('3', 'live')).frames)) == 7
    assert opened == [3]
