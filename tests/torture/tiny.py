"""A detector and a segmentor so small that a training run of theirs takes seconds, on a few shapes."""

from pathlib import Path

import torch
from mmengine.config import Config
from test_tools import DETECTION, SEGMENTATION

from repvit_mm.datasets.shapes import write_shapes
from repvit_mm.deploy.load import build_model

TRAINING = 8
"""Images to train on; half as many are for validation."""

COMMON = """
custom_imports = dict(imports=['repvit_mm', 'repvit_mm.resume'])
arch = dict(channels=(8, 16, 24, 32), depths=(1, 1, 1, 1))
backbone = dict(_delete_=True, type='RepViT', arch=arch, drop_path_rate=0.2)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=2, **loader)
val_dataloader = loader
test_dataloader = loader
image_scale = (64, 64)
"""

CONFIGS = {
    'det': f"""
_base_ = '{DETECTION}'
{COMMON}
model = dict(
    backbone=backbone,
    neck=dict(in_channels=[8, 16, 24, 32], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1),
    ),
)
default_hooks = dict(checkpoint=dict(type='ResumableCheckpointHook'), logger=dict(interval=4))
train_cfg = dict(max_epochs=3, val_interval=3)
""",
    'seg': f"""
_base_ = '{SEGMENTATION}'
{COMMON}
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=backbone,
    neck=dict(in_channels=[8, 16, 24, 32], out_channels=16),
    decode_head=dict(in_channels=[16] * 4, channels=8),
)
default_hooks = dict(checkpoint=dict(type='ResumableCheckpointHook', interval=4), logger=dict(interval=4))
train_cfg = dict(type='ResumableIterBasedTrainLoop', max_iters=12, val_interval=12)
""",
}
LAST = {'det': 'epoch_3.pth', 'seg': 'iter_12.pth'}
"""What a run ends with: 12 iterations, after every fourth of which it saves."""

COCO = 'data/shapes/coco'
ADE = 'data/shapes/ade/ADEChallengeData2016'


def write_tiny(folder: Path) -> Path:
    """Write the data and the configs ``det.py`` and ``seg.py``, which find it, into a folder."""
    write_shapes(folder / 'data/shapes', train=TRAINING, val=TRAINING // 2, size=64, seed=0)
    for task, text in CONFIGS.items():
        (folder / f'{task}.py').write_text(text)
    return folder


def write_checkpoints(folder: Path) -> None:
    """Write ``det.pth`` and ``seg.pth`` beside the configs, with random weights."""
    for task in CONFIGS:
        torch.manual_seed(0)
        model = build_model(Config.fromfile(folder / f'{task}.py'))
        torch.save({'state_dict': model.state_dict(), 'meta': {}}, folder / f'{task}.pth')
