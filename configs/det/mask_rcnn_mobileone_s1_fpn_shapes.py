# MobileOne in the demo's place of RepViT: Mask R-CNN with lean heads, from scratch, on the data set that
# tools/make_shapes.py draws.
_base_ = './mask_rcnn_repvit_m0_6_fpn_shapes.py'

model = dict(
    backbone=dict(_delete_=True, type='MobileOne', arch='s1'),
    neck=dict(in_channels=[96, 192, 512, 1280]),
)
