"""Small detectors and segmentors of each kind, with norms like trained ones, for the tests of what leaves PyTorch."""

from pathlib import Path

import torch
from helpers import SMALL
from mmengine.config import Config
from torch import Tensor, nn

from repvit_mm.deploy.load import build_model

ROOT = Path(__file__).parents[1]

RETINANET = """
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['repvit_mm'])
norm_cfg = dict(type='BN')
model = dict(
    backbone={backbone},
    neck=dict(in_channels={channels}, out_channels=16, num_outs=3, norm_cfg=norm_cfg),
    bbox_head=dict(
        num_classes=5, in_channels=16, feat_channels=16, stacked_convs=1, norm_cfg=norm_cfg,
        anchor_generator=dict(strides=[8, 16, 32]),
    ),
    test_cfg=dict(max_per_img=20, nms_pre=100),
)
"""

ATSS = """
_base_ = 'mmdet::atss/atss_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['repvit_mm'])
model = dict(
    backbone={backbone},
    neck=dict(in_channels={channels}, out_channels=64),
    bbox_head=dict(num_classes=5, in_channels=64, feat_channels=64, stacked_convs=1),
    test_cfg=dict(max_per_img=20, nms_pre=100),
)
"""

RTMDET = """
_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
custom_imports = dict(imports=['repvit_mm'])
model = dict(
    backbone={backbone},
    neck=dict(in_channels={channels}[1:], out_channels=16),
    bbox_head=dict(num_classes=5, in_channels=16, feat_channels=16),
    test_cfg=dict(max_per_img=20, nms_pre=300, score_thr=0.01),
)
model['backbone']['out_indices'] = (1, 2, 3)
"""

SEMANTIC_FPN = """
_base_ = '{root}/configs/seg/fpn_repvit_m0_6_shapes.py'
model = dict(
    backbone={backbone},
    neck=dict(in_channels={channels}, out_channels=16),
    decode_head=dict(in_channels=[16] * 4, channels=8),
)
"""

TWO_STAGE = """
_base_ = 'mmdet::{base}_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['repvit_mm'])
model = dict(
    backbone={{backbone}},
    neck=dict(in_channels={{channels}}, out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=16, finest_scale=14)),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=60), rcnn=dict(max_per_img=12)),
)
roi_head = model['roi_head']
"""

BOX_HEAD = "roi_head['bbox_head'] = dict(in_channels=16, fc_out_channels=32, num_classes=5)\n"

BOX_HEADS = """
roi_head['bbox_head'] = [
    dict(
        type='Shared2FCBBoxHead', in_channels=16, fc_out_channels=32, num_classes=5, reg_class_agnostic={agnostic},
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1 / stage, 0.1 / stage, 0.2 / stage, 0.2 / stage]),
        loss_cls=dict(type='CrossEntropyLoss'), loss_bbox=dict(type='SmoothL1Loss'),
    )
    for stage in (1, 2, 3)
]
"""

MASK_HEAD = """
roi_head['mask_roi_extractor'] = dict(out_channels=16, finest_scale=14)
roi_head['mask_head'] = dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=5)
"""


def two_stage(base: str, *heads: str) -> str:
    """The text of a two-stage detector's config."""
    return TWO_STAGE.format(base=base) + ''.join(heads)


TWO_STAGES = {
    'mask_rcnn': two_stage('mask_rcnn/mask-rcnn', BOX_HEAD, MASK_HEAD),
    'faster_rcnn': two_stage('faster_rcnn/faster-rcnn', BOX_HEAD),
    'cascade_mask_rcnn': two_stage('cascade_rcnn/cascade-mask-rcnn', BOX_HEADS.format(agnostic=True), MASK_HEAD),
    'cascade_rcnn': two_stage('cascade_rcnn/cascade-rcnn', BOX_HEADS.format(agnostic=False)),
}

MODELS = {'retinanet': RETINANET, 'atss': ATSS, 'rtmdet': RTMDET, 'semantic_fpn': SEMANTIC_FPN}


def small_config(model: str, family: str = 'repvit', **options: object) -> Config:
    """The config of a small model.

    Args:
        model: A key of ``MODELS`` or ``TWO_STAGES``.
        family: A key of ``helpers.SMALL``.
        options: Of the backbone.
    """
    cls, arch = SMALL[family]
    backbone = dict(_delete_=True, type=cls.__name__, arch=arch, **options)
    text = (MODELS | TWO_STAGES)[model].format(root=ROOT, backbone=backbone, channels=list(arch['channels']))
    return Config.fromstring(text, '.py')


PREDICTORS = {
    'retina_cls': (-4.0, 1.0),
    'atss_cls': (-3.0, 1.0),
    'rtm_cls': (-4.0, 1.0),
    'retina_reg': (0.0, 0.3),
    'atss_reg': (0.0, 0.3),
    'rtm_reg': (0.5, 0.3),
    'conv_seg': (0.0, 1.0),
    'rpn_cls': (0.0, 2.0),
    'rpn_reg': (0.0, 0.5),
    'fc_cls': (0.0, 2.0),
    'fc_reg': (0.0, 1.0),
    'conv_logits': (0.0, 3.0),
}
"""Name of a head's last layer -> mean and deviation of what it puts out."""


@torch.no_grad()
def like_trained(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """Draw the constants of a module's norms and layer scales anew, and statistics, so that each of them counts.

    Args:
        model: The module, in ``eval`` mode afterwards.
        images: What a whole model's norms take their statistics from; its predictors then tell places apart. Without
            any, statistics are random.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.numel() > 1 and parameter.min() == parameter.max():
            parameter.uniform_(0.5, 1.5, generator=generator)
    norms = [module for module in model.eval().modules() if getattr(module, 'running_mean', None) is not None]
    for norm in norms:
        norm.running_mean.normal_(std=0.3, generator=generator)
        norm.running_var.uniform_(0.5, 2.0, generator=generator)
        norm.momentum = 1.0  # the statistics of the next batch alone
        norm.train(images is not None)
    if images is None:
        return model
    run(model, images)
    model.eval()
    for name, module in model.named_modules():
        kind = next((kind for kind in PREDICTORS if kind in name and isinstance(module, nn.Conv2d | nn.Linear)), None)
        if kind:
            outputs: list[Tensor] = []
            handle = module.register_forward_hook(lambda *call, outputs=outputs: outputs.append(call[-1]))
            run(model, images)
            handle.remove()
            values = torch.cat([output.transpose(0, 1).flatten(1) for output in outputs], dim=1)
            mean, deviation = PREDICTORS[kind]
            scale = deviation / values.std(dim=1)
            module.weight *= scale.view(-1, *[1] * (module.weight.ndim - 1))
            module.bias.copy_((module.bias - values.mean(dim=1)) * scale + mean)
    return model


def run(model: nn.Module, images: Tensor) -> None:
    """Run a whole model on normalized images; a two-stage detector's heads need proposals, and so their samples."""
    if hasattr(model, 'roi_head'):
        from mmdet.structures import DetDataSample

        meta = dict(img_shape=images.shape[-2:], ori_shape=images.shape[-2:], scale_factor=(1.0, 1.0))
        model.predict(images, [DetDataSample(metainfo=meta) for _ in images], rescale=False)
    else:
        model(images, mode='tensor')


def small_model(model: str, family: str = 'repvit', **options: object) -> nn.Module:
    """A small model in ``eval`` mode, unfused."""
    torch.manual_seed(0)
    built = build_model(small_config(model, family, **options))
    return like_trained(built, torch.randn(2, 3, 128, 128))
