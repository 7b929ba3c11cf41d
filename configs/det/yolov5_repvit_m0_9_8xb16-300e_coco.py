# YOLOv5-s of MMYOLO with RepViT-M0.9 in place of CSPDarknet on COCO-2017, 300 epochs, 8 GPUs x 16 images. The
# combination is ours: RepViT's authors released no YOLO, and no figure of this config was measured.
# It needs MMYOLO 0.6.0, which wants mmcv below 2.1, and albumentations for its training images.
_base_ = 'mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py'
custom_imports = dict(imports=['repvit_mm'])

checkpoint = 'https://github.com/THU-MIG/RepViT/releases/download/v1.0/repvit_m0_9_distill_300e.pth'
channels = [96, 192, 384]
model = dict(
    # YOLOv5 divides by 255 and normalizes nothing; the pretrained weights expect ImageNet's RGB. Its padding of 114 is
    # near the mean.
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        _delete_=True,
        type='RepViT',
        arch='m0_9',
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    # The base multiplies all widths by a factor; RepViT's are what they are.
    neck=dict(in_channels=channels, out_channels=channels, widen_factor=1.0),
    bbox_head=dict(head_module=dict(in_channels=channels, widen_factor=1.0)),
)
