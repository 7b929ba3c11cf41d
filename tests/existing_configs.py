"""Configs of MMDetection's, MMSegmentation's and MMYOLO's own, and the lines that put a backbone of ours under each.

One table for two readers: ``test_existing_configs.py`` tries every row, and ``python tests/existing_configs.py`` writes
``docs/existing_configs.md`` from it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from repvit_mm import FastViT, MobileOne, RepViT

PAGE = Path(__file__).parents[1] / 'docs' / 'existing_configs.md'


@dataclass(frozen=True)
class Row:
    """An upstream config with one of our backbones.

    Args:
        title: What the method is called.
        base: The upstream config, as ``_base_`` names it.
        override: All that a user writes, but for ``_base_`` and ``custom_imports``.
        note: What the method expects of a backbone.
        small: More lines, which keep the test short.
        size: Height and width in pixels of the test's images.
        needs: Modules that have to be there beside MMDetection or MMSegmentation, MMYOLO among them.
        broken: Why the method cannot predict with any backbone, if it cannot.
    """

    title: str
    base: str
    override: str
    note: str = ''
    small: str = ''
    size: tuple[int, int] = (64, 96)
    needs: tuple[str, ...] = ()
    broken: str = ''

    @property
    def name(self) -> str:
        """For the test's id."""
        return re.sub(r'\W+', '_', self.title).lower()

    @property
    def text(self) -> str:
        """The config as a user writes it."""
        return f"_base_ = '{self.base}'\ncustom_imports = dict(imports=['repvit_mm'])\n{self.override.strip()}\n"

    def config(self) -> Config:
        """The config that the test builds."""
        return Config.fromstring(self.text + self.small, '.py')


RGB = 'mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True'
FPN = """
model = dict(
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6'),
    neck=dict(in_channels=[40, 80, 160, 320]),
)
"""
RGB_FPN = f"""
model = dict(
    data_preprocessor=dict({RGB}),
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6'),
    neck=dict(in_channels=[40, 80, 160, 320]),
)
"""
RGB_PAFPN = f"""
model = dict(
    data_preprocessor=dict({RGB}),
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6', out_indices=(1, 2, 3)),
    neck=dict(in_channels=[80, 160, 320]),
)
"""
DETR = """
model = dict(
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6', out_indices=(1, 2, 3), norm_eval=True),
    neck=dict(in_channels=[80, 160, 320]),
)
"""
DILATED = """
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6', output_stride=8),
    decode_head=dict(in_channels=320),
    auxiliary_head=dict(in_channels=160),
)
"""
YOLO = f"""
channels = [80, 160, 320]
model = dict(
    data_preprocessor=dict({RGB}),
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6', out_indices=(1, 2, 3)),
    neck=dict(in_channels=channels, out_channels=channels, widen_factor=1.0),
    bbox_head=dict(head_module=dict(in_channels=channels, widen_factor=1.0)),
)
"""
CAFFE = 'The base feeds BGR as Caffe did: the preprocessor is changed.'
SHALLOW = """
model['encoder'] = dict(num_layers=1)
model['decoder'] = dict(num_layers=2)
model['num_queries'] = 20
"""

DETECTION = [
    Row('Faster R-CNN', 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', FPN),
    Row('Cascade R-CNN', 'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', FPN),
    Row('Mask R-CNN', 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', FPN),
    Row(
        'RetinaNet with FastViT',
        'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        """
model = dict(
    backbone=dict(_delete_=True, type='FastViT', arch='t8'),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
""",
    ),
    Row('FCOS', 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', RGB_FPN, CAFFE),
    Row('ATSS', 'mmdet::atss/atss_r50_fpn_1x_coco.py', FPN),
    Row('GFL', 'mmdet::gfl/gfl_r50_fpn_1x_coco.py', FPN),
    Row('TOOD', 'mmdet::tood/tood_r50_fpn_1x_coco.py', FPN),
    Row(
        'PAA',
        'mmdet::paa/paa_r50_fpn_1x_coco.py',
        FPN,
        'MMDetection needs scikit-learn for it, which it does not bring along.',
        needs=('sklearn',),
    ),
    Row(
        'SSD',
        'mmdet::ssd/ssd300_coco.py',
        f"""
model = dict(
    data_preprocessor=dict({RGB}),
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6', out_indices=(1, 2)),
    neck=dict(in_channels=(80, 160), out_channels=(80, 160, 512, 256, 256, 256)),
    bbox_head=dict(in_channels=(80, 160, 512, 256, 256, 256)),
)
""",
        'Maps of stride 8 and 16, as those of VGG; the base subtracts means and divides by nothing.',
        size=(300, 300),
        broken="MMDetection 3.3.0's SSD trains, but predicts with no backbone: its head lacks `loss_cls`.",
    ),
    Row('YOLOX', 'mmdet::yolox/yolox_s_8xb8-300e_coco.py', RGB_PAFPN, 'The base normalizes nothing.'),
    Row(
        'YOLOF',
        'mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py',
        f"""
model = dict(
    data_preprocessor=dict({RGB}),
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6', out_indices=(3,)),
    neck=dict(in_channels=320),
)
""",
        CAFFE,
    ),
    Row('RTMDet', 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py', RGB_PAFPN, 'The base feeds BGR.'),
    Row('RTMDet-Ins', 'mmdet::rtmdet/rtmdet-ins_s_8xb32-300e_coco.py', RGB_PAFPN, 'The base feeds BGR.'),
    Row(
        'SOLOv2',
        'mmdet::solov2/solov2_r50_fpn_1x_coco.py',
        FPN,
        small="model['mask_head'] = dict(num_classes=5, num_grids=[8, 6, 6, 4, 4])",
    ),
    Row(
        'Deformable DETR',
        'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
        DETR,
        'DETRs train a backbone with frozen statistics, at a tenth of the learning rate.',
        small=SHALLOW,
    ),
    Row(
        'DINO',
        'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
        DETR,
        'Images that give fewer places than `num_queries` are refused by `topk`.',
        small=SHALLOW,
    ),
    Row('CondInst', 'mmdet::condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py', FPN),
    Row('PointRend', 'mmdet::point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py', RGB_FPN, CAFFE),
    Row('Panoptic FPN', 'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', FPN),
    Row(
        'Mask2Former',
        'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
        """
model = dict(
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6'),
    panoptic_head=dict(in_channels=[40, 80, 160, 320]),
)
""",
        small="""
model['panoptic_head'] |= dict(
    num_queries=20,
    pixel_decoder=dict(encoder=dict(num_layers=1)),
    num_transformer_feat_level=3,
    transformer_decoder=dict(num_layers=2),
)
model['data_preprocessor'] = dict(batch_augments=None)
""",
    ),
]

SEGMENTATION = [
    Row(
        'Semantic FPN',
        'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py',
        """
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6'),
    neck=dict(in_channels=[40, 80, 160, 320]),
)
""",
    ),
    Row(
        'UPerNet with MobileOne',
        'mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py',
        """
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='MobileOne', arch='s0'),
    decode_head=dict(in_channels=[48, 128, 256, 1024]),
    auxiliary_head=dict(in_channels=256),
)
""",
    ),
    Row(
        'DeepLabV3+',
        'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py',
        """
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6', output_stride=8),
    decode_head=dict(in_channels=320, c1_in_channels=40),
    auxiliary_head=dict(in_channels=160),
)
""",
        "The name's `d8` is `output_stride=8`. `c1_in_channels` are those of the first stage.",
    ),
    Row(
        'DeepLabV3 with FastViT',
        'mmseg::deeplabv3/deeplabv3_r50-d8_4xb4-160k_ade20k-512x512.py',
        """
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='FastViT', arch='t8', output_stride=8),
    decode_head=dict(in_channels=384),
    auxiliary_head=dict(in_channels=192),
)
""",
    ),
    Row('PSPNet', 'mmseg::pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512.py', DILATED),
    Row('FCN', 'mmseg::fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py', DILATED),
    Row(
        'SegFormer head',
        'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
        """
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6'),
    decode_head=dict(in_channels=[40, 80, 160, 320]),
)
""",
    ),
    Row(
        'OCRNet',
        'mmseg::ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py',
        """
decode_head = _base_.model.decode_head
decode_head[0].update(in_channels=160)
decode_head[1].update(in_channels=320)
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6', output_stride=8),
    decode_head=decode_head,
)
""",
        'A list of heads is replaced as a whole, so it is taken from the base and changed.',
    ),
    Row(
        'PointRend for segmentation',
        'mmseg::point_rend/pointrend_r50_4xb4-160k_ade20k-512x512.py',
        """
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6'),
    neck=dict(in_channels=[40, 80, 160, 320]),
)
""",
    ),
    Row(
        'Mask2Former for segmentation',
        'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
        """
model = dict(
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6'),
    decode_head=dict(in_channels=[40, 80, 160, 320]),
)
custom_imports = dict(imports=['mmdet.models', 'repvit_mm'])
""",
        "The base imports MMDetection's modules: name them again.",
        small="""
model['decode_head'] |= dict(
    num_queries=20,
    pixel_decoder=dict(encoder=dict(num_layers=1)),
    transformer_decoder=dict(num_layers=2),
)
""",
        needs=('mmdet',),
    ),
]
MMYOLO = [
    Row(
        'YOLOv5',
        'mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py',
        YOLO,
        'The base divides by 255 and normalizes nothing.',
        needs=('mmyolo',),
    ),
    Row(
        'YOLOv8',
        'mmyolo::yolov8/yolov8_s_syncbn_fast_8xb16-500e_coco.py',
        YOLO,
        'The base divides by 255 and normalizes nothing.',
        needs=('mmyolo',),
    ),
    Row(
        "MMYOLO's RTMDet",
        'mmyolo::rtmdet/rtmdet_s_syncbn_fast_8xb32-300e_coco.py',
        f"""
model = dict(
    data_preprocessor=dict({RGB}),
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6', out_indices=(1, 2, 3)),
    neck=dict(in_channels=[80, 160, 320], out_channels=128, widen_factor=1.0),
)
""",
        "The base feeds BGR. Its head keeps the base's factor: half of 256 is what the neck gives.",
        needs=('mmyolo',),
    ),
]
ROWS = DETECTION + SEGMENTATION + MMYOLO

INTRODUCTION = """\
# Under existing configs

<!-- Written by `python tests/existing_configs.py`; `tests/test_existing_configs.py` tries every entry. -->

Each config below is complete: its `_base_` is one of MMDetection's, MMSegmentation's or MMYOLO's own configs, and the
rest is all that changes. The tests build each model, compute a training loss with a finite gradient for every parameter
of the backbone, predict, fuse, and predict the same again. The models were not trained to published figures.

- `_delete_=True` drops the base's backbone with its pretrained weights. Some bases of MMSegmentation name these weights
  beside the backbone: `pretrained=None` drops them. For pretrained weights of the new backbone, add
  `init_cfg=dict(type='Pretrained', checkpoint=...)` to it, with the address that a config in `configs/` has.
- Pretrained weights expect RGB images, normalized with ImageNet's mean and standard deviation. Where a base feeds
  something else, its `data_preprocessor` is changed. Building a model warns if it is not.
- `norm_eval=True` freezes BatchNorm's statistics, which saves memory and time; take it for small batches.
- For another variant, change `arch` and the channels:

| | `arch` | channels of the four maps |
|---|---|---|
"""

ABOUT_MMYOLO = """
MMYOLO 0.6.0, the last release, needs mmcv below 2.1: `make setup STACK=oldest` makes an environment with both. The
bases multiply the widths of neck and head by `widen_factor`; a backbone's are what they are, so it becomes 1. YOLOv5's
and YOLOv8's necks round widths up to multiples of 8. Their optimizer takes weights and biases only: FastViT's layer
scales would not learn. See [configs.md](configs.md) for training.
"""


def page() -> str:
    """The whole of ``docs/existing_configs.md``."""
    parts = [INTRODUCTION]
    for family in (RepViT, FastViT, MobileOne):
        archs: dict[tuple[int, ...], list[str]] = {}
        for arch, spec in family.specs.items():
            archs.setdefault(spec.channels, []).append(f'`{arch}`')
        parts += [
            f'| {family.__name__} | {" ".join(names)} | {", ".join(map(str, channels))} |\n'
            for channels, names in archs.items()
        ]
    for title, about, rows in (
        ('MMDetection', '', DETECTION),
        ('MMSegmentation', '', SEGMENTATION),
        ('MMYOLO', ABOUT_MMYOLO, MMYOLO),
    ):
        parts.append(f'\n## {title}\n{about}')
        for row in rows:
            note = f'{" ".join(filter(None, (row.note, row.broken)))}\n\n' if row.note or row.broken else ''
            parts.append(f'\n### {row.title}\n\n{note}```python\n{row.text}```\n')
    return ''.join(parts)


if __name__ == '__main__':
    PAGE.write_text(page())
