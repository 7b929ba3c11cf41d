_base_ = '../_base_/mask_rcnn_fastvit_fpn_1x_coco.py'

checkpoint = (
    'https://docs-assets.developer.apple.com/ml-research/models/fastvit/image_classification_models/fastvit_t12.pth.tar'
)
model = dict(
    backbone=dict(arch='t12', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
