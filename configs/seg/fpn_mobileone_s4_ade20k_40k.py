_base_ = '../_base_/fpn_mobileone_ade20k_40k.py'

checkpoint = 'https://docs-assets.developer.apple.com/ml-research/datasets/mobileone/mobileone_s4_unfused.pth.tar'
model = dict(
    backbone=dict(arch='s4', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[192, 448, 896, 2048]),
)
