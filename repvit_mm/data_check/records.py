"""A data set's images with their annotations, read from a COCO file directly or by the data set's class."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from mmengine.registry import DATASETS, init_default_scope

from ..messages import one_line
from .report import Report, count, some


class DataError(ValueError):
    """A data set cannot be read; the message is one line that names the file."""


@dataclass
class ImageRecord:
    """One image.

    Args:
        path: Where it is.
        size: Width and height in pixels as its annotation declares them; ``None`` if it does not.
        boxes: Each as x1 y1 x2 y2 in pixels.
        labels: An index of the class names for each box.
        label_map: For segmentation, what the loading step of the pipeline takes.
    """

    path: str
    size: tuple[int, int] | None = None
    boxes: list[Sequence[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    label_map: dict[str, Any] | None = None


def build_lazily(cfg: Mapping[str, Any], config: Any, name: str) -> Any:
    """A data set without its data and without its pipeline.

    Raises:
        DataError: if it cannot be built.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    try:
        return DATASETS.build(dict(config, pipeline=[], lazy_init=True))
    except Exception as error:  # anything can be wrong in a config
        raise DataError(f'{name} cannot be built: {one_line(error)}') from error


def reads_coco_files(dataset: Any) -> bool:
    """Whether a data set reads a COCO file by MMDetection's own methods."""
    methods = (getattr(type(dataset), method, None) for method in ('load_data_list', 'parse_data_info'))
    return all(getattr(method, '__qualname__', '').startswith('CocoDataset.') for method in methods)


def read_records(dataset: Any, report: Report, masks: bool) -> list[ImageRecord]:
    """The images of a data set that :func:`build_lazily` made.

    Args:
        dataset: The data set.
        report: Holds the data set's name; findings are added to it.
        masks: Whether the model learns masks, or they are measured.

    Raises:
        DataError: if it cannot be read.
    """
    if reads_coco_files(dataset):
        return read_coco(dataset, report, masks)
    try:
        infos = dataset.load_data_list()
    except Exception as error:  # anything can be wrong in a file of a format that is not known here
        where = f' (ann_file {dataset.ann_file})' if dataset.ann_file else ''
        raise DataError(
            f'{report.name}: {report.kind} cannot read its annotations{where}: {one_line(error)}'
        ) from error
    records = []
    for info in infos:
        size = (info['width'], info['height']) if {'width', 'height'} <= info.keys() else None
        kept = [instance for instance in info.get('instances', ()) if not instance.get('ignore_flag')]
        records.append(
            ImageRecord(
                info['img_path'],
                size,
                [instance['bbox'] for instance in kept],
                [instance['bbox_label'] for instance in kept],
                info if 'seg_map_path' in info and 'instances' not in info else None,
            )
        )
    return records


ID, NUMBER = int | str, int | float
EXPECTED = {ID: 'a number', NUMBER: 'a number', str: 'a text', list: 'four numbers, x, y, width and height'}
FIELDS = {
    'images': {'id': ID, 'file_name': str, 'width': NUMBER, 'height': NUMBER},
    'categories': {'id': ID, 'name': str},
    'annotations': {'id': ID, 'image_id': ID, 'category_id': ID, 'bbox': list, 'area': NUMBER},
}
"""What the entries of a COCO file must have, each of what kind."""

MISSING = object()


def load_coco(path: str, annotated: bool = True) -> dict[str, Any]:
    """A COCO annotation file.

    Args:
        path: Where it is.
        annotated: Whether it must hold annotations.

    Raises:
        DataError: if it is not one.
    """
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f'annotation file {path} is not JSON: {one_line(error)}') from None
    wanted = ['images', 'categories', *(['annotations'] if annotated else [])]
    found = content if isinstance(content, dict) else {}
    missing = [key for key in wanted if not isinstance(found.get(key), list)]
    if missing:
        raise DataError(f'annotation file {path} lacks {", ".join(missing)}: expected a file in COCO format')
    for key in wanted:
        if not content[key]:
            raise DataError(f'annotation file {path} has no {key}: the list is empty')
    for key, kinds in FIELDS.items():
        for number, entry in enumerate(content.get(key) or ()):
            fields = entry if isinstance(entry, dict) else {}
            wrong = [name for name, kind in kinds.items() if not isinstance(fields.get(name, MISSING), kind)]
            if not wrong:
                continue
            where = f'annotation file {path}: entry {number} of {key}'
            if lacking := [name for name in wrong if name not in fields]:
                raise DataError(f'{where} lacks {", ".join(lacking)}')
            name = wrong[0]
            raise DataError(f'{where} has {name}={shorten(repr(fields[name]), 60)}: expected {EXPECTED[kinds[name]]}')
    for number, annotation in enumerate(content.get('annotations') or ()):
        box = annotation['bbox']
        if len(box) != 4 or not all(isinstance(value, int | float) for value in box):
            raise DataError(
                f'annotation file {path}: entry {number} of annotations has bbox={box!r}: expected four numbers, '
                'x, y, width and height'
            )
        if not isinstance(mask := annotation.get('segmentation'), list | dict | None):
            raise DataError(
                f'annotation file {path}: entry {number} of annotations has segmentation={mask!r}: expected polygons '
                'or a run-length encoding'
            )
    return content


def read_coco(dataset: Any, report: Report, masks: bool) -> list[ImageRecord]:
    """The images of a COCO file; reports what MMDetection leaves out of it or misreads."""
    path = dataset.ann_file
    content = load_coco(path, annotated=not dataset.test_mode)
    labels = match_categories(path, content['categories'], dataset.metainfo.get('classes'), report)
    if 'img' not in dataset.data_prefix:
        raise DataError(f"{report.name}.data_prefix names no folder of images: set data_prefix=dict(img='...')")
    prefix = dataset.data_prefix['img']
    records = {
        entry['id']: ImageRecord(os.path.join(prefix, entry['file_name']), (entry['width'], entry['height']))
        for entry in content['images']
    }
    if len(records) < len(content['images']):
        report.error(f'{path}: {count(len(content["images"]) - len(records), "image")} with the id of another')
    annotations = content.get('annotations') or []
    ids = {annotation['id'] for annotation in annotations}
    if len(ids) < len(annotations):
        report.error(f'{path}: annotation ids are not unique: MMDetection refuses the file, number them anew')
    if 0 in ids and dataset.test_mode:
        report.warn(f"{path}: an annotation has the id 0, which COCO's metric takes for no match: count from 1")
    found: dict[str, list[Any]] = {}
    for annotation in annotations:
        record = records.get(annotation['image_id'])
        if record is None:
            reason = 'of images that are not listed'
        elif annotation['category_id'] not in labels:
            reason = 'of other categories'
        elif problem := box_left_out(annotation, record.size):
            reason = problem
        else:
            reason = mask_problem(annotation.get('segmentation'), record.size) if masks else None
            if reason != FEW_POINTS and not annotation.get('iscrowd') and not annotation.get('ignore'):
                x, y, width, height = annotation['bbox']
                record.boxes.append((x, y, x + width, y + height))
                record.labels.append(labels[annotation['category_id']])
            if reason is None:
                continue
        found.setdefault(reason, []).append(annotation['id'])
    for reason, ids in found.items():
        text = f'{path}: {count(len(ids), "annotation")} {reason} (id {some(ids)})'
        if reason in (NO_MASK, WRONG_SIZE):
            report.error(text)
        else:
            report.warn(f'{text}: MMDetection leaves them out')
    return list(records.values())


def match_categories(path: str, categories: list[dict], classes: Any, report: Report) -> dict[int, int]:
    """Category id -> class index, as MMDetection numbers them: in the order of the file.

    Raises:
        DataError: if no category is one of the classes.
    """
    if isinstance(classes, str):
        raise DataError(
            f'{report.name}: metainfo classes={classes!r} is one text: write ({classes!r},), with the comma'
        )
    names = [category['name'] for category in categories]
    known = [name for name in names if name in classes]
    absent = [name for name in classes if name not in names]
    if not known:
        raise DataError(
            f'annotation file {path}: none of its categories ({some(names)}) is a class of the data set '
            f'({some(classes)}): set {report.name}.metainfo=dict(classes=(...))'
        )
    if absent:
        others = [name for name in names if name not in classes]
        report.error(
            f'{path}: no category is called {some(absent)}, as metainfo has it'
            + (f'; it has {some(others)}' if others else '')
            + ': later classes get wrong names'
        )
    elif known != list(classes):
        report.error(
            f'{path}: its categories come in the order {some(known, 6)}, the classes of metainfo in the order '
            f'{some(classes, 6)}: MMDetection numbers by the file, so names would be exchanged; reorder metainfo'
        )
    return {category['id']: known.index(category['name']) for category in categories if category['name'] in known}


def box_left_out(annotation: Mapping[str, Any], size: tuple[int, int]) -> str | None:
    """Why MMDetection leaves an annotation out; ``None`` if it does not."""
    x, y, width, height = annotation['bbox']
    if width < 1 or height < 1 or annotation['area'] <= 0:
        return 'less than a pixel wide or high, or without area'
    if min(x + width, size[0]) <= max(x, 0) or min(y + height, size[1]) <= max(y, 0):
        return 'outside their images'
    return None


NO_MASK = 'without segmentation, which masks are learned from and measured against'
WRONG_SIZE = 'with a mask of another size than their image'
FEW_POINTS = 'whose polygons have fewer than three points'


def mask_problem(segmentation: Any, size: tuple[int, int]) -> str | None:
    """What is wrong with a mask; ``None`` if nothing is."""
    if not segmentation:
        return NO_MASK
    if isinstance(segmentation, Mapping):
        counts = segmentation.get('counts')
        fills_image = not isinstance(counts, list) or sum(counts) == size[0] * size[1]
        return None if fills_image and tuple(segmentation.get('size', ())) == size[::-1] else WRONG_SIZE
    return None if any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation) else FEW_POINTS
