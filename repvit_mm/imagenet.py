"""The classifiers that the authors released, and what they reach on ImageNet-1k with MMPretrain.

MMPretrain is optional: only :func:`measure_top1` needs it.
"""

import importlib
import os
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

from .backbone import ReparamBackbone
from .checkpoint import read_checkpoint, tensors_of
from .fastvit import FastViT
from .messages import one_line
from .mobileone import MobileOne
from .normalization import MEAN, STD
from .repvit import RepViT


class ImageNetError(RuntimeError):
    """The accuracy cannot be measured; the message is one line that says what is missing or wrong."""


@dataclass(frozen=True)
class Classifier:
    """A released backbone with its classification head.

    Args:
        name: A name for it.
        backbone: The class of its backbone.
        arch: The variant.
        weights: The address of its checkpoint.
        top1: The published accuracy on ImageNet-1k, in percent.
        size: Side of the test images in pixels.
        crop: What that is of the shorter edge before the crop.
        interpolation: How the images are resized.
        folder: Folder that tells its file from another one of the same name.
    """

    name: str
    backbone: type[ReparamBackbone]
    arch: str
    weights: str
    top1: float
    size: int = 224
    crop: float = 0.875
    interpolation: str = 'bicubic'
    folder: str = ''

    @property
    def file(self) -> str:
        """Where the checkpoint lies below a folder of checkpoints."""
        return str(Path(self.folder, self.weights.rpartition('/')[2]))


def repvit(arch: str, epochs: int, top1: float) -> Classifier:
    """A RepViT that was trained with a teacher for so many epochs."""
    name = f'repvit_{arch}_distill_{epochs}e'
    return Classifier(name, RepViT, arch, f'https://github.com/THU-MIG/RepViT/releases/download/v1.0/{name}.pth', top1)


def fastvit(arch: str, distilled: bool, top1: float) -> Classifier:
    """A FastViT that was trained on the labels alone, or with a teacher."""
    folder = f'image_classification_{"distilled_" if distilled else ""}models'
    return Classifier(
        f'fastvit_{arch}{"_distilled" if distilled else ""}',
        FastViT,
        arch,
        f'https://docs-assets.developer.apple.com/ml-research/models/fastvit/{folder}/fastvit_{arch}.pth.tar',
        top1,
        size=256,
        crop=0.95 if arch in ('sa36', 'ma36') else 0.9,
        folder='distilled' if distilled else '',
    )


def mobileone(arch: str, top1: float) -> Classifier:
    """A MobileOne."""
    return Classifier(
        f'mobileone_{arch}',
        MobileOne,
        arch,
        f'https://docs-assets.developer.apple.com/ml-research/datasets/mobileone/mobileone_{arch}_unfused.pth.tar',
        top1,
        interpolation='bilinear',
    )


# Sources: the README and data/datasets.py of https://github.com/THU-MIG/RepViT; the README and the default_cfgs of
# models/fastvit.py in https://github.com/apple/ml-fastvit; the README of https://github.com/apple/ml-mobileone, and
# for its test images projects/mobileone/classification/mobileone_s1_in1k.yaml in https://github.com/apple/corenet.
RELEASED = (
    repvit('m0_6', 300, 74.1),
    repvit('m0_9', 300, 78.7),
    repvit('m0_9', 450, 79.1),
    repvit('m1_0', 300, 80.0),
    repvit('m1_0', 450, 80.3),
    repvit('m1_1', 300, 80.7),
    repvit('m1_1', 450, 81.2),
    repvit('m1_5', 300, 82.3),
    repvit('m1_5', 450, 82.5),
    repvit('m2_3', 300, 83.3),
    repvit('m2_3', 450, 83.7),
    *(fastvit(arch, False, top1.plain) for arch, top1 in FastViT.top1.items()),
    *(fastvit(arch, True, top1.distilled) for arch, top1 in FastViT.top1.items()),
    *(mobileone(arch, top1.plain) for arch, top1 in MobileOne.top1.items()),
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
            f'MMPretrain cannot be imported ({one_line(error, 120)}): pip install mmpretrain==1.2.0, and the '
            'torchvision that was built for your torch'
        ) from None
    if not (data / 'val').is_dir():
        raise ImageNetError(
            f'{data / "val"} not found: ImageNet-1k from https://image-net.org belongs there, its validation images in '
            f'a folder for each class, or with their labels in {data / "meta/val.txt"}'
        )


def test_config(classifier: Classifier, data: Path, work_dir: Path) -> Config:
    """The test of a released classifier on ImageNet's validation images, resized and cropped as its authors do it.

    Args:
        classifier: The classifier.
        data: ImageNet's folder.
        work_dir: Folder for logs.
    """
    name, spec = classifier.backbone.__name__, classifier.backbone.specs[classifier.arch]
    pipeline = [
        dict(type='LoadImageFromFile', imdecode_backend='pillow'),
        # Pillow smooths what it makes smaller, OpenCV does not.
        dict(
            type='ResizeEdge',
            scale=int(classifier.size / classifier.crop),
            edge='short',
            backend='pillow',
            interpolation=classifier.interpolation,
        ),
        dict(type='CenterCrop', crop_size=classifier.size),
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
                backbone=dict(type=f'mmengine.{name}', arch=classifier.arch, out_indices=(3,)),
                head=dict(type=f'{name}Head', num_classes=1000, in_channels=spec.channels[-1]),
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


def measure_top1(classifier: Classifier, checkpoint: Path, data: Path, work_dir: Path) -> float:
    """Top-1 accuracy of a released classifier, fused, in percent.

    Args:
        classifier: The classifier.
        checkpoint: The authors' file, or timm's.
        data: ImageNet's folder.
        work_dir: Folder for logs.

    Raises:
        CheckpointError: if the file cannot be read or does not hold the whole network, its head included.
        ImageNetError: if the test cannot run.
    """
    check_needs(data)
    tensors = tensors_of(read_checkpoint(checkpoint))
    try:
        importlib.import_module(f'{__package__}.pretrain')
        runner = Runner.from_cfg(test_config(classifier, data, work_dir))
        model = runner.model
        runner.test_loop  # noqa: B018  the runner reads the data as it is first asked for
    except Exception as error:  # folders and labels can be wrong in many ways
        raise ImageNetError(f'the test on {data} cannot run: {one_line(error)}') from error
    model.backbone.load_state_dict(tensors)
    model.head.load_state_dict(tensors)
    return runner.test()['accuracy/top1']
