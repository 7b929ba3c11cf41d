_base_ = '../_base_/mask_rcnn_repvit_fpn_1x_coco.py'

checkpoint = 'https://github.com/THU-MIG/RepViT/releases/download/v1.0/repvit_m1_1_distill_300e.pth'
model = dict(
    backbone=dict(arch='m1_1', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
