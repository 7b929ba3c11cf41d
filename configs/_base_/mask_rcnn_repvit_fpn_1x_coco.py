# Mask R-CNN with RepViT on COCO-2017, 1x: the recipe behind the authors' released detectors
# (https://github.com/THU-MIG/RepViT, detection/). 8 GPUs x 2 images.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['repvit_mm'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='RepViT',
        # The released weights were trained with stages 0 to 2 tapped one block before their end.
        tap='pre_downsample',
        # Statistics frozen; weights and biases of the norms still learn.
        norm_eval=True,
        init_cfg=dict(type='Pretrained'),
    ),
)

# A run that is killed at any moment goes on with --resume as if it had not been.
default_hooks = dict(checkpoint=dict(type='ResumableCheckpointHook'))

# Decay applies to every parameter, norms and biases too; gradients are not clipped.
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, weight_decay=0.05))
# The scope keeps the schedulers MMEngine's own where this file is a base by its installed name, repvit_mm::...
param_scheduler = [
    # mmcv 1.x divides its 500 warm-up iterations by 500, LinearLR by end - begin - 1.
    dict(type='LinearLR', _scope_='mmengine', start_factor=1e-6, by_epoch=False, begin=0, end=501),
    dict(type='MultiStepLR', _scope_='mmengine', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
