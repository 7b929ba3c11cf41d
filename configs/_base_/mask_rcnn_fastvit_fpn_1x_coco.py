# Mask R-CNN with FastViT on COCO-2017, 1x. The authors released no config. Their paper,
# https://arxiv.org/abs/2303.14189, follows PoolFormer: AdamW with learning rate 1e-4 and weight decay 0.05, 16 images a
# step, 12 epochs. The rest is ours and the same as for RepViT: warm-up, decay of every parameter, frozen BatchNorm
# statistics. 8 GPUs x 2 images.
_base_ = './mask_rcnn_repvit_fpn_1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='FastViT',
        # Statistics frozen; weights and biases of the norms still learn.
        norm_eval=True,
        init_cfg=dict(type='Pretrained'),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
