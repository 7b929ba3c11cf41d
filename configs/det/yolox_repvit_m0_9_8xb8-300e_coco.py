# YOLOX-s with RepViT-M0.9 in place of CSPDarknet on COCO-2017, 300 epochs, 8 GPUs x 8 images. The combination is ours:
# RepViT's authors released no YOLO, and no figure of this config was measured.
_base_ = 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'
custom_imports = dict(imports=['repvit_mm'])

checkpoint = 'https://github.com/THU-MIG/RepViT/releases/download/v1.0/repvit_m0_9_distill_300e.pth'
model = dict(
    # YOLOX feeds BGR from 0 to 255; the pretrained weights expect ImageNet's RGB. Its padding of 114 is near the mean.
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        _delete_=True,
        type='RepViT',
        arch='m0_9',
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[96, 192, 384]),
)
