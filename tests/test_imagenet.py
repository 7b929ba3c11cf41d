"""The test on ImageNet, where MMPretrain can be imported: on a few images that were made for it."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDENS, imported
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from programs import launch

from repvit_mm import RepViT, imagenet
from repvit_mm.checkpoint import CheckpointError
from repvit_mm.deploy.load import build_model
from repvit_mm.normalization import MEAN, STD
from repvit_mm.specs import REPVIT_TOP1


def test_released_classifiers():
    """Every variant of the paper's second version at 300 epochs, with the figure that stands in the specs too."""
    assert {row.arch: row.top1 for row in imagenet.RELEASED if row.epochs == 300} == {
        arch: top1.distilled for arch, top1 in REPVIT_TOP1.items()
    }
    assert len({row.weights for row in imagenet.RELEASED}) == len(imagenet.RELEASED) == 11


def test_data_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmpretrain', torch)  # any module will do
    with pytest.raises(imagenet.ImageNetError, match=r'val not found: ImageNet-1k from https://image-net\.org'):
        imagenet.check_needs(tmp_path)
    (tmp_path / 'val').mkdir()
    imagenet.check_needs(tmp_path)


@pytest.fixture
def mmpretrain(scope_restored: None) -> None:
    imported('mmpretrain')


def write_images(data: Path) -> list[Path]:
    """Photographs' like: smooth, of several sizes, upright and not."""
    generator = np.random.default_rng(0)
    paths = []
    for index, (width, height) in enumerate([(500, 375), (333, 500), (300, 280), (260, 700)]):
        coarse = generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        path = data / 'val' / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR).save(path)
        paths.append(path)
    return paths


def as_the_authors(path: Path) -> torch.Tensor:
    """An image as torchvision would resize and crop it, ``(1, 3, 224, 224)``, normalized. Resized by Pillow alone."""
    picture = Image.open(path).convert('RGB')
    scale = 256 / min(picture.size)
    picture = picture.resize([int(scale * side + 1e-9) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = (round((side - 224) / 2) for side in picture.size)
    pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), dtype=np.float32)
    return torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)[None]


def scores(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """Those of either classifier, written out, behind an unfused backbone."""
    network = RepViT('m0_6', out_indices=(3,)).eval()
    network.load_state_dict(tensors)
    with torch.no_grad():
        pooled = network(x)[-1].mean((2, 3))
    found = []
    for name in ('classifier.classifier', 'classifier.classifier_dist'):
        parts = {key: tensors[f'{name}.{key}'].float() for key in ('l.weight', 'l.bias', 'bn.weight', 'bn.bias')}
        statistics = (tensors[f'{name}.bn.running_{key}'].float() for key in ('mean', 'var'))
        normalized = F.batch_norm(pooled, *statistics, parts['bn.weight'], parts['bn.bias'])
        found.append(F.linear(normalized, parts['l.weight'], parts['l.bias']))
    return found


@pytest.fixture(scope='module')
def released(tmp_path_factory) -> Path:
    """A file with the authors' names, and weights that answer differently to different images."""
    (golden,) = (golden for golden in GOLDENS if golden.name == 'repvit_m0_6')
    path = tmp_path_factory.mktemp('released') / 'repvit_m0_6_distill_300e.pth'
    torch.save({'model': golden.state_dict()}, path)
    return path


def test_images_are_those_of_the_authors(mmpretrain, tmp_path):
    """To the last bit, with labels from a list."""
    paths = write_images(tmp_path)
    (tmp_path / 'meta').mkdir()
    (tmp_path / 'meta/val.txt').write_text(''.join(f'{path.name} {7 * n}\n' for n, path in enumerate(paths)))
    importlib.import_module('repvit_mm.pretrain')
    cfg = imagenet.test_config('m0_6', tmp_path, tmp_path / 'work')
    init_default_scope('mmpretrain')
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    preprocessor = build_model(cfg).data_preprocessor
    for index, path in enumerate(paths):
        sample = dataset[index]
        assert sample['data_samples'].gt_label.tolist() == [7 * index]
        batch = preprocessor(dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']]))
        torch.testing.assert_close(batch['inputs'], as_the_authors(path), rtol=0, atol=1e-6)


@pytest.mark.parametrize('lost', ['classifier.classifier.l.bias', 'classifier.classifier_dist.bn.running_mean'])
def test_file_without_a_part_of_a_classifier_is_refused(mmpretrain, released, tmp_path, lost):
    write_images(tmp_path)
    (tmp_path / 'meta').mkdir()
    (tmp_path / 'meta/val.txt').write_text('0.png 3\n')
    tensors = torch.load(released)['model']
    del tensors[lost]
    torch.save({'model': tensors}, tmp_path / 'partial.pth')
    with pytest.raises(CheckpointError, match=r'partial\.pth does not hold both classifiers: .*classifiers\.') as error:
        imagenet.measure_top1('m0_6', tmp_path / 'partial.pth', tmp_path, tmp_path / 'work')
    assert '\n' not in str(error.value)


def test_labels_that_cannot_be_read(mmpretrain, released, tmp_path):
    """Folders for three classes are not ImageNet."""
    for name in 'abc':
        (tmp_path / 'val' / name).mkdir(parents=True)
    with pytest.raises(imagenet.ImageNetError, match=r'^the test on .* cannot run: .*1000') as error:
        imagenet.measure_top1('m0_6', released, tmp_path, tmp_path / 'work')
    assert '\n' not in str(error.value)


@pytest.mark.slow
def test_from_end_to_end(mmpretrain, released, tmp_path):
    """The labels are what the mean of both classifiers answers, but for one image of four: 75 percent are right."""
    tensors = torch.load(released)['model']
    data = tmp_path / 'data/imagenet'
    paths = write_images(data)
    both = [scores(tensors, as_the_authors(path)) for path in paths]
    labels = [int(sum(pair).argmax()) for pair in both]
    for alone in zip(*both, strict=True):
        assert [int(score.argmax()) for score in alone] != labels
    labels[1] = (labels[1] + 1) % 1000
    (data / 'meta').mkdir()
    (data / 'meta/val.txt').write_text(
        ''.join(f'{path.name} {label}\n' for path, label in zip(paths, labels, strict=True))
    )
    done = launch(tmp_path, 'reproduce.py', released.stem, '--folder', released.parent, COLUMNS='200')
    assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr[-3000:]
    assert done.stderr.splitlines()[-1] == f'{released.stem}: top-1 is 75.00, published 74.1'
    (line,) = (line for line in done.stdout.splitlines() if line.startswith('│'))
    assert [cell.strip() for cell in line.strip('│').split('│')] == [
        released.stem, 'top-1', '74.1', '75.00', '+0.90', 'no',
    ]  # fmt: skip
    assert 'FuseOnDeployHook: fused' in done.stdout
