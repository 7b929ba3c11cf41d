_base_ = '../_base_/fpn_fastvit_ade20k_40k.py'

checkpoint = (
    'https://docs-assets.developer.apple.com/ml-research/models/fastvit/image_classification_models/fastvit_t8.pth.tar'
)
model = dict(
    backbone=dict(arch='t8', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
