"""The checks, for detection and for segmentation."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from mmengine.registry import TRANSFORMS
from PIL import Image

from ..deploy.sources import UnreadableError, read_image
from ..messages import one_line
from .heads import segmentation_heads, wrong_heads
from .paths import datasets_of, evaluators_of, is_there
from .records import NO_MASK, DataError, ImageRecord, build_lazily, read_records
from .report import Report, count, some

QUICK_IMAGES = 64
"""How many images and label maps, spread over the data set, the quick check opens."""

TOLERANCE = 1.0
"""Pixels by which a box may reach beyond its image, because coordinates are rounded."""

Progress = Callable[[Sequence, str], Iterable]
"""Wraps an iterable, given a title, to show progress; iterated over in its place."""


def check_config(
    cfg: Mapping[str, Any],
    splits: Sequence[str] = ('train', 'val', 'test'),
    quick: bool = False,
    progress: Progress = lambda items, title: items,
) -> list[Report]:
    """Check the data sets of a config.

    Args:
        cfg: A detector's or segmentor's config.
        splits: Which data loaders' data sets.
        quick: Whether to read only annotations and headers, and to open :data:`QUICK_IMAGES` images of a segmentation
            data set. Otherwise every image and every label map is read.
        progress: Shows how far it is.

    Returns:
        One report for each plain data set. Two splits with the same data set give one.
    """
    reports, seen = [], []
    for split in splits:
        for name, dataset in datasets_of(cfg, split):
            if dataset in seen:
                continue
            seen.append(dataset)
            reports.append(check_dataset(cfg, name, dataset, quick, progress))
    return reports


def check_readable(cfg: Mapping[str, Any], *splits: str) -> None:
    """Check only that the splits' annotations can be read, and that the images and the masks to measure are there.

    Raises:
        DataError: if not, or if a data set cannot be built.
    """
    for split in splits:
        for name, config in datasets_of(cfg, split):
            read, found = Report(name, str(config.get('type'))), Report(name)
            records = read_records(build_lazily(cfg, config, name), read, masks=measures_masks(cfg, split))
            for error in read.errors:
                if NO_MASK in error:
                    found.error(error)
            if not records:
                found.error(f'{name} has no image')
            elif not config.get('backend_args'):
                check_files(records, found)
            if found.errors:
                raise DataError(found.errors[0])


def measures_masks(cfg: Mapping[str, Any], split: str) -> bool:
    """Whether a split's metric compares masks with the annotations'."""
    metrics = (evaluator.get('metric', ()) for evaluator in evaluators_of(cfg, split))
    return any('segm' in ([metric] if isinstance(metric, str) else metric) for metric in metrics)


def check_dataset(cfg: Mapping[str, Any], name: str, config: Any, quick: bool, progress: Progress) -> Report:
    """Check one data set."""
    report = Report(name, str(config.get('type')))
    trains = name.startswith('train')
    try:
        dataset = build_lazily(cfg, config, name)
        report.classes = dataset.metainfo.get('classes') or ()
        check_heads(cfg, report)
        pipeline = config.get('pipeline') or []
        learns_masks = trains and any(step.get('with_mask') for step in pipeline)
        records = read_records(dataset, report, masks=learns_masks or measures_masks(cfg, name.partition('_')[0]))
    except DataError as error:
        report.error(str(error))
        return report
    report.images = len(records)
    if not records:
        report.error(f'{name} has no image{why_empty(dataset)}')
        return report
    remote = bool(config.get('backend_args'))  # neither headers nor files of another storage are looked at
    present = records if remote else check_files(records, report)
    if cfg.get('default_scope') == 'mmseg':
        report.unit = 'pixels'
        if not remote:
            check_label_maps(cfg, dataset, present, report, pipeline, quick, progress)
    else:
        report.looked_at = len(records)
        check_boxes(records, report, trains)
        if not quick and not remote:
            check_images(present, report, progress)
    if trains:
        check_balance(report)
    return report


def check_heads(cfg: Mapping[str, Any], report: Report) -> None:
    """Compare the heads' numbers of classes with the data set's."""
    if isinstance(report.classes, str) or not report.classes:
        return  # reported elsewhere, or a data set without classes
    number = len(report.classes)
    for setting, found in wrong_heads(cfg.get('model') or {}, number).items():
        report.error(f'{setting} is {found}, but {report.name} has {count(number, "class")} ({some(report.classes)})')


def why_empty(dataset: Any) -> str:
    """What a folder holds in which a data set found no image."""
    suffix, folder = getattr(dataset, 'img_suffix', None), (dataset.data_prefix or {}).get('img_path')
    if not suffix or not folder or not os.path.isdir(folder):
        return ''
    others = Counter(os.path.splitext(name)[1] for name in os.listdir(folder))
    others.pop('', None)
    if not others:
        return f': {folder} is empty'
    other, _ = others.most_common(1)[0]
    return f': {folder} holds no {suffix} files but {other} ones; set img_suffix={other!r}'


def check_files(records: list[ImageRecord], report: Report) -> list[ImageRecord]:
    """Report which images and label maps are missing; returns the complete records."""
    for what, missing in (
        ('image', [record.path for record in records if not is_there(record.path)]),
        ('label map', [path for record in records if (path := label_path(record)) and not is_there(path)]),
    ):
        if missing:
            report.error(f'{report.name}: {count(len(missing), what)} of {len(records):,} not found: {some(missing)}')
    return [record for record in records if is_there(record.path) and is_there(label_path(record) or record.path)]


def label_path(record: ImageRecord) -> str | None:
    """Where the label map of an image is, if it has one."""
    return record.label_map.get('seg_map_path') if record.label_map else None


def check_boxes(records: list[ImageRecord], report: Report, trains: bool) -> None:
    """Check every box: that it has a size, lies in its image and has a class's label."""
    wrong: dict[str, list[str]] = defaultdict(list)
    for record in records:
        report.empty += not record.boxes
        report.images_with.update(set(record.labels))
        report.amounts.update(record.labels)
        if record.size:
            report.image_sizes.append(record.size)
        for box in record.boxes:
            x1, y1, x2, y2 = box
            report.box_sides.append(min(x2 - x1, y2 - y1))
            if not (x2 > x1 and y2 > y1):  # not a number either
                wrong['without area'].append(record.path)
            elif record.size and outside(box, record.size):
                wrong['outside'].append(record.path)
            elif record.size and (
                min(x1, y1) < -TOLERANCE or x2 - record.size[0] > TOLERANCE or y2 - record.size[1] > TOLERANCE
            ):
                wrong['beyond'].append(record.path)
    if paths := wrong.pop('without area', None):
        report.error(
            f'{report.name}: {count(len(paths), "box")} of no width or height, whose regression loss is infinite, in '
            f'{some(distinct(paths))}: correct them, or leave them out with filter_cfg=dict(bbox_min_size=1) (VOC) or '
            "the pipeline step dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1))"
        )
    if paths := wrong.pop('outside', None):
        report.error(f'{report.name}: {count(len(paths), "box")} outside the image, in {some(distinct(paths))}')
    if paths := wrong.pop('beyond', None):
        report.warn(f'{report.name}: {count(len(paths), "box")} partly outside the image, in {some(distinct(paths))}')
    if trains and not report.amounts:
        report.error(f'{report.name} has no box of any class: there is nothing to learn')
    if unknown := sorted(label for label in report.amounts if not 0 <= label < len(report.classes)):
        report.error(f'{report.name}: labels {some(unknown)} are beyond its {count(len(report.classes), "class")}')


def outside(box: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether no part of a box is in an image."""
    x1, y1, x2, y2 = box
    return x2 <= 0 or y2 <= 0 or x1 >= size[0] or y1 >= size[1]


def distinct(paths: Sequence[str]) -> list[str]:
    """Each path once, in order."""
    return list(dict.fromkeys(paths))


def check_images(records: list[ImageRecord], report: Report, progress: Progress) -> None:
    """Read every image: check that it can be read and is as large as its annotation says."""
    unreadable: list[str] = []
    sizes: list[str] = []

    def look(record: ImageRecord) -> tuple[int, int] | str:
        try:
            return read_image(record.path).shape[1::-1]
        except UnreadableError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        found = progress(pool.map(look, records), f'{report.name}: images')
        for record, seen in zip(records, found, strict=True):
            if isinstance(seen, str):
                unreadable.append(seen)
            elif record.size is None:
                report.image_sizes.append(seen)
            elif seen != tuple(record.size):
                turned = ' (turned by its EXIF entry)' if seen == tuple(record.size)[::-1] else ''
                sizes.append(f'{record.path} is {seen[0]}x{seen[1]}{turned}, not {record.size[0]}x{record.size[1]}')
    if unreadable:
        report.error(f'{report.name}: {count(len(unreadable), "image")} cannot be read: {some(unreadable)}')
    if sizes:
        report.error(
            f'{report.name}: {count(len(sizes), "image")} of another size than its annotation says: {some(sizes)}'
        )


def check_label_maps(
    cfg: Mapping[str, Any],
    dataset: Any,
    records: list[ImageRecord],
    report: Report,
    pipeline: Sequence[Mapping[str, Any]],
    quick: bool,
    progress: Progress,
) -> None:
    """Read label maps as training does: check that they are as large as their images and hold classes only."""
    records = [record for record in records if label_path(record)]
    if quick:
        records = [records[index] for index in spread_over(len(records), QUICK_IMAGES)]
    if not records:
        return
    step = next((step for step in pipeline if str(step.get('type')).endswith('LoadAnnotations')), None)
    load = TRANSFORMS.build(step or dict(type='LoadAnnotations'))
    ignored = {head.get('ignore_index', 255) for _, head in segmentation_heads(cfg.get('model') or {})} or {255}
    number = len(report.classes)
    outside: dict[int, list[str]] = defaultdict(list)
    problems: dict[str, list[str]] = defaultdict(list)
    void = 0

    def look(record: ImageRecord) -> tuple[tuple[int, int], np.ndarray] | tuple[str, str]:
        path = label_path(record)
        try:
            labels = load(dict(record.label_map, seg_fields=[]))['gt_seg_map']
            with Image.open(record.path) as image:
                size = image.size
            if not quick:
                size = read_image(record.path).shape[1::-1]
        except UnreadableError as error:
            return 'of an image that cannot be read', str(error)
        except Exception as error:  # whatever a decoder says of a file
            return 'cannot be read', f'{path} ({one_line(error)})'
        if labels.ndim != 2:
            return 'hold colours, not one class index a pixel', path
        if labels.shape[::-1] != size:
            width, height = labels.shape[::-1]
            return 'of another size than their image', f'{path} {width}x{height}, its image {size[0]}x{size[1]}'
        return size, np.bincount(labels.ravel(), minlength=256)

    with ThreadPoolExecutor() as pool:
        for record, (first, second) in zip(
            records, progress(pool.map(look, records), f'{report.name}: label maps'), strict=True
        ):
            if isinstance(first, str):
                problems[first].append(second)
                continue
            report.image_sizes.append(first)
            present = [int(value) for value in np.flatnonzero(second)]
            kept = [value for value in present if value not in ignored]
            void += sum(int(second[value]) for value in present if value in ignored)
            report.empty += not kept
            for value in kept:
                if value >= number:
                    outside[value].append(label_path(record))
                else:
                    report.amounts[value] += int(second[value])
                    report.images_with[value] += 1
    report.looked_at = len(records)
    for problem, paths in problems.items():
        report.error(f'{report.name}: {count(len(paths), "label map")} {problem}: {some(paths)}')
    for value, paths in sorted(outside.items()):
        report.error(out_of_range(value, paths, report, dataset, cfg))
    check_padding(cfg, report)
    if void and not outside:
        share = void / (void + sum(report.amounts.values()))
        text = f'{report.name}: {share:.0%} of the pixels are ignored (label {some(sorted(ignored))})'
        absent = [report.classes[index] for index in range(number) if not report.amounts[index]]
        if share > 0.5 or (absent and number == 2):
            hint = '; is 255 one of the classes? label maps hold 0, 1, 2, ...' if absent else ''
            report.warn(text + hint)


def spread_over(length: int, most: int) -> list[int]:
    """At most ``most`` indices, evenly spread."""
    return sorted({int(index) for index in np.linspace(0, length - 1, min(length, most))}) if length else []


def out_of_range(value: int, paths: list[str], report: Report, dataset: Any, cfg: Mapping[str, Any]) -> str:
    """The message about label values that are no classes."""
    heads = [name for name, _ in segmentation_heads(cfg.get('model') or {})]
    settings = [f'{name}.ignore_index={value}' for name in heads]
    settings += [f'model.data_preprocessor.seg_pad_val={value}', f'val_evaluator.ignore_index={value}']
    settings += [f'test_evaluator.ignore_index={value}']
    raw = f' (value {value + 1} of the file)' if getattr(dataset, 'reduce_zero_label', False) else ''
    return (
        f'{report.name}: label {value}{raw} is beyond the {count(len(report.classes), "class")}, in '
        f'{count(len(paths), "label map")} ({some(paths)}): if it means "not labelled", set {" ".join(settings)}'
    )


def check_padding(cfg: Mapping[str, Any], report: Report) -> None:
    """Compare the value that label maps are padded with to the value that the heads ignore."""
    model = cfg.get('model') or {}
    padded = (model.get('data_preprocessor') or {}).get('seg_pad_val', 255)
    for name, head in segmentation_heads(model):
        ignored = head.get('ignore_index', 255)
        if report.name.startswith('train') and ignored != padded:
            report.error(
                f'{name}.ignore_index is {ignored}, but label maps are padded with {padded}: set '
                f'model.data_preprocessor.seg_pad_val={ignored}'
            )


def check_balance(report: Report) -> None:
    """Report the classes that a training data set does not show."""
    absent = [name for index, name in enumerate(report.classes) if not report.amounts[index]]
    if report.amounts and absent and report.looked_at == report.images:
        classes = count(len(absent), 'class')
        report.warn(f'{report.name}: nothing to learn {some(absent, 5)} from: no {report.unit} of {classes}')
