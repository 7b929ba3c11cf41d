# The authors released no such model: their recipe for the larger variants, applied by us.
_base_ = '../_base_/fpn_repvit_ade20k_40k.py'

checkpoint = 'https://github.com/THU-MIG/RepViT/releases/download/v1.0/repvit_m1_0_distill_300e.pth'
model = dict(
    backbone=dict(arch='m1_0', init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[56, 112, 224, 448]),
)
