# MobileOne in the demo's place of RepViT: Semantic FPN with a lean head, from scratch, on the data set that
# tools/make_shapes.py draws.
_base_ = './fpn_repvit_m0_6_shapes.py'

model = dict(
    backbone=dict(_delete_=True, type='MobileOne', arch='s1'),
    neck=dict(in_channels=[96, 192, 512, 1280]),
)
