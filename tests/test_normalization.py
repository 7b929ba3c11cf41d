"""A pretrained backbone behind other images than ImageNet's is warned of, with every launcher, in one line."""

import importlib

import pytest
from existing_configs import MMYOLO, ROWS, Row
from helpers import SMALL
from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor, BaseModel, ImgDataPreprocessor
from mmengine.registry import MODELS
from torch import nn

from repvit_mm.normalization import MEAN, STD, fed

IMAGENET = dict(mean=list(MEAN), std=list(STD), bgr_to_rgb=True)
PRETRAINED = dict(type='Pretrained', checkpoint='backbone.pth')


def warnings(log: list[str]) -> list[str]:
    return [line for line in log if 'pretrained weights expect' in line]


class Model(BaseModel):
    """Builds its parts as detectors do."""

    def __init__(self, preprocessor: nn.Module | None, backbone: dict) -> None:
        super().__init__(data_preprocessor=preprocessor)
        self.backbone = MODELS.build(backbone)

    def forward(self) -> None:
        """Never called."""


def build(preprocessor: nn.Module | None, init_cfg: dict | list | None = PRETRAINED, kind: str = 'repvit') -> Model:
    cls, arch = SMALL[kind]
    return Model(preprocessor, dict(type=cls.__name__, arch=arch, init_cfg=init_cfg))


@pytest.mark.parametrize('kind', SMALL)
def test_imagenet_is_silent(kind, log):
    build(ImgDataPreprocessor(**IMAGENET), kind=kind)
    build(ImgDataPreprocessor(**IMAGENET | dict(mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4])), kind=kind)
    assert warnings(log) == []


@pytest.mark.parametrize('kind', SMALL)
@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({}, 'BGR from 0 to 255'),
        (dict(bgr_to_rgb=True), 'RGB from 0 to 255'),
        (IMAGENET | dict(bgr_to_rgb=False), 'BGR normalized with mean=[123.675, 116.28, 103.53]'),
        (
            dict(mean=list(MEAN[::-1]), std=list(STD[::-1])),
            'BGR normalized with mean=[103.53, 116.28, 123.675], std=[57.375, 57.12, 58.395]',
        ),
        (dict(mean=[0, 0, 0], std=[255, 255, 255], bgr_to_rgb=True), 'RGB from 0 to 1,'),
        (IMAGENET | dict(std=[1, 1, 1]), 'RGB normalized with mean=[123.675, 116.28, 103.53], std=[1.0, 1.0, 1.0]'),
        (dict(mean=[127.5], std=[127.5], bgr_to_rgb=True), 'RGB normalized with mean=[127.5], std=[127.5]'),
    ],
    ids=str,
)
def test_anything_else_is_one_line(kind, options, words, log):
    build(ImgDataPreprocessor(**options), kind=kind)
    (line,) = warnings(log)
    assert words in line and SMALL[kind][0].__name__ in line and '\n' not in line
    assert 'mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True' in line


def test_weights_among_several_initializations_are_seen(log):
    build(ImgDataPreprocessor(), [dict(type='Kaiming', layer='Conv2d'), PRETRAINED])
    assert len(warnings(log)) == 1


def test_from_scratch_is_silent(log):
    build(ImgDataPreprocessor(), None)
    build(ImgDataPreprocessor(), dict(type='Kaiming', layer='Conv2d'))
    assert warnings(log) == []


def test_normalization_elsewhere_is_not_guessed(log):
    build(BaseDataPreprocessor())
    build(None)
    nn.Sequential(MODELS.build(dict(type='RepViT', arch=SMALL['repvit'][1], init_cfg=PRETRAINED)))
    assert warnings(log) == []


@pytest.mark.needs_ops
@pytest.mark.parametrize(
    'base', ['mmdet::yolox/yolox_s_8xb8-300e_coco.py', 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py']
)
def test_bases_that_feed_something_else_are_seen(base):
    assert fed(preprocessor_of(Config.fromstring(f"_base_ = '{base}'", '.py'))).startswith('BGR')


@pytest.mark.needs_ops
@pytest.mark.parametrize('row', MMYOLO, ids=lambda row: row.name)
def test_bases_of_mmyolo_are_seen(row):
    pytest.importorskip('mmyolo', reason='MMYOLO, which needs mmcv below 2.1, is not installed')
    expected = 'BGR normalized with' if 'rtmdet' in row.base else 'RGB from 0 to 1'
    assert fed(preprocessor_of(Config.fromstring(f"_base_ = '{row.base}'", '.py'))).startswith(expected)


@pytest.mark.needs_ops
@pytest.mark.parametrize('row', ROWS, ids=lambda row: row.name)
def test_documented_configs_feed_what_weights_expect(row: Row):
    if 'mmyolo' in row.needs:
        pytest.importorskip('mmyolo', reason='MMYOLO, which needs mmcv below 2.1, is not installed')
    assert fed(preprocessor_of(row.config())) is None


def preprocessor_of(cfg: Config) -> nn.Module:
    importlib.import_module(f'{cfg.default_scope}.models')
    settings = dict(cfg.model.data_preprocessor, batch_augments=None)
    return MODELS.build(dict(settings, type=f'{cfg.default_scope}.{settings["type"]}'))
