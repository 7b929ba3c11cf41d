# Semantic FPN with RepViT-M0.9 on data of your own: a folder of images, and one of PNGs with a class index in each
# pixel. Copy this file, change what stands above the line, and look at your data with tools/check_data.py before you
# train: docs/custom_data.md. The schedule is ours.
_base_ = './fpn_repvit_m0_9_ade20k_40k.py'

data_root = 'data/custom'
train = dict(img_path='images/train', seg_map_path='labels/train')
val = dict(img_path='images/val', seg_map_path='labels/val')
img_suffix, seg_map_suffix = '.jpg', '.png'
# Class 0, class 1, ... and the colours to draw them in.
classes = ('background', 'road', 'sky')
palette = [[96, 96, 96], [128, 64, 128], [70, 130, 180]]
# The value of a pixel that belongs to no class. It is neither learned from nor counted.
void = 255
# Iterations of batch_size images; a CPU takes 2.
max_iters, batch_size = 3000, 8
# Width and height of what is learned from. Test images are resized to its shorter side.
crop = (512, 512)
# Whether BatchNorm of the backbone keeps ImageNet's statistics: docs/custom_data.md says when it should not.
frozen_statistics = True
# ---------------------------------------------------------------------------------------------------------------------

image_scale = (4 * max(crop), min(crop))
model = dict(
    data_preprocessor=dict(size=crop[::-1], seg_pad_val=void),
    backbone=dict(norm_eval=frozen_statistics),
    decode_head=dict(num_classes=len(classes), ignore_index=void),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=image_scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop[::-1], cat_max_ratio=0.75, ignore_index=void),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    _delete_=True,
    type='BaseSegDataset',
    _scope_='mmseg',
    data_root=data_root,
    metainfo=dict(classes=classes, palette=palette),
    img_suffix=img_suffix,
    seg_map_suffix=seg_map_suffix,
)
train_dataloader = dict(batch_size=batch_size, dataset=dict(dataset, data_prefix=train, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(dataset, data_prefix=val, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ignore_index=void)
test_evaluator = val_evaluator

train_cfg = dict(max_iters=max_iters, val_interval=max(1, max_iters // 6))
# The recipe's 2e-4 for 32 images a step, by the square root of the batch, as suits Adam.
optimizer = dict(lr=2e-4 * (batch_size / 32) ** 0.5)
optim_wrapper = dict(optimizer=optimizer)
param_scheduler = [
    dict(type='LinearLR', _scope_='mmengine', start_factor=1e-3, by_epoch=False, begin=0, end=max(2, max_iters // 10)),
    dict(
        type='PolyLR',
        _scope_='mmengine',
        power=0.9,
        eta_min=1e-6,
        by_epoch=False,
        begin=max(2, max_iters // 10),
        end=max_iters,
    ),
]
auto_scale_lr = dict(base_batch_size=batch_size)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=max(1, max_iters // 6), max_keep_ckpts=2, save_best='mIoU'),
)
