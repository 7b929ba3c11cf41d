_base_ = '../_base_/mask_rcnn_mobileone_fpn_1x_coco.py'

checkpoint = 'https://docs-assets.developer.apple.com/ml-research/datasets/mobileone/mobileone_s1_unfused.pth.tar'
model = dict(
    backbone=dict(arch='s1', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[96, 192, 512, 1280]),
)
