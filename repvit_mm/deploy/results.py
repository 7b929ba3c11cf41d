"""A folder of predictions: pictures, videos, COCO-style JSON or label PNGs, and a gallery that a browser opens."""

import html
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import supervision as sv
from PIL import Image

from ..files import write_whole
from .metadata import Task
from .picture import Painter
from .prediction import Detections, LabelMap, Prediction
from .sources import Source

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; background: #fafafa }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1.5rem; margin: 1.5rem 0 }
figure { margin: 0; padding: .75rem; background: #fff; border: 1px solid #ddd; border-radius: .5rem }
img, video { width: 100%; height: 16rem; object-fit: contain; background: #eee }
figcaption { overflow-wrap: anywhere } small { color: #666 }
.chip { display: inline-block; padding: 0 .5rem; margin: .1rem; border-radius: .25rem; font-size: 85% }
input { font: inherit; padding: .25rem .5rem; width: 20rem; max-width: 100% }
"""

FILTER = """
const shown = (words, text) => words.every(word => text.includes(word));
document.querySelector('input').addEventListener('input', event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  for (const figure of document.querySelectorAll('figure'))
    figure.hidden = !shown(words, figure.textContent.toLowerCase());
});
"""


class ResultFolder:
    """Writes each prediction at once. JSON and the gallery are written on exit, after an error too.

    ``pictures/NAME.png`` and ``pictures/NAME.mp4`` show the predictions. A detector's predictions go into
    ``predictions.json`` in the layout of COCO's annotations, with scores; categories count from 1. A segmentor's go
    into ``labels/NAME.png``, those of videos into ``labels/NAME/000000.png`` and so on: a pixel's value is the index of
    its class, shown in the class's colour; ``predictions.json`` names files and classes. ``index.html`` shows all.

    Args:
        folder: Where to write; made if it is not there. Files of the same names are replaced.
        task: ``'detection'`` or ``'segmentation'``.
        classes: Class names.
        palette: An RGB colour for each class, or empty.
        title: What the gallery is called.

    Raises:
        OSError: if something cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        task: Task,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]] = (),
        title: str = 'Predictions',
    ) -> None:
        self.folder = Path(folder)
        self.task = task
        self.classes = list(classes)
        self.title = title
        self.painter = Painter(classes, palette)
        self.skipped: list[str] = []
        self._names: set[str] = set()
        self._images: list[dict] = []
        self._annotations: list[dict] = []
        self._figures: list[str] = []

    def __enter__(self) -> 'ResultFolder':
        (self.folder / 'pictures').mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._write_json()
        self._write_gallery()

    def add_image(self, source: Source, image: np.ndarray, prediction: Prediction) -> None:
        """Keep the prediction of an image.

        Args:
            source: Where the image is from.
            image: ``(H, W, 3)`` uint8, BGR.
            prediction: What was seen in it.
        """
        name = self._new_name(source)
        self._keep(source, prediction, image.shape, f'{name}.png')
        picture = Path('pictures', f'{name}.png')
        write_whole(self.folder / picture, png(self.painter(image, prediction)))
        self._show(source, picture, self._summary(prediction))

    @contextmanager
    def video(self, source: Source, rate: float) -> Iterator[Callable[[np.ndarray, Prediction], None]]:
        """Keep the predictions of a video's frames: gives the function that takes each frame and its prediction.

        The frames have to be of one size.

        Args:
            source: Where the frames are from.
            rate: Frames a second.
        """
        name = self._new_name(source)
        path = Path('pictures', f'{name}.mp4')
        frames = 0

        with H264Writer(self.folder / path, rate) as video:

            def add_frame(image: np.ndarray, prediction: Prediction) -> None:
                nonlocal frames
                self._keep(source, prediction, image.shape, f'{name}/{frames:06}.png', frames)
                video.write(self.painter(image, prediction))
                frames += 1

            try:
                yield add_frame
            finally:
                if frames:
                    self._show(source, path, f'{frames} frames')

    def skip(self, problem: str) -> None:
        """Mention in the gallery that an input was left out."""
        self.skipped.append(problem)

    def _new_name(self, source: Source) -> str:
        """The stem of a source's name, with a number if another source has it."""
        stem = f'camera{source.name}' if source.name.isdecimal() else Path(source.name).stem or 'stream'
        name, number = stem, 1
        while name in self._names:
            number += 1
            name = f'{stem}-{number}'
        self._names.add(name)
        return name

    def _keep(
        self, source: Source, prediction: Prediction, shape: tuple[int, ...], label_file: str, frame: int | None = None
    ) -> None:
        """Add a prediction to what the JSON file will hold; write its label map."""
        image = {'id': len(self._images) + 1, 'file_name': source.name, 'width': shape[1], 'height': shape[0]}
        if frame is not None:
            image['frame_id'] = frame
        if isinstance(prediction, LabelMap):
            path = Path('labels', label_file)
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / path, label_png(prediction.labels, self.painter.colors))
            image['label_file'] = path.as_posix()
        else:
            for annotation in coco_annotations(prediction):
                number = len(self._annotations) + 1
                self._annotations.append({'id': number, 'image_id': image['id'], **annotation})
        self._images.append(image)

    def _summary(self, prediction: Prediction) -> str:
        """What was seen, in HTML: each class with its number of detections or its part of the image."""
        if isinstance(prediction, LabelMap):
            counts = Counter(dict(zip(*np.unique(prediction.labels, return_counts=True), strict=True)))
            parts = {label: f'{count / prediction.labels.size:.0%}' for label, count in counts.most_common()}
        else:
            parts = {label: str(count) for label, count in Counter(prediction.labels.tolist()).most_common()}
        return ' '.join(self._chip(int(label), part) for label, part in parts.items()) or '<small>nothing</small>'

    def _chip(self, label: int, text: str) -> str:
        color, ink = (palette.by_idx(label).as_hex() for palette in (self.painter.colors, self.painter.text_colors))
        name = html.escape(self.painter.name(label))
        return f'<span class="chip" style="background: {color}; color: {ink}">{name} {text}</span>'

    def _show(self, source: Source, path: Path, summary: str) -> None:
        """Add a figure to the gallery."""
        address = html.escape(path.as_posix().replace('%', '%25').replace('#', '%23').replace('?', '%3F'))
        if path.suffix == '.mp4':
            content = f'<video src="{address}" controls loop muted preload="metadata"></video>'
        else:
            content = f'<a href="{address}"><img src="{address}" loading="lazy" alt=""></a>'
        name = html.escape(source.name)
        self._figures.append(f'<figure>{content}<figcaption>{name}<br>{summary}</figcaption></figure>')

    def _write_json(self) -> None:
        detection = self.task == 'detection'
        categories = [{'id': number, 'name': name} for number, name in enumerate(self.classes, 1 if detection else 0)]
        content = {'images': self._images, 'categories': categories}
        if detection:
            content['annotations'] = self._annotations
        write_whole(self.folder / 'predictions.json', json.dumps(content).encode())

    def _write_gallery(self) -> None:
        skipped = ''.join(f'<li>{html.escape(problem)}</li>' for problem in self.skipped)
        skipped = f'<h2>Skipped</h2><ul>{skipped}</ul>' if skipped else ''
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width"><title>{html.escape(self.title)}</title>'
            f'<style>{STYLE}</style></head><body><h1>{html.escape(self.title)}</h1>'
            '<input type="search" placeholder="Show what contains these words" aria-label="Filter">'
            f'<main>{"".join(self._figures)}</main>{skipped}<script>{FILTER}</script></body></html>'
        )
        write_whole(self.folder / 'index.html', page.encode())


class H264Writer:
    """Writes a video that browsers and phones play; the file appears once it is whole.

    Args:
        path: The file, ``.mp4``.
        rate: Frames a second.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path = path
        self.rate = Fraction(rate).limit_denominator(1001)
        self._part = path.with_name(f'.{path.name}.part')
        self._file: av.container.OutputContainer | None = None

    def __enter__(self) -> 'H264Writer':
        return self

    def write(self, frame: np.ndarray) -> None:
        """Add a frame, ``(H, W, 3)`` uint8, BGR; all are of one size."""
        height, width = (side - side % 2 for side in frame.shape[:2])  # the codec needs even sides
        if self._file is None:
            self._file = av.open(str(self._part), 'w', format='mp4')
            self._stream = self._file.add_stream('libx264', self.rate, width=width, height=height, pix_fmt='yuv420p')
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), 'bgr24')
        self._file.mux(self._stream.encode(frame))

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.mux(self._stream.encode(None))
            self._file.close()
            os.replace(self._part, self.path)


def coco_annotations(found: Detections) -> Iterator[dict]:
    """Detections as COCO writes annotations, with scores; masks as compressed run lengths."""
    for index in range(len(found)):
        x1, y1, x2, y2 = map(float, found.boxes[index])
        annotation = {
            'category_id': int(found.labels[index]) + 1,
            'bbox': [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
            'area': round((x2 - x1) * (y2 - y1), 2),
            'iscrowd': 0,
            'score': round(float(found.scores[index]), 5),
        }
        if found.masks is not None:
            mask = np.asarray(found.masks[index])
            annotation['area'] = int(mask.sum())
            annotation['segmentation'] = {'size': list(mask.shape), 'counts': sv.mask_to_rle(mask, compressed=True)}
        yield annotation


def png(picture: np.ndarray) -> bytes:
    """A picture, BGR, as the content of a PNG file."""
    return cv2.imencode('.png', picture)[1].tobytes()


def label_png(labels: np.ndarray, colors: sv.ColorPalette) -> bytes:
    """A label map as the content of a PNG file: pixels are indices, shown in their colours if there are up to 256."""
    if labels.max(initial=0) < 256:
        image = Image.fromarray(labels.astype(np.uint8), 'P')
        image.putpalette([part for index in range(256) for part in colors.by_idx(index).as_rgb()])
    else:
        image = Image.fromarray(labels.astype(np.uint16))
    content = io.BytesIO()
    image.save(content, 'PNG')
    return content.getvalue()
