"""The classifiers that RepViT's authors released, and what they reach on ImageNet-1k with MMPretrain.

MMPretrain is optional: only :func:`measure_top1` needs it.
"""

import importlib
import os
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

from .checkpoint import CheckpointError, read_checkpoint, tensors_of
from .messages import one_line
from .normalization import MEAN, STD
from .repvit import RepViT

SIZE = 224
CROP = 0.875
"""Side of the test images in pixels, and what it is of the shorter edge before the crop: 256 pixels."""


class ImageNetError(RuntimeError):
    """The accuracy cannot be measured; the message is one line that says what is missing or wrong."""


@dataclass(frozen=True)
class Classifier:
    """A released RepViT with its classifiers.

    Args:
        arch: The variant.
        epochs: How long it was trained, with a teacher.
        top1: The published accuracy on ImageNet-1k, in percent.
    """

    arch: str
    epochs: int
    top1: float

    @property
    def name(self) -> str:
        return f'repvit_{self.arch}_distill_{self.epochs}e'

    @property
    def weights(self) -> str:
        """The address of its checkpoint."""
        return f'https://github.com/THU-MIG/RepViT/releases/download/v1.0/{self.name}.pth'


# Source: the README of https://github.com/THU-MIG/RepViT.
RELEASED = (
    Classifier('m0_6', 300, 74.1),
    Classifier('m0_9', 300, 78.7),
    Classifier('m0_9', 450, 79.1),
    Classifier('m1_0', 300, 80.0),
    Classifier('m1_0', 450, 80.3),
    Classifier('m1_1', 300, 80.7),
    Classifier('m1_1', 450, 81.2),
    Classifier('m1_5', 300, 82.3),
    Classifier('m1_5', 450, 82.5),
    Classifier('m2_3', 300, 83.3),
    Classifier('m2_3', 450, 83.7),
)


def check_needs(data: Path) -> None:
    """Check that MMPretrain and ImageNet's validation images are there.

    Args:
        data: ImageNet's folder.

    Raises:
        ImageNetError: if one of the two is not.
    """
    try:
        importlib.import_module('mmpretrain')
    except Exception as error:  # one of its own needs may be built for another torch, say
        raise ImageNetError(
            f'MMPretrain cannot be imported ({one_line(error, 120)}): pip install mmpretrain==1.2.0'
        ) from None
    if not (data / 'val').is_dir():
        raise ImageNetError(
            f'{data / "val"} not found: ImageNet-1k from https://image-net.org belongs there, its validation images in '
            f'a folder for each class, or with their labels in {data / "meta/val.txt"}'
        )


def test_config(arch: str, data: Path, work_dir: Path) -> Config:
    """The test of a RepViT with its classifiers on ImageNet's validation images, as the authors resize and crop them.

    Source: https://github.com/THU-MIG/RepViT, data/datasets.py.

    Args:
        arch: The variant.
        data: ImageNet's folder.
        work_dir: Folder for logs.
    """
    pipeline = [
        dict(type='LoadImageFromFile', imdecode_backend='pillow'),
        # Pillow smooths what it makes smaller, OpenCV does not.
        dict(type='ResizeEdge', scale=int(SIZE / CROP), edge='short', backend='pillow', interpolation='bicubic'),
        dict(type='CenterCrop', crop_size=SIZE),
        dict(type='PackInputs'),
    ]
    return Config(
        dict(
            default_scope='mmpretrain',
            work_dir=str(work_dir),
            experiment_name=f'{work_dir.name}_imagenet',
            custom_hooks=[dict(type='FuseOnDeployHook')],
            model=dict(
                type='ImageClassifier',
                data_preprocessor=dict(mean=MEAN, std=STD, to_rgb=True, num_classes=1000),
                backbone=dict(type='RepViT', arch=arch, out_indices=(3,)),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='RepViTHead', num_classes=1000, in_channels=RepViT.specs[arch].channels[-1]),
            ),
            test_dataloader=dict(
                batch_size=64,
                num_workers=min(8, os.cpu_count() or 1),
                dataset=dict(type='ImageNet', data_root=str(data), split='val', pipeline=pipeline),
                sampler=dict(type='DefaultSampler', shuffle=False),
            ),
            test_cfg=dict(),
            test_evaluator=dict(type='Accuracy', topk=(1,)),
        )
    )


def measure_top1(arch: str, checkpoint: Path, data: Path, work_dir: Path) -> float:
    """Top-1 accuracy of a RepViT, fused, with the mean of its classifiers, in percent.

    Args:
        arch: The variant.
        checkpoint: The authors' file, or timm's.
        data: ImageNet's folder.
        work_dir: Folder for logs.

    Raises:
        CheckpointError: if the file cannot be read or does not hold the whole network, its classifiers included.
        ImageNetError: if the test cannot run.
    """
    check_needs(data)
    tensors = tensors_of(read_checkpoint(checkpoint))
    try:
        importlib.import_module(f'{__package__}.pretrain')
        runner = Runner.from_cfg(test_config(arch, data, work_dir))
        model = runner.model
        runner.test_loop  # noqa: B018  the runner reads the data as it is first asked for
    except Exception as error:  # folders and labels can be wrong in many ways
        raise ImageNetError(f'the test on {data} cannot run: {one_line(error)}') from error
    model.backbone.load_state_dict(tensors)
    try:
        model.head.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f'checkpoint {checkpoint} does not hold both classifiers: {one_line(error, 300)}'
        ) from None
    return runner.test()['accuracy/top1']
