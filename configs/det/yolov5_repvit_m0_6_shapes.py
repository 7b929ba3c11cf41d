# YOLOv5 of MMYOLO in the demo's place of Mask R-CNN: from scratch, on the data set that tools/make_shapes.py draws.
_base_ = './yolov5_repvit_m0_9_8xb16-300e_coco.py'

metainfo = dict(
    classes=('circle', 'square', 'triangle', 'star', 'ring', 'cross'),
    palette=[(230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180)],
)
channels = [80, 160, 320]
model = dict(
    backbone=dict(arch='m0_6', init_cfg=None),
    neck=dict(in_channels=channels, out_channels=channels),
    bbox_head=dict(
        head_module=dict(in_channels=channels, num_classes=6),
        # YOLOv5's scaling by the number of classes and by the size of the images, which the base did for its own.
        loss_cls=dict(loss_weight=0.5 * 6 / 80),
        loss_obj=dict(loss_weight=(192 / 640) ** 2),
    ),
    test_cfg=dict(nms_pre=1000, max_per_img=20),
)

dataset = dict(data_root='data/shapes/coco/', metainfo=metainfo)
image_scale = (192, 192)
pre_transform = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
]
train_pipeline = [
    *pre_transform,
    dict(type='Mosaic', img_scale=image_scale, pad_val=114.0, pre_transform=pre_transform),
    dict(
        type='YOLOv5RandomAffine',
        max_rotate_degree=0.0,
        max_shear_degree=0.0,
        scaling_ratio_range=(0.5, 1.5),
        border=(-image_scale[0] // 2, -image_scale[1] // 2),
        border_val=(114, 114, 114),
    ),
    dict(type='mmdet.RandomFlip', prob=0.5),
    dict(
        type='mmdet.PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'flip', 'flip_direction'),
    ),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='YOLOv5KeepRatioResize', scale=image_scale),
    dict(type='LetterResize', scale=image_scale, allow_scale_up=False, pad_val=dict(img=114)),
    dict(type='LoadAnnotations', with_bbox=True, _scope_='mmdet'),
    dict(
        type='mmdet.PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'pad_param'),
    ),
]
train_dataloader = dict(batch_size=8, num_workers=2, pin_memory=False, dataset=dict(dataset, pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=2, pin_memory=False, dataset=dict(dataset, pipeline=test_pipeline, batch_shapes_cfg=dict(img_size=192))
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/shapes/coco/annotations/instances_val2017.json')
test_evaluator = val_evaluator

max_epochs = 15
train_cfg = dict(max_epochs=max_epochs, val_interval=5)
# Averages of weights over thousands of iterations, and a warm-up of a thousand, have no place here.
custom_hooks = []
default_hooks = dict(
    param_scheduler=dict(_delete_=True, type='ParamSchedulerHook', _scope_='mmengine'), checkpoint=dict(interval=5)
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    _scope_='mmengine',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
)
param_scheduler = [
    dict(type='LinearLR', _scope_='mmengine', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR',
        _scope_='mmengine',
        eta_min=1e-5,
        by_epoch=True,
        begin=0,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
