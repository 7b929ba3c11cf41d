# Mask R-CNN with MobileOne on COCO-2017, 1x: https://arxiv.org/abs/2206.04040. The authors released neither such
# a model nor a recipe for one. This recipe is ours: that of RepViT, unchanged. 8 GPUs x 2 images.
_base_ = './mask_rcnn_repvit_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileOne',
        # Statistics frozen; weights and biases of the norms still learn.
        norm_eval=True,
        init_cfg=dict(type='Pretrained'),
    ),
)
