auto_scale_lr = dict(base_batch_size=32, enable=False)
crop_size = (
    512,
    512,
)
custom_hooks = [
    dict(type='FuseOnDeployHook'),
]
custom_imports = dict(imports=[
    'repvit_mm',
])
data_preprocessor = dict(
    _scope_='mmseg',
    bgr_to_rgb=True,
    mean=[
        123.675,
        116.28,
        103.53,
    ],
    pad_val=0,
    seg_pad_val=255,
    std=[
        58.395,
        57.12,
        57.375,
    ],
    type='SegDataPreProcessor')
data_root = 'data/ade/ADEChallengeData2016'
dataset = dict(
    data_root='data/shapes/ade/ADEChallengeData2016',
    metainfo=dict(
        classes=(
            'background',
            'circle',
            'square',
            'triangle',
            'star',
            'ring',
            'cross',
        ),
        palette=[
            (
                96,
                96,
                96,
            ),
            (
                230,
                25,
                75,
            ),
            (
                60,
                180,
                75,
            ),
            (
                255,
                225,
                25,
            ),
            (
                0,
                130,
                200,
            ),
            (
                245,
                130,
                48,
            ),
            (
                145,
                30,
                180,
            ),
        ]),
    reduce_zero_label=True,
    type='BaseSegDataset')
dataset_type = 'ADE20KDataset'
default_hooks = dict(
    checkpoint=dict(
        _scope_='mmseg', by_epoch=False, interval=450, type='CheckpointHook'),
    logger=dict(
        _scope_='mmseg',
        interval=50,
        log_metric_by_epoch=False,
        type='LoggerHook'),
    param_scheduler=dict(_scope_='mmseg', type='ParamSchedulerHook'),
    sampler_seed=dict(_scope_='mmseg', type='DistSamplerSeedHook'),
    timer=dict(_scope_='mmseg', type='IterTimerHook'),
    visualization=dict(
        _scope_='mmseg', draw=True, type='SegVisualizationHook'))
default_scope = 'mmseg'
env_cfg = dict(
    cudnn_benchmark=True,
    dist_cfg=dict(backend='nccl'),
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
image_scale = (
    192,
    192,
)
img_ratios = [
    0.5,
    0.75,
    1.0,
    1.25,
    1.5,
    1.75,
]
launcher = 'none'
load_from = '/work/main/work_dirs/demo/segmentation/iter_450.pth'
log_level = 'INFO'
log_processor = dict(by_epoch=False)
max_iters = 450
metainfo = dict(
    classes=(
        'background',
        'circle',
        'square',
        'triangle',
        'star',
        'ring',
        'cross',
    ),
    palette=[
        (
            96,
            96,
            96,
        ),
        (
            230,
            25,
            75,
        ),
        (
            60,
            180,
            75,
        ),
        (
            255,
            225,
            25,
        ),
        (
            0,
            130,
            200,
        ),
        (
            245,
            130,
            48,
        ),
        (
            145,
            30,
            180,
        ),
    ])
model = dict(
    _scope_='mmseg',
    backbone=dict(arch='m0_6', init_cfg=None, norm_eval=False, type='RepViT'),
    data_preprocessor=dict(
        bgr_to_rgb=True,
        mean=[
            123.675,
            116.28,
            103.53,
        ],
        pad_val=0,
        seg_pad_val=255,
        size=(
            192,
            192,
        ),
        std=[
            58.395,
            57.12,
            57.375,
        ],
        type='SegDataPreProcessor'),
    decode_head=dict(
        align_corners=False,
        channels=64,
        dropout_ratio=0.1,
        feature_strides=[
            4,
            8,
            16,
            32,
        ],
        in_channels=[
            96,
            96,
            96,
            96,
        ],
        in_index=[
            0,
            1,
            2,
            3,
        ],
        loss_decode=dict(
            loss_weight=1.0, type='CrossEntropyLoss', use_sigmoid=False),
        norm_cfg=dict(requires_grad=True, type='SyncBN'),
        num_classes=7,
        type='FPNHead'),
    neck=dict(
        in_channels=[
            40,
            80,
            160,
            320,
        ],
        num_outs=4,
        out_channels=96,
        type='FPN'),
    pretrained=None,
    test_cfg=dict(mode='whole'),
    train_cfg=dict(),
    type='EncoderDecoder')
norm_cfg = dict(_scope_='mmseg', requires_grad=True, type='SyncBN')
optim_wrapper = dict(
    _scope_='mmseg',
    clip_grad=None,
    optimizer=dict(lr=0.001, type='AdamW', weight_decay=0.0001),
    type='OptimWrapper')
optimizer = dict(lr=0.001, type='AdamW', weight_decay=0.0001)
param_scheduler = [
    dict(
        _scope_='mmengine',
        begin=0,
        by_epoch=False,
        end=30,
        start_factor=0.01,
        type='LinearLR'),
    dict(
        _scope_='mmengine',
        begin=0,
        by_epoch=False,
        end=450,
        eta_min=1e-05,
        power=0.9,
        type='PolyLR'),
]
resume = False
test_cfg = dict(_scope_='mmseg', type='TestLoop')
test_dataloader = dict(
    batch_size=1,
    dataset=dict(
        _scope_='mmseg',
        data_prefix=dict(
            img_path='images/validation',
            seg_map_path='annotations/validation'),
        data_root='data/shapes/ade/ADEChallengeData2016',
        indices=8,
        metainfo=dict(
            classes=(
                'background',
                'circle',
                'square',
                'triangle',
                'star',
                'ring',
                'cross',
            ),
            palette=[
                (
                    96,
                    96,
                    96,
                ),
                (
                    230,
                    25,
                    75,
                ),
                (
                    60,
                    180,
                    75,
                ),
                (
                    255,
                    225,
                    25,
                ),
                (
                    0,
                    130,
                    200,
                ),
                (
                    245,
                    130,
                    48,
                ),
                (
                    145,
                    30,
                    180,
                ),
            ]),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(keep_ratio=True, scale=(
                192,
                192,
            ), type='Resize'),
            dict(size_divisor=32, type='ResizeToMultiple'),
            dict(reduce_zero_label=True, type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
        reduce_zero_label=True,
        type='BaseSegDataset'),
    num_workers=2,
    persistent_workers=True,
    sampler=dict(_scope_='mmseg', shuffle=False, type='DefaultSampler'))
test_evaluator = dict(
    _scope_='mmseg', iou_metrics=[
        'mIoU',
    ], type='IoUMetric')
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(keep_ratio=True, scale=(
        192,
        192,
    ), type='Resize'),
    dict(size_divisor=32, type='ResizeToMultiple'),
    dict(reduce_zero_label=True, type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_cfg = dict(
    _scope_='mmseg',
    max_iters=450,
    type='IterBasedTrainLoop',
    val_interval=450)
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        _scope_='mmseg',
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'),
        data_root='data/shapes/ade/ADEChallengeData2016',
        metainfo=dict(
            classes=(
                'background',
                'circle',
                'square',
                'triangle',
                'star',
                'ring',
                'cross',
            ),
            palette=[
                (
                    96,
                    96,
                    96,
                ),
                (
                    230,
                    25,
                    75,
                ),
                (
                    60,
                    180,
                    75,
                ),
                (
                    255,
                    225,
                    25,
                ),
                (
                    0,
                    130,
                    200,
                ),
                (
                    245,
                    130,
                    48,
                ),
                (
                    145,
                    30,
                    180,
                ),
            ]),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(reduce_zero_label=True, type='LoadAnnotations'),
            dict(keep_ratio=True, scale=(
                192,
                192,
            ), type='Resize'),
            dict(prob=0.5, type='RandomFlip'),
            dict(type='PackSegInputs'),
        ],
        reduce_zero_label=True,
        type='BaseSegDataset'),
    num_workers=2,
    persistent_workers=True,
    sampler=dict(_scope_='mmseg', shuffle=True, type='InfiniteSampler'))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(reduce_zero_label=True, type='LoadAnnotations'),
    dict(keep_ratio=True, scale=(
        192,
        192,
    ), type='Resize'),
    dict(prob=0.5, type='RandomFlip'),
    dict(type='PackSegInputs'),
]
tta_model = dict(_scope_='mmseg', type='SegTTAModel')
tta_pipeline = [
    dict(_scope_='mmseg', backend_args=None, type='LoadImageFromFile'),
    dict(
        _scope_='mmseg',
        transforms=[
            [
                dict(keep_ratio=True, scale_factor=0.5, type='Resize'),
                dict(keep_ratio=True, scale_factor=0.75, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.0, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.25, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.5, type='Resize'),
                dict(keep_ratio=True, scale_factor=1.75, type='Resize'),
            ],
            [
                dict(direction='horizontal', prob=0.0, type='RandomFlip'),
                dict(direction='horizontal', prob=1.0, type='RandomFlip'),
            ],
            [
                dict(type='LoadAnnotations'),
            ],
            [
                dict(type='PackSegInputs'),
            ],
        ],
        type='TestTimeAug'),
]
val_cfg = dict(_scope_='mmseg', type='ValLoop')
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        _scope_='mmseg',
        data_prefix=dict(
            img_path='images/validation',
            seg_map_path='annotations/validation'),
        data_root='data/shapes/ade/ADEChallengeData2016',
        metainfo=dict(
            classes=(
                'background',
                'circle',
                'square',
                'triangle',
                'star',
                'ring',
                'cross',
            ),
            palette=[
                (
                    96,
                    96,
                    96,
                ),
                (
                    230,
                    25,
                    75,
                ),
                (
                    60,
                    180,
                    75,
                ),
                (
                    255,
                    225,
                    25,
                ),
                (
                    0,
                    130,
                    200,
                ),
                (
                    245,
                    130,
                    48,
                ),
                (
                    145,
                    30,
                    180,
                ),
            ]),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(keep_ratio=True, scale=(
                192,
                192,
            ), type='Resize'),
            dict(size_divisor=32, type='ResizeToMultiple'),
            dict(reduce_zero_label=True, type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
        reduce_zero_label=True,
        type='BaseSegDataset'),
    num_workers=2,
    persistent_workers=True,
    sampler=dict(_scope_='mmseg', shuffle=False, type='DefaultSampler'))
val_evaluator = dict(
    _scope_='mmseg', iou_metrics=[
        'mIoU',
    ], type='IoUMetric')
vis_backends = [
    dict(_scope_='mmseg', type='LocalVisBackend'),
]
visualizer = dict(
    _scope_='mmseg',
    name='visualizer',
    save_dir='predictions',
    type='SegLocalVisualizer',
    vis_backends=[
        dict(type='LocalVisBackend'),
    ])
work_dir = 'work_dirs/demo/segmentation/pictures'
