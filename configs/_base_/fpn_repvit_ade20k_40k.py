# Semantic FPN with RepViT on ADE20K, 40k iterations: the recipe behind the authors' released segmentors
# (https://github.com/THU-MIG/RepViT, segmentation/). 8 GPUs x 4 images.
_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/schedules/schedule_40k.py',
    'mmseg::_base_/default_runtime.py',
]
custom_imports = dict(imports=['repvit_mm'])

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='RepViT',
        # Statistics frozen; weights and biases of the norms still learn.
        norm_eval=True,
        init_cfg=dict(type='Pretrained'),
    ),
    decode_head=dict(num_classes=150),
)

# Each side goes up to a multiple of 32 before the label map is loaded: the ground truth keeps its size.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# A run that is killed at any moment goes on with --resume as if it had not been.
default_hooks = dict(checkpoint=dict(type='ResumableCheckpointHook'))
train_cfg = dict(type='ResumableIterBasedTrainLoop')

# Decay applies to every parameter.
optimizer = dict(_delete_=True, type='AdamW', lr=2e-4, weight_decay=1e-4)
optim_wrapper = dict(optimizer=optimizer)
# The scope keeps the scheduler MMEngine's own where this file is a base by its installed name, repvit_mm::...
# mmcv 1.x divides by the 40000 iterations, PolyLR by end - begin - 1.
param_scheduler = [dict(type='PolyLR', _scope_='mmengine', power=0.9, eta_min=1e-6, begin=0, end=40001, by_epoch=False)]
auto_scale_lr = dict(enable=False, base_batch_size=32)
