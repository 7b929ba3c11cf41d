"""What users do wrong, as they do it: one line says what, and nothing is left half-written or damaged."""

import copy
import json
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from mmengine.config import Config
from PIL import Image
from programs import launch
from tiny import ADE, COCO, TRAINING, write_checkpoints, write_tiny
from torch import nn

from repvit_mm import FastViT, MobileOne, RepViT, switch_to_deploy
from repvit_mm.checkpoint import CheckpointError, read_checkpoint
from repvit_mm.deploy.predict import predict_all
from repvit_mm.deploy.results import ResultFolder
from repvit_mm.deploy.sources import Source
from repvit_mm.deploy.torch_predictor import ModelPredictor
from repvit_mm.files import UNFINISHED, claim

pytestmark = pytest.mark.needs_ops

SMALL = dict(channels=(8, 16, 24, 32), depths=(1, 1, 1, 1))
ANNOTATIONS = f'{COCO}/annotations/instances_train2017.json'


@dataclass(frozen=True)
class Row:
    """What is done, and what is said.

    Args:
        command: A launcher and its arguments; ``%20`` is a space within one.
        says: What the last line on stderr has to hold; of a run that succeeds, all that it prints.
        status: Exit status.
        before: Prepares the folder, which is a copy of its own then.
        limit: Largest size in bytes of a file that may be written.
    """

    command: str
    says: tuple[str, ...]
    status: int = 1
    before: Callable[[Path], None] | None = None
    limit: int | None = None


def annotations(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """Changes what the annotation file of the training images holds."""

    def before(folder: Path) -> None:
        content = json.loads((folder / ANNOTATIONS).read_text())
        changed = change(content)
        (folder / ANNOTATIONS).write_text(changed if isinstance(changed, str) else json.dumps(changed or content))

    return before


def each(**values: Any) -> Callable[[Path], None]:
    """Changes every annotation."""
    return annotations(lambda content: [annotation.update(values) for annotation in content['annotations']] and content)


def file(name: str, content: bytes | None = None) -> Callable[[Path], None]:
    """Replaces a file of the folder, or takes it away."""

    def before(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)

    return before


def image(name: str, mode: str, size: tuple[int, int]) -> Callable[[Path], None]:
    """Replaces an image or a label map of the folder."""

    def before(folder: Path) -> None:
        file(name)(folder)
        Image.new(mode, size, 200 if mode == 'L' else None).save(folder / name)

    return before


def shortened(name: str) -> Callable[[Path], None]:
    """Cuts a file off in its middle."""

    def before(folder: Path) -> None:
        content = (folder / name).read_bytes()
        file(name, content[: len(content) // 2])(folder)

    return before


def claimed(name: str) -> Callable[[Path], None]:
    """Does what a run that goes on in a folder does; this process holds the claim as long as it lives."""

    def before(folder: Path) -> None:
        (folder / name).mkdir()
        claim(folder / name)

    return before


FIRST = f'{COCO}/train2017/train_000000.jpg'
VALIDATED = f'{COCO}/val2017/val_000000.jpg'
LABELS = f'{ADE}/annotations/training/train_000000.png'
SEEN = f'{ADE}/images/training/train_000000.jpg'
SKIP = '--skip-data-check'

ROWS = {
    # Configs.
    'config is a folder': Row('train.py data', ('config data not found',)),
    'config is JSON and broken': Row(
        'train.py c.json', ('config c.json cannot be read',), before=file('c.json', b'{"a"')
    ),
    'config without a model': Row(
        'train.py c.py', ('config c.py has no model, train_cfg',), before=file('c.py', b"default_scope = 'mmdet'")
    ),
    'backbone of another name': Row('train.py det.py --cfg-options model.backbone.type=RepVit', ('RepVit', 'registry')),
    'channels of the neck': Row(
        'train.py det.py --cfg-options model.neck.in_channels=[8,16,24,48]',
        ('model.neck.in_channels is [8, 16, 24, 48], the backbone gives maps of [8, 16, 24, 32] channels',),
    ),
    'fewer maps than the neck takes': Row(
        'train.py seg.py --cfg-options model.backbone.out_indices=[0,1,2]', ('model.neck.in_channels', '[8, 16, 24]')
    ),
    'repeated out_indices': Row(
        'train.py det.py --cfg-options model.backbone.out_indices=[0,1,1,3]',
        ('out_indices=', 'the nearest is (0, 1, 3)'),
    ),
    'metric of another task': Row('test.py det.py det.pth --eval mIoU', ('--eval mIoU: detection takes bbox, segm',)),
    'batch size of zero': Row('train.py det.py --cfg-options train_dataloader.batch_size=0', ('batch_size',)),
    'negative learning rate': Row(
        'train.py seg.py --cfg-options optimizer.lr=-1 optim_wrapper.optimizer.lr=-1', ('learning rate',)
    ),
    'no epochs': Row('train.py det.py --cfg-options train_cfg.max_epochs=0', ('train_cfg.max_epochs=0: expected',)),
    'half an iteration': Row(
        'train.py seg.py --cfg-options train_cfg.max_iters=2.5', ('train_cfg.max_iters=2.5: expected a whole number',)
    ),
    'number of iterations in words': Row(
        'train.py seg.py --cfg-options train_cfg.max_iters=many', ("train_cfg.max_iters='many': expected",)
    ),
    'validation after no iterations': Row(
        'train.py seg.py --cfg-options train_cfg.val_interval=0', ('train_cfg.val_interval=0: expected',)
    ),
    'config with a byte order mark': Row(
        'train.py bom.py',
        ('config bom.py cannot be read', 'without a byte order mark'),
        before=lambda folder: (folder / 'bom.py').write_text((folder / 'det.py').read_text(), encoding='utf-8-sig'),
    ),
    'config in a folder with spaces, of lines that end as on Windows': Row(
        'train.py a%20b/c%20d.py --cfg-options train_cfg.max_iters=4',
        ('Iter(train) [4/4]',),
        status=0,
        before=lambda folder: (
            (folder / 'a b').mkdir(),
            (folder / 'a b/c d.py').write_text((folder / 'seg.py').read_text(), newline='\r\n'),
        ),
    ),
    'optimizer of another name': Row(
        'train.py det.py --cfg-options optim_wrapper.optimizer.type=Adamw', ('optim_wrapper cannot be built', 'Adamw')
    ),
    'learning rate in words': Row(
        'train.py det.py --cfg-options optim_wrapper.optimizer.lr=fast', ('optim_wrapper cannot be built', "'fast'")
    ),
    'process of a job that nothing has started': Row(
        'train.py det.py --launcher slurm', ('--launcher slurm: SLURM_PROCID is not set', 'srun')
    ),
    'value without an option': Row(
        'train.py det.py --cfg-options =3', ('--cfg-options =3: expected KEY=VALUE',), status=2
    ),
    'option without a value': Row(
        'train.py det.py --cfg-options model', ('--cfg-options model: expected KEY=VALUE',), status=2
    ),
    'unknown option': Row('train.py det.py --fusee', ('unrecognized arguments: --fusee',), status=2),
    # Data folders and annotation files.
    'no folder of images': Row(
        'train.py det.py --cfg-options train_dataloader.dataset.data_prefix.img=absent/', ('data not found', 'absent')
    ),
    'empty folder of images': Row(
        'train.py det.py --cfg-options train_dataloader.dataset.data_prefix.img=none/',
        (f'{TRAINING} images of {TRAINING} not found',),
        before=lambda folder: (folder / COCO / 'none').mkdir(),
    ),
    'no annotation file': Row(
        'train.py det.py', ('data not found', 'instances_train2017.json'), before=file(ANNOTATIONS)
    ),
    'empty annotation file': Row(
        'train.py det.py', ('instances_train2017.json is not JSON',), before=file(ANNOTATIONS, b'')
    ),
    'annotation file of bytes': Row('train.py det.py', ('is not JSON',), before=file(ANNOTATIONS, bytes(range(256)))),
    'annotation file of a list': Row(
        'train.py det.py', ('lacks images, categories',), before=annotations(lambda _: '[1]')
    ),
    'no categories': Row(
        'train.py det.py', ('lacks categories',), before=annotations(lambda c: c.pop('categories') and c)
    ),
    'no images': Row('train.py det.py', ('has no images',), before=annotations(lambda c: c.update(images=[]))),
    'no annotations': Row(
        'train.py det.py', ('has no annotations',), before=annotations(lambda c: c.update(annotations=[]))
    ),
    'category ids out of range': Row('train.py det.py', ('no box of any class',), before=each(category_id=99)),
    'boxes without area': Row('train.py det.py', ('no box of any class',), before=each(bbox=[3, 3, 0, 9])),
    'reversed boxes': Row('train.py det.py', ('no box of any class',), before=each(bbox=[30, 30, -9, -9])),
    'boxes of two numbers': Row('train.py det.py', ('instances_train2017.json', 'bbox'), before=each(bbox=[3, 3])),
    'boxes of words': Row(
        'train.py det.py', ('instances_train2017.json', 'bbox'), before=each(bbox=['a', 'b', 'c', 'd'])
    ),
    'masks that are numbers': Row(
        'train.py det.py', ('instances_train2017.json', 'has segmentation=5: expected'), before=each(segmentation=5)
    ),
    'areas in words': Row(
        'train.py det.py', ("instances_train2017.json: entry 0 of annotations has area='big'",), before=each(area='big')
    ),
    'annotation file with a byte order mark': Row(
        'train.py det.py',
        ('instances_train2017.json is not JSON: Unexpected UTF-8 BOM',),
        before=annotations(lambda content: '\ufeff' + json.dumps(content)),
    ),
    'annotation file of nothing but brackets': Row(
        'train.py det.py', ('instances_train2017.json is not JSON',), before=annotations(lambda _: '[' * 99_999)
    ),
    'polygons of two points': Row(
        'train.py det.py', ('no box of any class',), before=each(segmentation=[[1, 1, 9, 9]])
    ),
    'masks of another size': Row(
        'train.py det.py', ('mask of another size',), before=each(segmentation=dict(size=[9, 9], counts='0'))
    ),
    'masks that are cut off': Row(
        'train.py det.py', ('mask of another size',), before=each(segmentation=dict(size=[64, 64], counts=[9, 9]))
    ),
    'one missing image': Row('train.py det.py', ('1 image of 8 not found', FIRST), before=file(FIRST)),
    'one missing image that nobody looked for': Row(
        f'train.py det.py {SKIP}',
        (f'{FIRST} cannot be read: No such file', 'no checkpoint was saved'),
        before=file(FIRST),
    ),
    'one empty image that a worker looked for': Row(
        f'train.py seg.py {SKIP} --cfg-options train_dataloader.num_workers=1',
        (f'{SEEN} is empty', 'check_data.py'),
        before=file(SEEN, b''),
    ),
    'one missing image of a test': Row(
        'test.py det.py det.pth', ('1 image of 4 not found', VALIDATED), before=file(VALIDATED)
    ),
    'categories of a test': Row(
        'test.py det.py det.pth',
        ('instances_val2017.json is not JSON',),
        before=file(f'{COCO}/annotations/instances_val2017.json', b'{'),
    ),
    # Images.
    'text for an image': Row(
        'train.py det.py', (f'{FIRST} is no image or a damaged one',), before=file(FIRST, b'no image')
    ),
    'empty image': Row('train.py det.py', (f'{FIRST} is empty',), before=file(FIRST, b'')),
    'empty image of a test': Row(
        'test.py det.py det.pth', (f'{VALIDATED} is empty', 'nothing was measured'), before=file(VALIDATED, b'')
    ),
    'image of another size': Row(
        'check_data.py det.py --images 0', (f'{FIRST} is 9x5, not 64x64',), before=image(FIRST, 'RGB', (9, 5))
    ),
    # Label maps.
    'label map of another size': Row(
        'train.py seg.py', ('of another size than their image', LABELS), before=image(LABELS, 'L', (64, 32))
    ),
    'label map of another size that nobody looked for': Row(
        f'train.py seg.py {SKIP}', ('is of another size than', LABELS), before=image(LABELS, 'L', (64, 32))
    ),
    'label out of range': Row(
        'train.py seg.py', ('label 199', 'is beyond the 7 classes', LABELS), before=image(LABELS, 'L', (64, 64))
    ),
    'label out of range that nobody looked for': Row(
        f'train.py seg.py {SKIP}',
        (f'label 199 in {LABELS} of {SEEN} is no class, expected 0 to 6, or 255', 'Target 199 is out of bounds'),
        before=image(LABELS, 'L', (64, 64)),
    ),
    'label map of colours': Row('train.py seg.py', ('hold colours', LABELS), before=image(LABELS, 'RGB', (64, 64))),
    'text for a label map': Row('train.py seg.py', (LABELS, 'cannot be read'), before=file(LABELS, b'no labels')),
    'missing label map': Row('train.py seg.py', ('1 label map of 8 not found', LABELS), before=file(LABELS)),
    # Checkpoints.
    'empty checkpoint': Row('test.py det.py a.pth', ('checkpoint a.pth is empty',), before=file('a.pth', b'')),
    'checkpoint of bytes': Row(
        'test.py det.py a.pth', ('checkpoint a.pth is damaged or no checkpoint',), before=file('a.pth', bytes(999))
    ),
    'half a checkpoint': Row(
        'test.py det.py det.pth', ('checkpoint det.pth is damaged or no checkpoint',), before=shortened('det.pth')
    ),
    'checkpoint of another task': Row('test.py det.py seg.pth', ('checkpoint seg.pth is not of this config',)),
    'checkpoint that is a picture': Row(f'predict.py det.py {FIRST} {FIRST} --out o', ('is damaged or no checkpoint',)),
    'resuming from weights': Row('train.py det.py --resume det.pth', ("is no checkpoint of a training run's",)),
    'a last_checkpoint that leads nowhere': Row(
        'train.py det.py --resume',
        ('checkpoint gone.pth not found',),
        before=lambda folder: ((folder / 'work').mkdir(), (folder / 'work/last_checkpoint').write_text('gone.pth')),
    ),
    'exporting half a checkpoint': Row(
        'export.py det.py det.pth --to onnx', ('det.pth is damaged',), before=shortened('det.pth')
    ),
    'converting half a checkpoint': Row(
        'convert_checkpoint.py det.pth o.pth', ('det.pth is damaged',), before=shortened('det.pth')
    ),
    'converting what is no backbone': Row(
        'convert_checkpoint.py a.pth o.pth',
        ('a.pth holds no FastViT or MobileOne or RepViT',),
        before=lambda f: torch.save({'a': torch.ones(2)}, f / 'a.pth'),
    ),
    'damaged ONNX file': Row(
        'test.py seg.py a.onnx', ('a.onnx cannot be opened by onnxruntime',), before=file('a.onnx', b'no model')
    ),
    'damaged TorchScript file': Row(
        f'predict.py a.pt {FIRST} --out o', ('a.pt cannot be opened by torch',), before=file('a.pt', b'no model')
    ),
    'data set check of a config without data': Row(
        'check_data.py c.py', ('config c.py has no data set of train',), before=file('c.py', b"default_scope = 'mmdet'")
    ),
    # Places that cannot be written.
    'work folder that is a file': Row(
        'train.py det.py', ('the run cannot begin', 'work'), before=file('work', b'mine')
    ),
    'work folder below a file': Row(
        'test.py seg.py seg.pth --work-dir seg.py/x', ('the run cannot begin', 'seg.py'), before=None
    ),
    'full disk while saving': Row('train.py seg.py', ('File too large', 'iter_4.pth'), limit=40_000),
    'pictures into a file': Row(f'predict.py det.py det.pth {FIRST} --out det.py', ('--out det.py is a file',)),
    'pictures below a file': Row(f'predict.py det.py det.pth {FIRST} --out det.py/x', ('Not a directory', 'det.py/x')),
    **{
        f'full disk while exporting to {target}': Row(
            f'export.py seg.py seg.pth --to {target} --shape 64 64 --out full/a.{suffix}',
            ('File too large',),
            before=lambda folder: (folder / 'full').mkdir(),
            limit=40_000,
        )
        for target, suffix in (('onnx', 'onnx'), ('torchscript', 'pt'), ('torch_export', 'pt2'))
    },
    'exporting below a file': Row(
        'export.py seg.py seg.pth --to torchscript --shape 64 64 --out seg.py/a.pt', ('seg.py',)
    ),
    'converting below a file': Row(
        'convert_checkpoint.py b.pth det.py/o.pth',
        ('det.py/o.pth cannot be written',),
        before=lambda f: torch.save(RepViT('m0_6').state_dict(), f / 'b.pth'),
    ),
    'work folder of a run that goes on': Row(
        'train.py seg.py', ('another run writes into', 'work'), before=claimed('work')
    ),
    # What works all the same.
    'images without any box in a batch': Row(
        'train.py det.py --cfg-options train_dataloader.dataset.filter_cfg.filter_empty_gt=False',
        ('Epoch(val)',),
        status=0,
        before=annotations(lambda c: c.update(annotations=[a for a in c['annotations'] if a['image_id'] == 1])),
    ),
    'one image in a batch': Row(
        'train.py seg.py --cfg-options train_dataloader.batch_size=1 train_cfg.max_iters=4',
        ('Iter(train) [4/4]',),
        status=0,
    ),
    'loss that is not a number': Row(
        'train.py det.py --cfg-options optim_wrapper.optimizer.lr=1e30 param_scheduler=None', ('is nan', '.jpg')
    ),
}
"""Each runs beside the data, ``det.py``, ``seg.py``, ``det.pth`` and ``seg.pth``."""

QUICK = [
    'channels of the neck',
    'annotation file of bytes',
    'one missing image that nobody looked for',
    'label map of another size that nobody looked for',
    'half a checkpoint',
]
"""Rows that an ordinary run of the tests tries too: one of each kind."""


@pytest.fixture(scope='module')
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp('scene'))
    write_checkpoints(folder)
    return folder


@pytest.fixture
def folder(scene: Path, tmp_path: Path) -> Path:
    """A copy of the scene whose files can be replaced, but are not to be written into."""
    for path in scene.rglob('*'):
        target = tmp_path / path.relative_to(scene)
        if path.is_dir():
            target.mkdir()
        elif path.suffix == '.json':
            target.write_bytes(path.read_bytes())
        else:
            target.symlink_to(path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those of the run's own folder and of caches."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file() and not {'work', '__pycache__'} & {*path.relative_to(folder).parts[:1]}
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    'row',
    [pytest.param(row, id=name, marks=[] if name in QUICK else pytest.mark.torture) for name, row in ROWS.items()],
)
def test_row(folder: Path, row: Row) -> None:
    if row.before:
        row.before(folder)
    before = contents(folder)
    tool, *arguments = (word.replace('%20', ' ') for word in row.command.split())
    if tool in ('train.py', 'test.py') and '--work-dir' not in arguments:
        arguments[1 if tool == 'train.py' else 2 : 0] = ['--work-dir', 'work']
    limited = row.limit and partial(resource.setrlimit, resource.RLIMIT_FSIZE, (row.limit, row.limit))
    done = launch(folder, tool, *arguments, first=limited)
    printed = done.stdout + done.stderr
    assert done.returncode == row.status, printed[-3000:]
    assert 'Traceback' not in printed
    told = done.stderr.rstrip('\n').splitlines()[-1] if row.status and done.stderr.strip() else printed
    for part in row.says:
        assert part in told
    assert contents(folder) == before, 'a file was damaged, or something was left'
    assert not [path for path in folder.rglob(f'*{UNFINISHED}')]
    for path in folder.glob('work/*.pth'):
        read_checkpoint(path)


# ------------------------------------------------------------------------------------------------ Images of every kind.


def save(kind: str, path: Path, size: tuple[int, int] = (48, 80)) -> None:
    """Write an image of a kind; ``size`` is its height and width, unless the kind has one of its own."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    picture = Image.fromarray(pixels)
    if kind in ('L', 'RGBA', 'CMYK', '1', 'P', 'LA'):
        picture.convert(kind).save(path)
    elif kind == '16 bit':
        Image.fromarray(rng.integers(0, 2**16, size, np.uint16)).save(path)
    elif kind[0].isdecimal():
        Image.new('RGB', tuple(map(int, kind.split('x')))).save(path)
    else:
        picture.save(path)
    if kind == 'truncated':
        path.write_bytes(path.read_bytes()[:900])
    elif kind == 'header':
        path.write_bytes(path.read_bytes()[:40])
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'text':
        path.write_text('no image')


KINDS = {
    'L': 'grey.png', 'RGBA': 'rgba.png', 'LA': 'la.png', '1': 'bits.png', 'P': 'palette.png', '16 bit': 'deep.png',
    'CMYK': 'cmyk.jpg', 'unicode': 'Übergrößen 图像 🦊.png', 'spaces': ' two  spaces [1]*.png', 'bmp': 'a.bmp',
    'upper': 'A.JPG', 'webp': 'a.webp', 'tiff': 'a.tiff', '1x1': 'dot.png', '1x5000': 'high.png', '5000x1': 'wide.png',
    '33x47': 'odd.png', 'truncated': 'truncated.png', 'header': 'header.jpg', 'empty': 'empty.png', 'text': 'text.jpg',
}  # fmt: skip
UNREADABLE = {'header', 'empty', 'text'}
AS_IT_MAY_BE = {'truncated', '1x1', '1x5000', '5000x1'}
"""Either is right: it is predicted on, or named. What the config's resizing makes too narrow cannot be predicted on."""


@pytest.fixture(scope='module')
def predictors(scene: Path) -> Callable[[str], ModelPredictor]:
    made: dict[str, ModelPredictor] = {}

    def predictor(task: str) -> ModelPredictor:
        if task not in made:
            made[task] = ModelPredictor(Config.fromfile(scene / f'{task}.py'), str(scene / f'{task}.pth'))
        return made[task]

    return predictor


@pytest.mark.parametrize('task', ['det', 'seg'])
@pytest.mark.parametrize('kind', KINDS)
def test_image_is_predicted_on_or_named(tmp_path: Path, predictors: Callable, task: str, kind: str) -> None:
    path = tmp_path / KINDS[kind]
    save(kind, path)
    predictor = predictors(task)
    with ResultFolder(tmp_path / 'out', predictor.task, predictor.classes) as results:
        (step,) = predict_all(predictor, [Source(str(path))], results)
    if kind not in AS_IT_MAY_BE:
        assert bool(step.problem) is (kind in UNREADABLE)
    if step.problem:
        assert str(path) in step.problem and '\n' not in step.problem
    else:
        assert len([*(tmp_path / 'out/pictures').iterdir()]) == 1
    content = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert len(content['images']) == (not step.problem)
    for entry in content['images']:
        with Image.open(path) as picture:
            assert (entry['width'], entry['height']) == picture.size


@pytest.mark.torture
@pytest.mark.parametrize('task', ['det', 'seg'])
def test_training_on_images_of_every_kind(folder: Path, tried: Callable[[], None], task: str) -> None:
    """Those that can be read, many in a run; each of the others by itself: it is named, unless it works."""
    root = folder / (f'{COCO}/train2017' if task == 'det' else f'{ADE}/images/training')
    links = {path: path.readlink() for path in sorted(root.iterdir())}
    odd = UNREADABLE | AS_IT_MAY_BE | {'33x47'}  # which has another size than its annotation
    plain = [kind for kind in KINDS if kind not in odd]
    for kinds in (plain[:TRAINING], plain[TRAINING:], *([kind] for kind in sorted(odd))):
        for path, kind in zip(links, kinds, strict=False):
            tried()
            scratch = folder / f'scratch{Path(KINDS[kind]).suffix}'
            save(kind, scratch, (64, 64))
            scratch.replace(path)  # the decoders look at the content
        done = launch(folder, 'train.py', f'{task}.py', SKIP, '--work-dir', 'work')
        assert 'Traceback' not in done.stdout + done.stderr, (kinds, done.stderr[-2000:])
        if done.returncode or kinds[0] in UNREADABLE:
            assert kinds[0] in odd and next(iter(links)).name in done.stderr.rstrip().splitlines()[-1], kinds
        for path, link in links.items():
            path.unlink()
            path.symlink_to(link)


# -------------------------------------------------------------------------------------------------- Calls from Python.


def damaged(folder: Path, content: bytes, name: str = 'a.pth') -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / 'a.pth')
    return folder / 'a.pth'


def network(**options: Any) -> RepViT:
    return RepViT(SMALL, **options)


CALLS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    'unknown arch': (lambda _: RepViT('m0_7'), ValueError, r"arch='m0_7'.*the nearest is"),
    'arch of another family': (lambda _: FastViT('m0_9'), ValueError, r"arch='m0_9'"),
    'arch that is no name': (lambda _: RepViT(9), TypeError, r'arch=9'),
    'arch of three widths': (lambda _: RepViT(SMALL | {'channels': (8, 8, 8)}), ValueError, r'channels=\(8, 8, 8\)'),
    'arch of a negative depth': (lambda _: RepViT(SMALL | {'depths': (1, 1, -1, 1)}), ValueError, r'depths='),
    'arch of half a block': (lambda _: RepViT(SMALL | {'depths': (1, 1.5, 1, 1)}), ValueError, r'depths='),
    'arch with a field too many': (lambda _: RepViT(SMALL | {'width': 1}), ValueError, r"width'?.*the nearest"),
    'odd first width': (lambda _: RepViT(SMALL | {'channels': (7, 8, 8, 8)}), ValueError, r'must be even'),
    'widths that do not divide': (
        lambda _: FastViT(dict(channels=(8, 12, 24, 48), depths=(1, 1, 1, 1))),
        ValueError,
        r'multiple',
    ),
    'more gates than blocks': (lambda _: MobileOne(SMALL | {'se_depths': (2, 0, 0, 0)}), ValueError, r'se_depths='),
    'repeated out_indices': (lambda _: network(out_indices=(0, 0)), ValueError, r'out_indices=\(0, 0\)'),
    'out_indices out of range': (lambda _: network(out_indices=(0, 4)), ValueError, r'the nearest is \(0, 3\)'),
    'out_indices that is a number': (lambda _: network(out_indices=3), ValueError, r'out_indices=3'),
    'unknown tap': (lambda _: network(tap='end'), ValueError, r"tap='end'"),
    'unknown output stride': (lambda _: network(output_stride=4), ValueError, r'output_stride=4'),
    'drop path of one': (lambda _: network(drop_path_rate=1.0), ValueError, r'drop_path_rate=1.0'),
    'drop path without residuals': (lambda _: MobileOne('s0', drop_path_rate=0.1), ValueError, r'no residual branches'),
    'frozen stages out of range': (lambda _: network(frozen_stages=9), ValueError, r'frozen_stages=9'),
    'unknown option': (lambda _: network(norm_evil=True), TypeError, r"'norm_evil': the nearest is 'norm_eval'"),
    'training what is fused': (lambda _: network(deploy=True).train(), RuntimeError, r'is fused for deployment'),
    'grey images': (lambda _: network()(torch.ones(1, 1, 64, 64)), RuntimeError, r'3 channels, but got 1'),
    'integers': (lambda _: network().eval()(torch.ones(1, 3, 64, 64, dtype=torch.uint8)), RuntimeError, r'type'),
    'one value for a norm': (
        lambda _: network()(torch.ones(1, 3, 32, 32)),
        ValueError,
        r'one image of 32x32 pixels.*norm_eval',
    ),
    'one value for a norm, dilated': (
        lambda _: network(output_stride=8)(torch.ones(1, 3, 8, 8)),
        ValueError,
        r'one image of 8x8',
    ),
    'state dict of another width': (
        lambda _: network().load_state_dict(RepViT(SMALL | {'channels': (8, 16, 24, 40)}).state_dict()),
        CheckpointError,
        r'does not fit',
    ),
    'state dict of a part': (
        lambda _: network().load_state_dict({k: v for k, v in network().state_dict().items() if 'stages.1' in k}),
        CheckpointError,
        r'missing',
    ),
    'state dict of nothing': (lambda _: network().load_state_dict({}), CheckpointError, r'.'),
    'no checkpoint': (lambda f: read_checkpoint(f / 'x.pth'), CheckpointError, r'x.pth not found'),
    'folder': (lambda f: read_checkpoint(f), CheckpointError, r'is a folder'),
    'empty': (lambda f: read_checkpoint(damaged(f, b'')), CheckpointError, r'is empty'),
    'web page': (lambda f: read_checkpoint(damaged(f, b'<!DOCTYPE html>')), CheckpointError, r'is a web page'),
    'zeros': (lambda f: read_checkpoint(damaged(f, bytes(4096))), CheckpointError, r'is damaged or no checkpoint'),
    'text': (lambda f: read_checkpoint(damaged(f, b'weights\n')), CheckpointError, r'is damaged or no checkpoint'),
    'whole module': (
        lambda f: read_checkpoint(saved(f, nn.Conv2d(1, 1, 1))),
        CheckpointError,
        r'torch.nn.modules.conv.Conv2d',
    ),
    'function': (lambda f: read_checkpoint(saved(f, {'a': os.system})), CheckpointError, r'system.*--trust-checkpoint'),
    'no safetensors': (
        lambda f: read_checkpoint(damaged(f, bytes(64), 'a.safetensors')),
        CheckpointError,
        r'damaged or no safetensors',
    ),
    'safetensors of a huge header': (
        lambda f: read_checkpoint(damaged(f, b'\xff' * 64, 'a.safetensors')),
        CheckpointError,
        r'damaged or no safetensors',
    ),
    'half of a safetensors file': (
        lambda f: read_checkpoint(damaged(f, safetensors.torch.save({'a': torch.ones(99)})[:200], 'a.safetensors')),
        CheckpointError,
        r'damaged',
    ),
}
"""What is called, and the exception that it raises in one line."""


@pytest.mark.parametrize('case', CALLS)
def test_call(tmp_path: Path, case: str) -> None:
    call, error, expected = CALLS[case]
    with pytest.raises(error, match=expected) as caught:
        call(tmp_path)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 1000


SIDES = [(32, 32), (1, 1), (33, 47), (31, 97), (640, 33), (32, 4096), (4095, 63)]


@pytest.mark.parametrize('family', [RepViT, FastViT, MobileOne])
@pytest.mark.parametrize('size', [*SIDES, pytest.param((4096, 4096), marks=pytest.mark.torture)])
def test_any_size_gives_maps_of_the_declared_size(family: type, size: tuple[int, int]) -> None:
    spec = dict(channels=(8, 16, 32, 64), depths=(1, 1, 1, 1))
    model = family(spec).eval()
    fused = switch_to_deploy(copy.deepcopy(model))
    with torch.no_grad():
        image = torch.randn(1, 3, *size)
        maps, others = model(image), fused(image)
    for index, (found, other) in enumerate(zip(maps, others, strict=True)):
        stride = 4 * 2**index
        assert found.shape == other.shape == (1, spec['channels'][index], *(-(-side // stride) for side in size))
        assert found.isfinite().all() and torch.allclose(found, other, rtol=1e-3, atol=1e-4)


def test_one_image_trains_where_its_maps_have_more_than_one_place() -> None:
    assert network()(torch.randn(1, 3, 32, 33))[-1].isfinite().all()
    assert network(norm_eval=True).train()(torch.randn(1, 3, 32, 32))[-1].isfinite().all()
    assert network()(torch.randn(2, 3, 32, 32))[-1].isfinite().all()
