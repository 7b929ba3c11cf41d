"""Every fault of a data set is named, what is whole is not, and the picture shows what the model will see."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import slow_but
from mmengine.config import Config
from PIL import Image

from repvit_mm.data_check import DataError, check_config, check_readable
from repvit_mm.data_check.sheet import CAPTION, CELL, contact_sheet

pytestmark = pytest.mark.needs_ops

WIDTH, HEIGHT = 40, 30


def coco(annotations: int = 2) -> dict[str, Any]:
    """Two images with a cat and a dog each."""
    square = [[2, 2, 12, 2, 12, 12, 2, 12]]
    entry = dict(area=100, iscrowd=0, segmentation=square)
    return dict(
        images=[dict(id=i, file_name=f'{i}.png', width=WIDTH, height=HEIGHT) for i in (1, 2)],
        categories=[dict(id=7, name='cat'), dict(id=9, name='dog')],
        annotations=[
            dict(entry, id=2 * i + j + 1, image_id=i, category_id=(7, 9)[j], bbox=[2.0, 2.0, 10.0, 10.0])
            for i in (1, 2)
            for j in range(annotations)
        ],
    )


def write_images(folder: Path, numbers: tuple[int, ...] = (1, 2)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in numbers:
        Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(folder / f'{number}.png')


def detection(folder: Path, content: Any = None, classes: Any = ('cat', 'dog'), num_classes: int = 2) -> Config:
    """A config for a data set in a folder; ``content`` is that of its annotation file, text or an object."""
    write_images(folder)
    content = coco() if content is None else content
    (folder / 'a.json').write_text(content if isinstance(content, str) else json.dumps(content))
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        dict(type='Resize', scale=(80, 60)),
        dict(type='PackDetInputs'),
    ]
    dataset = dict(
        type='CocoDataset',
        data_root=str(folder),
        ann_file='a.json',
        data_prefix=dict(img=''),
        metainfo=dict(classes=classes),
        pipeline=pipeline,
    )
    return Config(
        dict(
            default_scope='mmdet',
            model=dict(roi_head=dict(bbox_head=[dict(num_classes=num_classes)], mask_head=dict(num_classes=2))),
            train_dataloader=dict(dataset=dict(type='RepeatDataset', times=2, dataset=dataset)),
        )
    )


def segmentation(folder: Path, labels: np.ndarray | None = None, **settings: Any) -> Config:
    """A config for two images of two classes; ``labels`` is the second's map."""
    write_images(folder / 'images')
    (folder / 'labels').mkdir()
    whole = np.zeros((HEIGHT, WIDTH), np.uint8)
    whole[:10] = 1
    whole[10:15] = 255
    for number, values in ((1, whole), (2, whole if labels is None else labels)):
        Image.fromarray(values).save(folder / f'labels/{number}.png')
    dataset = dict(
        type='BaseSegDataset',
        data_root=str(folder),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        img_suffix='.png',
        metainfo=dict(classes=('ground', 'sky'), palette=[[0, 0, 0], [0, 0, 255]]),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')],
    )
    cfg = Config(
        dict(
            default_scope='mmseg',
            model=dict(
                data_preprocessor=dict(type='SegDataPreProcessor'),
                decode_head=dict(num_classes=2),
                auxiliary_head=[dict(num_classes=2)],
            ),
            train_dataloader=dict(dataset=dataset),
        )
    )
    cfg.merge_from_dict(settings)
    return cfg


def errors_and_warnings(cfg: Config, quick: bool = False) -> tuple[list[str], list[str]]:
    (report,) = check_config(cfg, quick=quick)
    return report.errors, report.warnings


def test_a_whole_data_set_of_boxes_is_counted(tmp_path):
    (report,) = check_config(detection(tmp_path))
    assert not report.findings
    assert (report.images, report.empty, report.kind) == (2, 0, 'CocoDataset')
    assert report.name == 'train_dataloader.dataset.dataset'
    assert report.amounts == {0: 2, 1: 2} and report.images_with == {0: 2, 1: 2}
    assert report.image_sizes == [(WIDTH, HEIGHT)] * 2 and set(report.box_sides) == {10.0}
    assert report.summary() == (
        '2 images, 4 boxes, 0 images without annotation, width 40 px, height 30 px, shorter side of a box 10 px'
    )


def test_a_whole_data_set_of_label_maps_is_counted(tmp_path):
    (report,) = check_config(segmentation(tmp_path))
    assert not report.findings
    assert report.amounts == {0: 2 * 15 * WIDTH, 1: 2 * 10 * WIDTH}
    assert report.images_with == {0: 2, 1: 2} and report.image_sizes == [(WIDTH, HEIGHT)] * 2


def changed(**changes: Any) -> dict[str, Any]:
    """The annotations, the first of them changed."""
    content = coco()
    content['annotations'][0].update(changes)
    return content


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in coco().items() if name != key}


BAD_FILES = {
    'not JSON': ('{images: []}', 'a.json is not JSON: Expecting property name'),
    'not an object': ('[]', 'a.json lacks images, categories, annotations: expected a file in COCO format'),
    'no categories': (without('categories'), 'a.json lacks categories'),
    'no annotations': (without('annotations'), 'a.json lacks annotations'),
    'empty': (dict(coco(), annotations=[]), 'a.json has no annotations: the list is empty'),
    'an annotation without area': (
        dict(coco(), annotations=[{k: v for k, v in coco()['annotations'][0].items() if k != 'area'}]),
        'entry 0 of annotations lacks area',
    ),
    'an image without size': (dict(coco(), images=[dict(id=1, file_name='1.png')]), 'images lacks width, height'),
    'other categories': (
        dict(coco(), categories=[dict(id=7, name='Cat'), dict(id=9, name='Dog')]),
        'none of its categories (Cat, Dog) is a class of the data set (cat, dog): set train_dataloader',
    ),
    'unknown ids only': (
        dict(coco(), annotations=[dict(entry, category_id=3) for entry in coco()['annotations']]),
        'has no box of any class',
    ),
    'ids twice': (dict(coco(), annotations=[coco()['annotations'][0]] * 2), 'annotation ids are not unique'),
    'a category by another name': (
        dict(coco(), categories=[dict(id=7, name='cat'), dict(id=9, name='hound')]),
        'no category is called dog, as metainfo has it; it has hound: later classes get wrong names',
    ),
    'categories in another order': (
        dict(coco(), categories=coco()['categories'][::-1]),
        'its categories come in the order dog, cat, the classes of metainfo in the order cat, dog',
    ),
    'a box without mask': (changed(segmentation=[]), '1 annotation without segmentation'),
    'a mask of another size': (
        changed(segmentation=dict(size=[9, 9], counts='0')),
        '1 annotation with a mask of another size than their image (id 3)',
    ),
    'a box of two numbers': (changed(bbox=[1, 2]), 'entry 0 of annotations has bbox=[1, 2]: expected four numbers'),
    'a box of words': (changed(bbox=['a', 1, 2, 3]), "bbox=['a', 1, 2, 3]: expected four numbers"),
    'a mask that is cut off': (
        changed(segmentation=dict(size=[HEIGHT, WIDTH], counts=[5])),
        '1 annotation with a mask of another size than their image (id 3)',
    ),
    'polygons of two points only': (
        dict(coco(), annotations=[dict(entry, segmentation=[[1, 1, 5, 5]]) for entry in coco()['annotations']]),
        'has no box of any class',
    ),
    'an image that is not there': (
        dict(coco(), images=[*coco()['images'], dict(id=3, file_name='3.png', width=8, height=8)]),
        '1 image of 3 not found: ',
    ),
}


@pytest.mark.parametrize('quick', [True, False])
@pytest.mark.parametrize('case', BAD_FILES)
def test_bad_annotation_file_is_an_error(tmp_path, case, quick):
    content, expected = BAD_FILES[case]
    errors, _ = errors_and_warnings(detection(tmp_path, content), quick)
    assert any(expected in error for error in errors), errors
    assert all('\n' not in error for error in errors)


LEFT_OUT = {
    'no width': (changed(bbox=[2, 2, 0, 10]), '1 annotation less than a pixel wide or high'),
    'reversed': (changed(bbox=[12, 2, -10, 10]), '1 annotation less than a pixel wide or high'),
    'no area': (changed(area=0), '1 annotation less than a pixel wide or high, or without area (id 3)'),
    'outside': (changed(bbox=[50, 2, 5, 5]), '1 annotation outside their images'),
    'two points': (changed(segmentation=[[1, 1, 5, 5]]), 'whose polygons have fewer than three points'),
    'another category': (changed(category_id=5), '1 annotation of other categories'),
    'another image': (changed(image_id=5), '1 annotation of images that are not listed'),
}


@pytest.mark.parametrize('case', slow_but(['no width', 'another image'], LEFT_OUT))
def test_what_mmdetection_leaves_out_is_a_warning(tmp_path, case):
    """And it does leave it out."""
    from mmengine.registry import DATASETS, init_default_scope

    content, expected = LEFT_OUT[case]
    cfg = detection(tmp_path, content)
    errors, warned = errors_and_warnings(cfg)
    assert not errors
    assert any(expected in text and 'MMDetection leaves them out' in text for text in warned), warned
    init_default_scope('mmdet')
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert sum(len(dataset[index]['data_samples'].gt_instances) for index in range(2)) == 3


def test_mmdetection_numbers_by_the_order_of_the_file(tmp_path):
    """Why another order is an error: 'cat' of the file becomes the class that metainfo calls 'dog'."""
    from mmengine.registry import DATASETS, init_default_scope

    cfg = detection(tmp_path, dict(coco(), categories=coco()['categories'][::-1]))
    init_default_scope('mmdet')
    dataset = DATASETS.build(cfg.train_dataloader.dataset.dataset)
    assert dataset.metainfo['classes'][dataset.cat2label[7]] == 'dog'


def test_partly_outside_is_a_warning(tmp_path):
    errors, warned = errors_and_warnings(detection(tmp_path, changed(bbox=[2, 2, 60, 10])))
    assert not errors and any('1 box partly outside the image' in text for text in warned)


def test_no_folder_of_images(tmp_path):
    cfg = detection(tmp_path)
    cfg.train_dataloader.dataset.dataset.pop('data_prefix')
    (error,), _ = errors_and_warnings(cfg)
    assert error.endswith("data_prefix names no folder of images: set data_prefix=dict(img='...')")


def test_one_class_without_a_comma(tmp_path):
    errors, _ = errors_and_warnings(detection(tmp_path, classes='cat'))
    assert errors == [
        "train_dataloader.dataset.dataset: metainfo classes='cat' is one text: write ('cat',), with the comma"
    ]


def test_heads_of_another_number_of_classes(tmp_path):
    errors, _ = errors_and_warnings(detection(tmp_path, num_classes=80))
    assert len(errors) == 1
    assert errors[0].startswith(
        'model.roi_head.bbox_head.0.num_classes is 80, but train_dataloader.dataset.dataset has 2'
    )


def test_only_the_whole_check_opens_images(tmp_path):
    cfg = detection(tmp_path)
    Image.new('RGB', (HEIGHT, WIDTH)).save(tmp_path / '1.png')
    (tmp_path / '2.png').write_bytes(b'no image')
    assert errors_and_warnings(cfg, quick=True) == ([], [])
    unreadable, sizes = errors_and_warnings(cfg)[0]
    assert '1 image cannot be read' in unreadable and '2.png is no image or a damaged one' in unreadable
    assert f'1.png is {HEIGHT}x{WIDTH} (turned by its EXIF entry), not {WIDTH}x{HEIGHT}' in sizes


def voc(folder: Path, box: tuple[int, int, int, int]) -> Config:
    """A config of MMDetection's class for VOC with one image and one box, x1 y1 x2 y2."""
    (folder / 'JPEGImages').mkdir()
    (folder / 'Annotations').mkdir()
    Image.new('RGB', (WIDTH, HEIGHT)).save(folder / 'JPEGImages/1.jpg')
    names = zip(('xmin', 'ymin', 'xmax', 'ymax'), box, strict=True)
    sides = ''.join(f'<{name}>{value}</{name}>' for name, value in names)
    (folder / 'Annotations/1.xml').write_text(
        f'<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>'
        f'<object><name>cat</name><bndbox>{sides}</bndbox></object></annotation>'
    )
    (folder / 'train.txt').write_text('1\n')
    cfg = detection(folder)
    cfg.model = {}
    cfg.train_dataloader.dataset = dict(
        type='XMLDataset',
        data_root=str(folder),
        ann_file='train.txt',
        data_prefix=dict(sub_data_root=''),
        metainfo=dict(classes=('cat',)),
    )
    return cfg


def test_a_format_that_the_framework_reads(tmp_path):
    assert errors_and_warnings(voc(tmp_path, (2, 2, 12, 12))) == ([], [])


@pytest.mark.parametrize('box', [(5, 2, 5, 9), (9, 2, 5, 9)])
def test_a_box_of_no_width_that_the_framework_keeps_is_an_error(tmp_path, box):
    cfg = voc(tmp_path, box)
    errors, _ = errors_and_warnings(cfg, quick=True)
    assert len(errors) == 1 and '1 box of no width or height, whose regression loss is infinite' in errors[0]
    cfg.train_dataloader.dataset.filter_cfg = dict(bbox_min_size=1)  # what the message says
    errors, _ = errors_and_warnings(cfg, quick=True)
    assert len(errors) == 1 and 'has no box of any class' in errors[0]


def test_annotations_that_the_framework_cannot_read(tmp_path):
    cfg = voc(tmp_path, (2, 2, 12, 12))
    (tmp_path / 'Annotations/1.xml').write_text('<annotation>')
    (error,), _ = errors_and_warnings(cfg)
    assert 'XMLDataset cannot read its annotations (ann_file ' in error and 'train.txt): ' in error


VOID = np.full((HEIGHT, WIDTH), 11, np.uint8)

BAD_MAPS = {
    'a void class': (VOID, 'label 11 is beyond the 2 classes, in 1 label map ('),
    'another size': (VOID[:5], 'labels/2.png 40x5, its image 40x30'),
    'colours': (np.zeros((HEIGHT, WIDTH, 3), np.uint8), '1 label map hold colours, not one class index a pixel'),
}


@pytest.mark.parametrize('quick', [True, False])
@pytest.mark.parametrize('case', BAD_MAPS)
def test_bad_label_map_is_an_error(tmp_path, case, quick):
    labels, expected = BAD_MAPS[case]
    (error,), _ = errors_and_warnings(segmentation(tmp_path, labels), quick)
    assert expected in error


def test_what_is_said_of_a_void_class_cures_it(tmp_path):
    """Its settings, taken from the message, leave nothing to say; without one of them, something is."""
    cfg = segmentation(tmp_path, VOID)
    (error,), _ = errors_and_warnings(cfg)
    settings = dict(part.split('=') for part in error.partition(', set ')[2].split())
    assert set(settings) == {
        'model.decode_head.ignore_index',
        'model.auxiliary_head.0.ignore_index',
        'model.data_preprocessor.seg_pad_val',
        'val_evaluator.ignore_index',
        'test_evaluator.ignore_index',
    }
    Image.fromarray(np.where(VOID == 11, 11, 0).astype(np.uint8)).save(tmp_path / 'labels/1.png')
    model = {name: int(value) for name, value in settings.items() if name.startswith('model')}
    cfg.merge_from_dict(model)
    assert not errors_and_warnings(cfg)[0]
    cfg.model.data_preprocessor.seg_pad_val = 255
    assert 'label maps are padded with 255' in errors_and_warnings(cfg)[0][0]


def test_the_value_of_the_file_is_told_where_zero_is_taken_away(tmp_path):
    cfg = segmentation(tmp_path, VOID)
    cfg.train_dataloader.dataset.reduce_zero_label = True
    errors, _ = errors_and_warnings(cfg)
    assert len(errors) == 1 and 'label 10 (value 11 of the file) is beyond' in errors[0]


def test_masks_of_black_and_white(tmp_path):
    """255 is ignored: a classic of two classes."""
    cfg = segmentation(tmp_path, np.where(np.arange(WIDTH) < 20, 0, 255).astype(np.uint8) + VOID * 0)
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(tmp_path / 'labels/1.png')
    errors, warned = errors_and_warnings(cfg)
    assert not errors
    assert any('25% of the pixels are ignored (label 255); is 255 one of the classes?' in text for text in warned)


def test_a_label_map_that_is_not_there(tmp_path):
    cfg = segmentation(tmp_path)
    (tmp_path / 'labels/2.png').unlink()
    (error,), _ = errors_and_warnings(cfg)
    assert '1 label map of 2 not found: ' in error and 'labels/2.png' in error


def test_images_with_another_suffix(tmp_path):
    cfg = segmentation(tmp_path)
    cfg.train_dataloader.dataset.img_suffix = '.jpg'
    (error,), _ = errors_and_warnings(cfg)
    assert "holds no .jpg files but .png ones; set img_suffix='.png'" in error


@pytest.mark.parametrize('metric', ['bbox', ['bbox', 'segm']], ids=str)
@pytest.mark.parametrize('split', ['val', 'test'])
def test_masks_that_are_measured_must_be_there(tmp_path, split, metric):
    cfg = detection(tmp_path, changed(segmentation=[]))
    dataset = dict(cfg.train_dataloader.dataset.dataset, test_mode=True)
    cfg = Config({'default_scope': 'mmdet', 'model': {}, f'{split}_dataloader': dict(dataset=dataset)})
    cfg[f'{split}_evaluator'] = [dict(type='CocoMetric', metric=metric)]
    (report,) = check_config(cfg)
    assert any('1 annotation without segmentation' in error for error in report.errors) == ('segm' in metric)
    if 'segm' in metric:
        with pytest.raises(DataError, match=r'1 annotation without segmentation.* measured against \(id 3\)'):
            check_readable(cfg, split)
    else:
        check_readable(cfg, split)


def test_a_test_data_set_may_have_no_annotations(tmp_path):
    cfg = detection(tmp_path, without('annotations'))
    dataset = dict(cfg.train_dataloader.dataset.dataset, test_mode=True)
    cfg = Config(dict(default_scope='mmdet', test_dataloader=dict(dataset=dataset)))
    assert errors_and_warnings(cfg) == ([], [])


def test_splits_that_share_a_data_set_are_looked_at_once(tmp_path):
    cfg = detection(tmp_path)
    cfg.val_dataloader = cfg.train_dataloader
    assert [report.name for report in check_config(cfg)] == ['train_dataloader.dataset.dataset']


def test_sheet_shows_boxes_where_the_pipeline_puts_them(tmp_path):
    """The image is twice as large in the end; its box too."""
    cfg = detection(tmp_path, coco(annotations=1))
    for number in (1, 2):
        Image.new('RGB', (WIDTH, HEIGHT)).save(tmp_path / f'{number}.png')
    sheet = contact_sheet(cfg, images=2)
    assert sheet.shape == (CELL + CAPTION + 8, 2 * (CELL + 8), 3)
    # 40x30 fills the cell's width; above and below is white.
    picture = sheet[4 + CELL // 8 : 4 + CELL - CELL // 8, 4 : 4 + CELL]
    coloured = np.argwhere(picture.max(2).astype(int) - picture.min(2) > 40)
    scale = CELL / WIDTH
    assert coloured.max(0) == pytest.approx([12 * scale, 12 * scale], abs=4)
    assert coloured.min(0)[1] == pytest.approx(2 * scale, abs=4)


def test_sheet_leaves_ignored_pixels_as_they_are(tmp_path):
    cfg = segmentation(tmp_path)
    for number in (1, 2):
        Image.new('RGB', (WIDTH, HEIGHT), (200, 200, 200)).save(tmp_path / f'images/{number}.png')
    sheet = contact_sheet(cfg, images=1)
    column = sheet[4 + CELL // 8 : 4 + CELL - CELL // 8, 4 + 10].astype(int)  # away from the names
    step = CELL // WIDTH
    np.testing.assert_allclose(column[5 * step], [228, 100, 100], atol=3)  # half sky, blue in BGR
    np.testing.assert_allclose(column[12 * step + step // 2], [200, 200, 200], atol=3)  # ignored
    np.testing.assert_allclose(column[20 * step], [100, 100, 100], atol=3)  # half ground, black
