_base_ = '../_base_/mask_rcnn_mobileone_fpn_1x_coco.py'

checkpoint = 'https://docs-assets.developer.apple.com/ml-research/datasets/mobileone/mobileone_s0_unfused.pth.tar'
model = dict(
    backbone=dict(arch='s0', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[48, 128, 256, 1024]),
)
