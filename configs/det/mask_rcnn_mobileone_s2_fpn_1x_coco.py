_base_ = '../_base_/mask_rcnn_mobileone_fpn_1x_coco.py'

checkpoint = 'https://docs-assets.developer.apple.com/ml-research/datasets/mobileone/mobileone_s2_unfused.pth.tar'
model = dict(
    backbone=dict(arch='s2', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[96, 256, 640, 2048]),
)
