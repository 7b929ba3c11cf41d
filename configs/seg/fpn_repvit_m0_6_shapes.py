# The demo: Semantic FPN with a lean head, from scratch, on the data set that tools/make_shapes.py draws.
_base_ = '../_base_/fpn_repvit_ade20k_40k.py'

metainfo = dict(
    classes=('background', 'circle', 'square', 'triangle', 'star', 'ring', 'cross'),
    palette=[
        (96, 96, 96),
        (230, 25, 75),
        (60, 180, 75),
        (255, 225, 25),
        (0, 130, 200),
        (245, 130, 48),
        (145, 30, 180),
    ],
)
image_scale = (192, 192)
model = dict(
    data_preprocessor=dict(size=image_scale),
    backbone=dict(arch='m0_6', norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[40, 80, 160, 320], out_channels=96),
    decode_head=dict(in_channels=[96, 96, 96, 96], channels=64, num_classes=7),
)

# ADE20KDataset insists on ADE20K's classes.
dataset = dict(
    type='BaseSegDataset',
    data_root='data/shapes/ade/ADEChallengeData2016',
    metainfo=metainfo,
    reduce_zero_label=True,
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=8, num_workers=2, dataset=dict(dataset, pipeline=train_pipeline))
val_dataloader = dict(num_workers=2, dataset=dict(dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader

max_iters = 450
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=max_iters))
optimizer = dict(lr=1e-3)
optim_wrapper = dict(optimizer=optimizer)
param_scheduler = [
    dict(type='LinearLR', _scope_='mmengine', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', _scope_='mmengine', power=0.9, eta_min=1e-5, begin=0, end=max_iters, by_epoch=False),
]
