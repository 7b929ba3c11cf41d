# Semantic FPN with MobileOne on ADE20K, 40k iterations: https://arxiv.org/abs/2206.04040. The authors released neither
# such a model nor a recipe for one. This recipe is ours: that of RepViT, unchanged. 8 GPUs x 4 images.
_base_ = './fpn_repvit_ade20k_40k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileOne',
        # Statistics frozen; weights and biases of the norms still learn.
        norm_eval=True,
        init_cfg=dict(type='Pretrained'),
    ),
)
