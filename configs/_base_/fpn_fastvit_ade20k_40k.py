# Semantic FPN with FastViT on ADE20K, 40k iterations. The authors released no config. Their paper,
# https://arxiv.org/abs/2303.14189, follows PoolFormer: AdamW with learning rate 2e-4 and weight decay 1e-4, poly decay
# of power 0.9, 32 images a step. The rest is ours and the same as for RepViT: the final learning rate, decay of every
# parameter, frozen BatchNorm statistics, test images in multiples of 32. 8 GPUs x 4 images.
_base_ = './fpn_repvit_ade20k_40k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='FastViT',
        # Statistics frozen; weights and biases of the norms still learn.
        norm_eval=True,
        init_cfg=dict(type='Pretrained'),
    ),
)
