# Mask R-CNN with RepViT-M0.9 on data of your own in COCO's format. Copy this file, change what stands above the line,
# and look at your data with tools/check_data.py before you train: docs/custom_data.md. The schedule is ours.
_base_ = './mask_rcnn_repvit_m0_9_fpn_1x_coco.py'

data_root = 'data/custom/'
train = dict(ann_file='annotations/train.json', data_prefix=dict(img='train/'))
val = dict(ann_file='annotations/val.json', data_prefix=dict(img='val/'))
# As the annotation files name them, in their order. One class needs its comma: ('cat',)
classes = ('cat', 'dog')
# Iterations of batch_size images; 4 images take a GPU of 8 GB, a CPU takes 2.
max_iters, batch_size = 3000, 4
# Longer and shorter side in pixels. Smaller images are enlarged: leave it so where the objects are small.
image_scale = (1024, 640)
# Whether BatchNorm keeps ImageNet's statistics: docs/custom_data.md says when it should not.
frozen_statistics = True
# ---------------------------------------------------------------------------------------------------------------------

model = dict(
    backbone=dict(norm_eval=frozen_statistics),
    roi_head=dict(bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', scale=image_scale, ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    # A box that resizing leaves less than a pixel of has an infinite regression loss.
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
dataset = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(
    batch_size=batch_size,
    sampler=dict(type='InfiniteSampler'),
    # COCO's min_size=32 would leave small images out.
    dataset=dict(dataset, **train, pipeline=train_pipeline, filter_cfg=dict(filter_empty_gt=True, min_size=1)),
)
val_dataloader = dict(dataset=dict(dataset, **val, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + val['ann_file'], classwise=True)
test_evaluator = val_evaluator

train_cfg = dict(
    _delete_=True,
    type='ResumableIterBasedTrainLoop',
    _scope_='mmengine',
    max_iters=max_iters,
    val_interval=max(1, max_iters // 6),
)
# The recipe's 2e-4 for 16 images a step, by the square root of the batch, as suits Adam.
optim_wrapper = dict(optimizer=dict(lr=2e-4 * (batch_size / 16) ** 0.5))
param_scheduler = [
    dict(type='LinearLR', _scope_='mmengine', start_factor=1e-3, by_epoch=False, begin=0, end=max(2, max_iters // 10)),
    dict(
        type='CosineAnnealingLR',
        _scope_='mmengine',
        eta_min_ratio=0.01,
        by_epoch=False,
        begin=max(2, max_iters // 10),
        end=max_iters,
    ),
]
auto_scale_lr = dict(base_batch_size=batch_size)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=max(1, max_iters // 6), max_keep_ckpts=2, save_best='coco/segm_mAP'),
)
log_processor = dict(by_epoch=False)
