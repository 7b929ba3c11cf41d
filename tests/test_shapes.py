import itertools
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from pycocotools.coco import COCO

from repvit_mm.datasets import shapes
from repvit_mm.datasets.shapes import CLASSES, MIN_VISIBLE, OUTLINES, REACH, SPLITS, scene_at, write_shapes

TOOL = Path(__file__).parents[1] / 'tools/make_shapes.py'
SMALL = {'train': 6, 'val': 4, 'size': 128, 'seed': 3}
OPTIONS = [word for name, value in SMALL.items() for word in (f'--{name}', str(value))]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'shapes'
    assert write_shapes(root, **SMALL)
    return root


@pytest.fixture(scope='module')
def main() -> Callable[[list[str]], None]:
    return runpy.run_path(str(TOOL))['main']


@pytest.fixture(scope='module')
def validation() -> list[shapes.Scene]:
    """The validation images of the data set that the tool makes unasked."""
    return [scene_at('val', index, 192, 0) for index in range(80)]


def load(root: Path, split: str) -> COCO:
    return COCO(root / f'coco/annotations/instances_{split}2017.json')


# The pictures


def test_same_seed_gives_the_same_files(written: Path, tmp_path: Path):
    write_shapes(tmp_path / 'again', **SMALL)
    assert contents(tmp_path / 'again') == contents(written)


def test_a_picture_does_not_depend_on_how_many_there_are(written: Path, tmp_path: Path):
    write_shapes(tmp_path / 'fewer', **{**SMALL, 'train': 2, 'val': 1})
    whole = contents(written)
    pictures = {name: data for name, data in contents(tmp_path / 'fewer').items() if not name.endswith('.json')}
    assert len(pictures) == 3 * (2 + 1)  # twice the picture and once the label map
    assert all(whole[name] == data for name, data in pictures.items())


def test_splits_numbers_and_seeds_give_different_pictures():
    keys = [(split, index, seed) for split in SPLITS for index in range(4) for seed in range(3)]
    images = {scene_at(split, index, 96, seed).image.tobytes() for split, index, seed in keys}
    assert len(images) == len(keys)


def test_validation_has_every_class_and_every_coco_size(validation: list[shapes.Scene]):
    instances = [instance for scene in validation for instance in scene.instances]
    assert {instance.label for instance in instances} == set(range(len(CLASSES)))
    areas = np.array([np.count_nonzero(instance.mask) for instance in instances])
    assert set(np.digitize(areas, [32**2, 96**2])) == {0, 1, 2}
    assert {len(scene.instances) for scene in validation} == set(range(1, shapes.MAX_SHAPES + 1))


def test_masks_are_disjoint_and_make_up_the_label_map(validation: list[shapes.Scene]):
    for scene in validation:
        labels = np.zeros_like(scene.labels)
        for instance in scene.instances:
            assert not labels[instance.mask].any()
            labels[instance.mask] = instance.label + 1
        np.testing.assert_array_equal(labels, scene.labels)


def test_later_shapes_cover_earlier_ones_but_never_more_than_allowed(monkeypatch: pytest.MonkeyPatch):
    """With circles of one size alone, the visible share of each is known."""
    monkeypatch.setattr(shapes, 'MIN_DIAMETER', 60)
    monkeypatch.setattr(shapes, 'MAX_DIAMETER', 60 / 192)
    for name in CLASSES:
        monkeypatch.setitem(OUTLINES, name, OUTLINES['circle'])
    whole = np.pi * 30**2
    scenes = [scene_at('train', index, 192, 0) for index in range(40)]
    shares = np.array([np.count_nonzero(instance.mask) / whole for scene in scenes for instance in scene.instances])
    assert shares.min() > MIN_VISIBLE - 0.01  # the rasterized circle is a little off
    assert shares.max() < 1.01
    assert np.count_nonzero(shares < 0.9) > 20


def test_picture_shows_each_shape_where_its_mask_is(monkeypatch: pytest.MonkeyPatch):
    """With flat textures of rising brightness, the brightness of a pixel tells which shape is seen there."""
    step = 40
    for index in range(20):
        levels = itertools.count(0, step)
        monkeypatch.setattr(
            shapes,
            '_texture',
            lambda rng, color, rows, cols, levels=levels: np.full((len(rows), len(cols), 3), next(levels), float),
        )
        scene = scene_at('train', index, 192, 0)
        owner = np.zeros_like(scene.labels)
        for number, instance in enumerate(scene.instances, 1):
            owner[instance.mask] = number
        lowest, highest = (
            Image.fromarray(owner).filter(kind(5)) for kind in (ImageFilter.MinFilter, ImageFilter.MaxFilter)
        )
        inner = np.array(lowest) == np.array(highest)  # the edges are blended
        np.testing.assert_array_equal(np.rint(scene.image.mean(axis=-1) / step)[inner], owner[inner])


@pytest.mark.parametrize('name', CLASSES)
def test_outlines_stay_within_reach_and_are_distances(name: str):
    x, y = np.meshgrid(*[np.linspace(-2, 2, 401)] * 2)
    distance = OUTLINES[name](x, y)
    assert np.hypot(x, y)[distance < 0].max() <= REACH + 0.01
    steps = np.hypot(*np.gradient(distance, 0.01))
    assert np.median(np.abs(steps - 1)) < 1e-3  # the edge is blended over one pixel


def test_ring_has_a_hole_and_the_others_have_none():
    centre = {name: outline(np.zeros(1), np.zeros(1))[0] for name, outline in OUTLINES.items()}
    assert [name for name, distance in centre.items() if distance > 0] == ['ring']


# The files


@pytest.mark.parametrize('split', SPLITS)
def test_coco_and_ade_layouts_agree_pixel_by_pixel(written: Path, split: str):
    coco = load(written, split)
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert len(coco.imgs) == SMALL[split]
    assert min(coco.anns) == 1
    ade = written / 'ade/ADEChallengeData2016'
    for number, info in coco.imgs.items():
        jpeg = written / f'coco/{split}2017' / info['file_name']
        assert jpeg.read_bytes() == (ade / 'images' / SPLITS[split] / info['file_name']).read_bytes()
        assert Image.open(jpeg).size == (info['width'], info['height']) == (SMALL['size'], SMALL['size'])
        labels = np.ones((info['height'], info['width']), np.uint8)  # ADE20K: 0 is unlabelled, 1 the first class
        for annotation in coco.imgToAnns[number]:
            mask = coco.annToMask(annotation).astype(bool)
            assert np.all(labels[mask] == 1)
            labels[mask] = 1 + annotation['category_id']
            rows, cols = np.nonzero(mask)
            box = [cols.min(), rows.min(), np.ptp(cols) + 1, np.ptp(rows) + 1]
            assert annotation['bbox'] == box
            assert annotation['area'] == len(rows)
            assert annotation['iscrowd'] == 0
        label_map = Image.open(ade / 'annotations' / SPLITS[split] / f'{Path(info["file_name"]).stem}.png')
        np.testing.assert_array_equal(np.array(label_map), labels)


def test_jpeg_shows_the_drawn_picture_in_rgb(written: Path):
    drawn = scene_at('val', 0, SMALL['size'], SMALL['seed']).image
    read = np.array(Image.open(written / 'coco/val2017/val_000000.jpg'))
    assert np.abs(read.astype(int) - drawn).mean() < 4


def test_no_hole_is_lost_in_the_annotations(written: Path):
    """Every mask in the file is the drawn one, rings too."""
    coco = load(written, 'train')
    rings = 0
    for number in coco.imgs:
        scene = scene_at('train', number - 1, SMALL['size'], SMALL['seed'])
        for annotation, instance in zip(coco.imgToAnns[number], scene.instances, strict=True):
            np.testing.assert_array_equal(coco.annToMask(annotation), instance.mask)
            rings += CLASSES[instance.label] == 'ring'
    assert rings


# Making the folder


def test_interrupted_writing_leaves_nothing(tmp_path: Path):
    def stop(numbers, split):
        yield numbers[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / 'shapes', **SMALL, progress=stop)
    assert not list(tmp_path.iterdir())


def test_interrupted_replacing_leaves_the_old_one(tmp_path: Path):
    def stop(numbers, split):
        raise KeyboardInterrupt

    write_shapes(tmp_path / 'shapes', 1, 1, 64)
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / 'shapes', 2, 1, 64, force=True, progress=stop)
    assert contents(tmp_path) == before


def test_link_to_a_folder_elsewhere_is_kept(tmp_path: Path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'shapes').symlink_to(tmp_path / 'disk')
    write_shapes(tmp_path / 'shapes', 1, 1, 64)
    assert (tmp_path / 'shapes').is_symlink()
    assert (tmp_path / 'disk' / shapes.MANIFEST).is_file()


# The tool


def test_tool_makes_the_data_set_and_then_leaves_it(written: Path, main, tmp_path: Path, capsys):
    out = tmp_path / 'new/shapes'
    main([str(out), *OPTIONS])
    assert contents(out) == contents(written)
    assert 'already there' not in capsys.readouterr().out
    stamp = (out / shapes.MANIFEST).stat().st_mtime_ns
    main([str(out), *OPTIONS])
    assert 'already there' in capsys.readouterr().out
    assert (out / shapes.MANIFEST).stat().st_mtime_ns == stamp
    assert [path.name for path in out.parent.iterdir()] == ['shapes']


@pytest.mark.slow
def test_tool_runs_as_a_program(tmp_path: Path):
    command = [sys.executable, str(TOOL), '--train', '1', '--val', '1', '--size', '64']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / 'data/shapes/shapes.json').read_text())['size'] == 64


def refused(main, capsys, *arguments: str | Path) -> tuple[int, str]:
    """Exit status and last line of a call that must fail."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code, capsys.readouterr().err.splitlines()[-1]


def test_tool_replaces_another_data_set_only_when_forced(main, tmp_path: Path, capsys):
    out = tmp_path / 'shapes'
    main([str(out), *OPTIONS])
    before = contents(out)
    status, line = refused(main, capsys, out, *OPTIONS, '--seed', '4')
    assert status == 1
    assert '"seed": 3' in line
    assert '"seed": 4' in line
    assert '--force' in line
    assert contents(out) == before
    main([str(out), *OPTIONS, '--seed', '4', '--force'])
    assert json.loads((out / shapes.MANIFEST).read_text())['seed'] == 4
    assert contents(out) != before


@pytest.mark.parametrize('force', [[], ['--force']])
def test_tool_never_replaces_what_it_did_not_make(main, tmp_path: Path, capsys, force: list[str]):
    theirs = tmp_path / 'coco/annotations/instances_train2017.json'
    theirs.parent.mkdir(parents=True)
    theirs.write_text('theirs')
    status, line = refused(main, capsys, tmp_path, *OPTIONS, *force)
    assert status == 1
    assert f'{tmp_path} exists and is not a whole shapes data set' in line
    assert contents(tmp_path) == {'coco/annotations/instances_train2017.json': b'theirs'}


@pytest.mark.parametrize('below', ['', 'shapes'])
def test_tool_refuses_a_file_as_a_folder(main, tmp_path: Path, capsys, below: str):
    (tmp_path / 'file').write_text('')
    status, line = refused(main, capsys, tmp_path / 'file' / below, *OPTIONS)
    assert status == 1
    assert str(tmp_path / 'file') in line


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--train', '0'], 'train must be at least 1, got 0'),
        (['--val', '-2'], 'val must be at least 1, got -2'),
        (['--size', '63'], 'size must be at least 64, got 63'),
        (['--size', '2049'], 'size must be at most 2048, got 2049'),
        (['--seed', '-1'], 'seed must be at least 0, got -1'),
        (['--train', 'many'], "argument --train: invalid int value: 'many'"),
        (['--classes', '3'], 'unrecognized arguments: --classes 3'),
    ],
)
def test_tool_refuses_wrong_numbers(main, tmp_path: Path, capsys, arguments: list[str], message: str):
    status, line = refused(main, capsys, tmp_path / 'shapes', *arguments)
    assert status == 2
    assert line.endswith(message)
    assert not list(tmp_path.iterdir())


def test_tool_names_a_missing_pycocotools(main, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, 'pycocotools', None)
    status, line = refused(main, capsys, tmp_path / 'shapes', *OPTIONS)
    assert status == 1
    assert line.endswith('pip install pycocotools')
    assert not list(tmp_path.iterdir())
