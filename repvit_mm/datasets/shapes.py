"""The demo data set "shapes": textured shapes on textured backgrounds, drawn from a seed.

The same pictures are written in COCO's instance layout and in ADE20K's segmentation layout. Texture, size and rotation
are drawn independently of the class. Colour is not: each class keeps near its own in `PALETTE`, and the backgrounds are
dull, so that a network learns from scratch in minutes. A good score shows that training works, not that a network tells
outlines apart.
"""

import io
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

VERSION = 1  # raise it when a change below changes the files
MANIFEST = 'shapes.json'
SPLITS = {'train': 'training', 'val': 'validation'}  # COCO's word: ADE20K's word
SIZE_RANGE = (64, 2048)  # pixels, width and height of an image

MAX_SHAPES = 6  # in one image
MIN_DIAMETER = 16  # pixels
MAX_DIAMETER = 0.58  # of the image's size
MIN_VISIBLE = 0.5  # part of each shape that neither later shapes nor the border may hide
ATTEMPTS = 40  # at placing shapes in one image

TEXTURES = ('noise', 'stripes', 'checks', 'gradient', 'blobs')


def _polygon(x: np.ndarray, y: np.ndarray, tips: int, tip: float, notch: float) -> np.ndarray:
    """Signed distance to a star with `tips` corners at radius `tip` and as many between them at radius `notch`.

    With `notch = tip * cos(pi / tips)` the star is the regular polygon.
    """
    sector = math.pi / tips
    # By symmetry every half sector is folded onto the one with a tip at angle 0 and a notch at angle `sector`.
    angle = np.abs((np.arctan2(y, x) + sector) % (2 * sector) - sector)
    radius = np.hypot(x, y)
    normal = np.array([notch * math.sin(sector), tip - notch * math.cos(sector)])
    normal /= np.linalg.norm(normal)
    return normal[0] * (radius * np.cos(angle) - tip) + normal[1] * radius * np.sin(angle)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1.1, np.minimum(x, y) - 0.32)


# Signed distance from (x, y) to each class's outline, negative inside. The shapes are centred at the origin and look
# about as large as the unit circle; none reaches further than REACH.
OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    'circle': lambda x, y: np.hypot(x, y) - 1,
    'square': lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.9,
    'triangle': lambda x, y: _polygon(x, y, tips=3, tip=1.3, notch=0.65),
    'star': lambda x, y: _polygon(x, y, tips=5, tip=1.25, notch=0.53),
    'ring': lambda x, y: np.abs(np.hypot(x, y) - 0.8) - 0.22,
    'cross': _cross,
}
REACH = 1.3

# The names and colours for the configs: `CLASSES` for detection, `SEG_CLASSES` for segmentation. The palettes are lists
# because mmdet takes a tuple for one single colour.
CLASSES = tuple(OUTLINES)
PALETTE = [(230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180)]
SEG_CLASSES = ('background', *CLASSES)
SEG_PALETTE = [(96, 96, 96), *PALETTE]


@dataclass(frozen=True)
class Instance:
    """One shape: `label` is an index into `CLASSES`, `mask` (H, W) bool its visible part."""

    label: int
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """One picture: `image` (H, W, 3) uint8 RGB, `labels` (H, W) uint8 indices into `SEG_CLASSES`, and its shapes."""

    image: np.ndarray
    labels: np.ndarray
    instances: list[Instance]


def _texture(rng: np.random.Generator, color: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Return a random texture around `color` at the pixels `rows` x `cols`, (H, W, 3) float."""
    angle, frequency = rng.uniform(0, np.pi), 2 * np.pi / rng.uniform(6, 24)
    u = frequency * (np.cos(angle) * cols + np.sin(angle) * rows[:, None])
    v = frequency * (np.cos(angle) * rows[:, None] - np.sin(angle) * cols)
    match rng.choice(TEXTURES):
        case 'noise':
            field = rng.uniform(-1, 1, u.shape)
        case 'stripes':
            field = np.sin(u)
        case 'checks':
            field = np.sign(np.sin(u) * np.sin(v))
        case 'gradient':
            field = 2 * (u - u.min()) / np.ptp(u) - 1
        case 'blobs':
            field = np.sin(u + 2 * np.sin(v / 2)) * np.sin(v + 2 * np.sin(u / 3))
    return color + field[..., None] * rng.uniform(-40, 40, 3)


def _background_color(rng: np.random.Generator) -> np.ndarray:
    """Return a dull colour, light or dark."""
    return rng.uniform(50, 205) + rng.uniform(-20, 20, 3)


def _shape_color(rng: np.random.Generator, label: int) -> np.ndarray:
    """Return a vivid colour near the class's own in `PALETTE`, lighter or darker."""
    return np.array(PALETTE[label]) * rng.uniform(0.7, 1) + rng.normal(0, 20, 3)


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """Draw one picture of `size` x `size` pixels with 1 to `MAX_SHAPES` shapes.

    Shapes are placed one over the other. One that would leave less than `MIN_VISIBLE` of itself or of another in view
    is not placed, so every shape in the picture is one to be found.
    """
    pixels = np.arange(size)
    image = _texture(rng, _background_color(rng), pixels, pixels)
    owner = np.zeros((size, size), np.uint8)  # 0 where the background is seen, k where the k-th shape is
    labels: list[int] = []
    areas: list[int] = []
    wanted = rng.integers(1, MAX_SHAPES, endpoint=True)
    for _ in range(ATTEMPTS):
        if len(labels) == wanted:
            break
        label = int(rng.integers(len(CLASSES)))
        radius = np.exp(rng.uniform(np.log(MIN_DIAMETER), np.log(MAX_DIAMETER * size))) / 2
        angle = rng.uniform(0, 2 * np.pi)
        reach = math.ceil(REACH * radius) + 1
        grid = np.arange(-reach, reach + 1)
        x = (np.cos(angle) * grid + np.sin(angle) * grid[:, None]) / radius
        y = (np.cos(angle) * grid[:, None] - np.sin(angle) * grid) / radius
        distance = radius * OUTLINES[CLASSES[label]](x, y)  # in pixels

        rows, cols = grid + rng.integers(size), grid + rng.integers(size)
        in_rows, in_cols = (rows >= 0) & (rows < size), (cols >= 0) & (cols < size)
        area = np.count_nonzero(distance < 0)
        distance = distance[np.ix_(in_rows, in_cols)]
        rows, cols = rows[in_rows], cols[in_cols]
        window = np.ix_(rows, cols)
        covered = owner.copy()
        covered[window] = np.where(distance < 0, len(labels) + 1, owner[window])
        visible = np.bincount(covered.ravel(), minlength=len(labels) + 2)[1:]
        if np.any(visible < MIN_VISIBLE * np.array([*areas, area])):
            continue

        owner = covered
        labels.append(label)
        areas.append(area)
        color = _shape_color(rng, label)
        opacity = np.clip(0.5 - distance, 0, 1)[..., None]
        image[window] += opacity * (_texture(rng, color, rows, cols) - image[window])
    image += rng.normal(0, 5, image.shape)
    return Scene(
        image=image.clip(0, 255).astype(np.uint8),
        labels=np.array([0, *(label + 1 for label in labels)], np.uint8)[owner],
        instances=[Instance(label, owner == number) for number, label in enumerate(labels, 1)],
    )


def scene_at(split: str, index: int, size: int, seed: int) -> Scene:
    """Draw picture `index` of `split`; it depends on nothing but these arguments."""
    stream = np.random.SeedSequence(seed, spawn_key=(list(SPLITS).index(split), index))
    return draw_scene(np.random.default_rng(stream), size)


def _coco_annotation(instance: Instance, image_id: int, annotation_id: int) -> dict:
    # Imported here because the configs for segmentation read the names above without having pycocotools.
    from pycocotools import mask as mask_utils

    rle = mask_utils.encode(np.asfortranarray(instance.mask, np.uint8))
    return {
        'id': annotation_id,
        'image_id': image_id,
        'category_id': instance.label + 1,
        'bbox': mask_utils.toBbox(rle).tolist(),
        'area': int(mask_utils.area(rle)),
        'iscrowd': 0,
        'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode()},
    }


def _write_split(root: Path, split: str, size: int, seed: int, numbers: Iterable[int]) -> None:
    coco_images = root / 'coco' / f'{split}2017'
    coco_json = root / 'coco' / 'annotations' / f'instances_{split}2017.json'
    ade = root / 'ade' / 'ADEChallengeData2016'
    ade_images, ade_labels = ade / 'images' / SPLITS[split], ade / 'annotations' / SPLITS[split]
    for folder in (coco_images, coco_json.parent, ade_images, ade_labels):
        folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in numbers:
        scene = scene_at(split, index, size, seed)
        stem = f'{split}_{index:06d}'
        jpeg = io.BytesIO()
        # Full-resolution chroma, or the colours would bleed over the outlines.
        Image.fromarray(scene.image).save(jpeg, 'JPEG', quality=95, subsampling=0)
        for folder in (coco_images, ade_images):
            (folder / f'{stem}.jpg').write_bytes(jpeg.getvalue())
        # ADE20K keeps 0 for "not labelled", which is what `reduce_zero_label=True` takes away.
        Image.fromarray(scene.labels + 1).save(ade_labels / f'{stem}.png')
        images.append({'id': index + 1, 'file_name': f'{stem}.jpg', 'width': size, 'height': size})
        for instance in scene.instances:
            # Counted from 1: COCO's evaluation takes a match with annotation 0 for none.
            annotations.append(_coco_annotation(instance, index + 1, len(annotations) + 1))
    categories = [{'id': number, 'name': name} for number, name in enumerate(CLASSES, 1)]
    coco_json.write_text(json.dumps({'images': images, 'annotations': annotations, 'categories': categories}))


def write_shapes(
    root: Path | str,
    train: int = 400,
    val: int = 80,
    size: int = 192,
    seed: int = 0,
    *,
    force: bool = False,
    progress: Callable[[Sequence[int], str], Iterable[int]] = lambda numbers, split: numbers,
) -> bool:
    """Write the data set: `root/coco`, `root/ade/ADEChallengeData2016` and the manifest `root/shapes.json`.

    Everything is written beside `root` first and moved there once it is whole.

    Args:
        root: Folder to make. One that holds the same data set already is left as it is.
        train: Number of training images.
        val: Number of validation images.
        size: Width and height of the images in pixels.
        seed: The same seed gives the same files.
        force: Replace a data set that is there already.
        progress: Called with the image numbers and the name of each split; iterated over in their place.

    Returns:
        Whether anything was written.

    Raises:
        ValueError: An argument is out of range.
        FileExistsError: `root` holds another data set and `force` is not set, or holds something else.
    """
    for name, value, low in (('train', train, 1), ('val', val, 1), ('size', size, SIZE_RANGE[0]), ('seed', seed, 0)):
        if value < low:
            raise ValueError(f'{name} must be at least {low}, got {value}')
    if size > SIZE_RANGE[1]:
        raise ValueError(f'size must be at most {SIZE_RANGE[1]}, got {size}')

    root = Path(root).resolve()  # a link to a folder elsewhere stays a link
    manifest = json.dumps({'version': VERSION, 'train': train, 'val': val, 'size': size, 'seed': seed})
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        # Without a manifest it may be anything, somebody's COCO too: never replaced.
        if not (root / MANIFEST).is_file():
            raise FileExistsError(f'{root} exists and is not a whole shapes data set: remove it or name another folder')
        found = (root / MANIFEST).read_text()
        if found == manifest and not force:
            return False
        if not force:
            raise FileExistsError(
                f'{root} holds shapes made with {found}, wanted {manifest}: replace them with --force'
            )

    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as scratch:
        new = Path(scratch, 'new')
        for split, count in (('train', train), ('val', val)):
            _write_split(new, split, size, seed, progress(range(count), split))
        (new / MANIFEST).write_text(manifest)
        if root.exists():
            root.rename(Path(scratch, 'old'))
        new.rename(root)
    return True
