_base_ = '../_base_/fpn_fastvit_ade20k_40k.py'

checkpoint = (
    'https://docs-assets.developer.apple.com/ml-research/models/fastvit/image_classification_models/fastvit_s12.pth.tar'
)
model = dict(
    backbone=dict(arch='s12', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
