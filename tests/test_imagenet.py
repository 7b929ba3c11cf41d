"""The test on ImageNet, where MMPretrain is installed: on a few images that were made for it."""

import importlib
import sys
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import FAMILIES, GOLDENS, imported
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image
from programs import TOOLS

from repvit_mm import FastViT, MobileOne, RepViT, imagenet
from repvit_mm.checkpoint import CheckpointError
from repvit_mm.normalization import MEAN, STD

sys.path.append(str(TOOLS))
reproduce = importlib.import_module('reproduce')


BY_NAME = {row.name: row for row in imagenet.RELEASED}


def test_released_classifiers():
    """Every variant that has a figure; the configs' backbones start from some of these files."""
    counts = {RepViT: 11, FastViT: 14, MobileOne: 5}
    assert len(BY_NAME) == len(imagenet.RELEASED) == 30
    assert len({row.weights for row in imagenet.RELEASED}) == len({row.file for row in imagenet.RELEASED}) == 30
    for family in FAMILIES:
        rows = [row for row in imagenet.RELEASED if row.backbone is family.cls]
        assert len(rows) == counts[family.cls]
        published = {(arch, figure) for arch, top1 in family.cls.top1.items() for figure in top1 if figure}
        assert published <= {(row.arch, row.top1) for row in rows}
        assert {row.arch for row in rows} == {arch for arch, _ in published}
        assert {family.weights(arch) for arch, _ in published} <= {row.weights for row in rows}
        assert all(urlsplit(row.weights).path.endswith(Path(row.file).name) for row in rows)


def test_classifiers_of_one_file_name_are_kept_apart(tmp_path, monkeypatch):
    """FastViT's distilled files have the names of the others."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    entries = reproduce.classifiers()
    fetched = []
    monkeypatch.setattr(reproduce, 'download', lambda address, folder: fetched.append((address, folder)))
    for name in ('fastvit_t8', 'fastvit_t8_distilled'):
        reproduce.fetch(entries[name], None)
        with pytest.raises(CheckpointError, match=f'not found; it is at {entries[name].weights}') as error:
            reproduce.fetch(entries[name], tmp_path)
        assert str(tmp_path / entries[name].file) in str(error.value)
    assert fetched == [
        (entries['fastvit_t8'].weights, str(tmp_path / 'hub/checkpoints')),
        (entries['fastvit_t8_distilled'].weights, str(tmp_path / 'hub/checkpoints/distilled')),
    ]


def test_data_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmpretrain', torch)  # any module will do
    with pytest.raises(imagenet.ImageNetError, match=r'val not found: ImageNet-1k from https://image-net\.org'):
        imagenet.check_needs(tmp_path)
    (tmp_path / 'val').mkdir()
    imagenet.check_needs(tmp_path)


@pytest.fixture
def mmpretrain(scope_restored: None) -> None:
    imported('mmpretrain.datasets', 'mmpretrain.evaluation', 'mmpretrain.models')


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


def as_the_authors(path: Path, size: int = 224, edge: int = 256, interpolation: str = 'bicubic') -> torch.Tensor:
    """An image as torchvision would resize and crop it, ``(1, 3, size, size)``, normalized. Resized by Pillow alone."""
    picture = Image.open(path).convert('RGB')
    scale = edge / min(picture.size)
    sides = [int(scale * side + 1e-9) for side in picture.size]
    picture = picture.resize(sides, Image.Resampling[interpolation.upper()])
    left, top = (round((side - size) / 2) for side in picture.size)
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)), dtype=np.float32)
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
    init_default_scope('mmpretrain')
    for name, size, edge, interpolation in (
        ('repvit_m0_6_distill_300e', 224, 256, 'bicubic'),
        ('fastvit_t8', 256, 284, 'bicubic'),
        ('fastvit_sa36_distilled', 256, 269, 'bicubic'),
        ('mobileone_s0', 224, 256, 'bilinear'),
    ):
        cfg = imagenet.test_config(BY_NAME[name], tmp_path, tmp_path / 'work')
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        preprocessor = MODELS.build(dict(type='ClsDataPreprocessor', **cfg.model.data_preprocessor))
        for index, path in enumerate(paths):
            sample = dataset[index]
            assert sample['data_samples'].gt_label.tolist() == [7 * index]
            batch = preprocessor(dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']]))
            expected = as_the_authors(path, size, edge, interpolation)
            torch.testing.assert_close(batch['inputs'], expected, rtol=0, atol=1e-6)


def test_file_without_a_part_of_a_classifier_is_refused(mmpretrain, released, tmp_path):
    write_images(tmp_path)
    (tmp_path / 'meta').mkdir()
    (tmp_path / 'meta/val.txt').write_text('0.png 3\n')
    tensors = torch.load(released)['model']
    del tensors['classifier.classifier_dist.bn.running_mean']
    torch.save({'model': tensors}, tmp_path / 'partial.pth')
    with pytest.raises(CheckpointError, match=r'partial\.pth does not fit RepViTHead .*: tensors missing: 1') as error:
        imagenet.measure_top1(
            BY_NAME['repvit_m0_6_distill_300e'], tmp_path / 'partial.pth', tmp_path, tmp_path / 'work'
        )
    assert '\n' not in str(error.value)


def test_labels_that_cannot_be_read(mmpretrain, released, tmp_path):
    """Folders for three classes are not ImageNet."""
    for name in 'abc':
        (tmp_path / 'val' / name).mkdir(parents=True)
    with pytest.raises(imagenet.ImageNetError, match=r'^the test on .* cannot run: .*1000') as error:
        imagenet.measure_top1(BY_NAME[released.stem], released, tmp_path, tmp_path / 'work')
    assert '\n' not in str(error.value)


@pytest.mark.slow
def test_from_end_to_end(mmpretrain, released, tmp_path, monkeypatch, capfd):
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
    monkeypatch.setenv('COLUMNS', '200')
    folders = ['--folder', str(released.parent), '--imagenet', str(data), '--work-dir', str(tmp_path / 'work')]
    with pytest.raises(SystemExit, match=f'^{released.stem}: top-1 is 75.00, published 74.1$'):
        reproduce.main([released.stem, *folders])
    said = capfd.readouterr().out
    (line,) = (line for line in said.splitlines() if line.startswith('│'))
    assert [cell.strip() for cell in line.strip('│').split('│')] == [
        released.stem, 'top-1', '74.1', '75.00', '+0.90', 'no',
    ]  # fmt: skip
    assert 'FuseOnDeployHook: fused' in said
