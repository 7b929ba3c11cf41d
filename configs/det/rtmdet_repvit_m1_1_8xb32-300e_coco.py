# RTMDet-s with RepViT-M1.1 in place of CSPNeXt on COCO-2017, 300 epochs, 8 GPUs x 32 images. The combination is ours:
# RepViT's authors released no RTMDet, and no figure of this config was measured.
_base_ = 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py'
custom_imports = dict(imports=['repvit_mm'])

checkpoint = 'https://github.com/THU-MIG/RepViT/releases/download/v1.0/repvit_m1_1_distill_300e.pth'
model = dict(
    # RTMDet feeds BGR; the pretrained weights expect ImageNet's RGB.
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        _delete_=True,
        type='RepViT',
        arch='m1_1',
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
