"""Every config builds and runs, and the recipes are the authors'."""

import copy
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import FAMILIES
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, TRANSFORMS, DefaultScope, init_default_scope
from samples import detection_sample, segmentation_sample
from torch import nn

from repvit_mm import RepViT
from repvit_mm.data_check.heads import wrong_heads
from repvit_mm.data_check.paths import wanted_paths
from repvit_mm.datasets import shapes
from repvit_mm.normalization import MEAN, STD

# Every config stands on one of MMDetection's or MMSegmentation's.
pytestmark = pytest.mark.needs_ops

CONFIGS = Path(__file__).parents[1] / 'configs'
# test_mmyolo.py has those that stand on MMYOLO.
DETECTION = sorted(path for path in (CONFIGS / 'det').glob('*.py') if not path.stem.startswith('yolov5'))
SEGMENTATION = sorted((CONFIGS / 'seg').glob('*.py'))
COCO = [path for path in DETECTION if path.stem.endswith('1x_coco')]
YOLO = [path for path in DETECTION if path.stem.endswith('300e_coco')]
ADE20K = [path for path in SEGMENTATION if path.stem.endswith('ade20k_40k')]
SHAPES = [path for path in DETECTION + SEGMENTATION if path.stem.endswith('shapes')]

PARAMETERS = {
    model['Name']: model['Metadata']['Parameters']
    for path in CONFIGS.glob('*/metafile.yml')
    for model in yaml.safe_load(path.read_text())['Models']
}


def name(path):
    return path.stem


def family_and_arch(path):
    """What a config's name says."""
    for family in FAMILIES:
        archs = sorted(family.cls.specs, key=len, reverse=True)
        if match := re.search(rf'{family.name}_({"|".join(archs)})_', path.stem):
            return family, match[1]
    raise LookupError(f'{path.name} names no variant')


@pytest.fixture(autouse=True)
def scope_restored():
    before = copy.copy(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


read = cache(Config.fromfile)


def load(path):
    cfg = copy.deepcopy(read(path))
    init_default_scope(cfg.default_scope)
    return cfg


def build(cfg):
    if cfg.default_scope == 'mmdet':
        from mmdet.registry import MODELS
    else:
        from mmseg.registry import MODELS
    model = copy.deepcopy(cfg.model)
    model.backbone.init_cfg = None
    # As the Runner does without a process group.
    return revert_sync_batchnorm(MODELS.build(model))


def has_masks(path):
    return path.stem.startswith('mask_rcnn')


def is_typical(path):
    family, arch = family_and_arch(path)
    return arch == family.typical


def quick_for_small(paths):
    """The smallest variant and the demo data set's belong to the quick part of the suite."""
    quick = [path for path in paths if family_and_arch(path)[1] == FAMILIES[0].goldens[0] or path in SHAPES]
    return [pytest.param(p, id=p.stem, marks=() if p in quick else pytest.mark.slow) for p in paths]


def look_at_few_regions(model):
    """As many as the heads need to learn from and to predict on: each costs a two-stage detector as much."""
    model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 32
    model.train_cfg.rcnn.sampler.num = 16


@pytest.mark.parametrize('path', quick_for_small(DETECTION + SEGMENTATION))
def test_config_builds_forwards_learns_and_predicts(path):
    """Parameters are as many as the metafile says, forward gives the declared maps, the loss a gradient everywhere, and
    predict a result of the image's size."""
    torch.manual_seed(0)
    cfg = load(path)
    size = (64, 96)
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = size
    elif 'roi_head' in cfg.model:
        look_at_few_regions(cfg.model)
    model = build(cfg)
    if path.stem in PARAMETERS:
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[path.stem]
    inputs = torch.rand(1, 3, *size) * 255

    maps = model.backbone(inputs)
    assert [m.shape[1] for m in maps] == list(cfg.model.neck.in_channels) == list(model.backbone.out_channels)
    sides = [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [m.shape[2:] for m in maps] == [sides[index] for index in model.backbone.out_indices]

    if cfg.default_scope == 'mmdet':
        sample = detection_sample(size, (cfg.model.get('roi_head') or cfg.model).bbox_head.num_classes)
        if not has_masks(path):
            del sample.gt_instances.masks
    else:
        sample = segmentation_sample(size, cfg.model.decode_head.num_classes)
    model.train()
    MessageHub.get_current_instance().update_info('iter', 0)  # YOLOX's preprocessor asks for it
    if model.backbone.norm_eval:
        assert not any(m.training for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d))
    batch = model.data_preprocessor(dict(inputs=[inputs[0]], data_samples=[sample]), training=True)
    if not model.backbone.norm_eval:  # one image gives the deepest maps too few values for live statistics
        batch = dict(inputs=batch['inputs'].repeat(2, 1, 1, 1), data_samples=[sample, copy.deepcopy(sample)])
    loss, logged = model.parse_losses(model(**batch, mode='loss'))
    assert torch.isfinite(loss) and loss > 0, logged
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without, without

    model.eval()
    test_sample = copy.deepcopy(sample)
    with torch.no_grad():
        result = model.test_step(dict(inputs=[inputs[0]], data_samples=[test_sample]))[0]
    if cfg.default_scope == 'mmdet':
        assert ('masks' in result.pred_instances) is has_masks(path)
        assert not has_masks(path) or result.pred_instances.masks.shape[1:] == size
    else:
        assert result.pred_sem_seg.data.shape == (1, *size)


def test_every_published_variant_has_its_two_configs():
    archs = [(family.name, arch) for family in FAMILIES for arch in family.goldens]
    assert {p.name for p in COCO} == {f'mask_rcnn_{family}_{arch}_fpn_1x_coco.py' for family, arch in archs}
    assert {p.name for p in ADE20K} == {f'fpn_{family}_{arch}_ade20k_40k.py' for family, arch in archs}


@pytest.mark.parametrize('path', COCO + ADE20K, ids=name)
def test_backbone_is_that_of_the_recipe(path):
    family, arch = family_and_arch(path)
    assert load(path).model.backbone == dict(
        type=family.cls.__name__,
        arch=arch,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint=family.weights(arch)),
        **(family.coco_options if path in COCO else {}),
    )


@pytest.mark.parametrize('path', COCO + ADE20K, ids=name)
def test_what_the_authors_did_not_release_is_marked_as_ours(path):
    family, arch = family_and_arch(path)
    (base,) = re.findall(r"_base_ = '(.+)'", path.read_text())
    comments = path.read_text() + (path.parent / base).read_text()
    assert (re.search(r'\b(ours|by us)\b', comments) is None) == (arch in family.released)


def walk_learning_rate(cfg, iterations, epoch_length):
    """The learning rate before each iteration, as MMEngine's ParamSchedulerHook drives the built schedulers."""
    schedulers = json.dumps([dict(s) for s in cfg.param_scheduler])
    return walk(schedulers, cfg.optim_wrapper.optimizer.lr, iterations, epoch_length)


@cache
def walk(schedulers, learning_rate, iterations, epoch_length):
    """One walk serves all configs with the same schedulers, given as JSON."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=learning_rate)
    schedulers = [PARAM_SCHEDULERS.build(s, default_args=dict(optimizer=optimizer)) for s in json.loads(schedulers)]
    walked = []
    for iteration in range(iterations):
        walked.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or (iteration + 1) % epoch_length == 0:
                scheduler.step()
    return np.array(walked)


@pytest.mark.parametrize('path', COCO, ids=name)
def test_coco_recipe(path):
    cfg = load(path)
    iterations_per_epoch = 7330  # 117,266 images with annotations, 16 a step
    iteration = np.arange(12 * iterations_per_epoch)
    epoch = iteration // iterations_per_epoch
    # mmcv 1.x: linear warm-up over 500 iterations, from ratio 1e-6; steps at epochs 8 and 11.
    family, _ = family_and_arch(path)
    peak = family.coco_rate
    expected = peak * 0.1 ** ((epoch >= 8).astype(float) + (epoch >= 11))
    warm_up = iteration < 500
    expected[warm_up] = peak * (1 - (1 - iteration[warm_up] / 500) * (1 - 1e-6))
    walked = walk_learning_rate(cfg, len(iteration), iterations_per_epoch)
    np.testing.assert_allclose(walked, expected, rtol=1e-9)
    if family.cls is RepViT:  # the logs of its authors after 50 and 100 iterations
        assert [f'{walked[i - 1]:.0e}' for i in (50, 100)] == ['2e-05', '4e-05']

    assert cfg.train_cfg.type == 'EpochBasedTrainLoop' and cfg.train_cfg.max_epochs == 12
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16)
    resize = dict(type='Resize', scale=(1333, 800), keep_ratio=True)
    train, test = cfg.train_dataloader.dataset.pipeline, cfg.test_dataloader.dataset.pipeline
    assert train[2:4] == [resize, dict(type='RandomFlip', prob=0.5)] and test[1] == resize
    assert cfg.model.data_preprocessor.pad_size_divisor == 32
    assert cfg.optim_wrapper.type == 'OptimWrapper'
    assert cfg.test_evaluator.metric == ['bbox', 'segm']


@pytest.mark.parametrize('path', YOLO, ids=name)
def test_yolo_recipe_is_the_bases_but_for_backbone_and_normalization(path):
    cfg = load(path)
    (base,) = re.findall('_base_ = .+', path.read_text())
    theirs = Config.fromstring(base, '.py')
    family, arch = family_and_arch(path)
    assert cfg.model.backbone == dict(
        type='RepViT',
        arch=arch,
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=family.weights(arch)),
    )
    assert cfg.model.neck.in_channels == list(family.cls.specs[arch].channels[1:])
    ours = cfg.model.data_preprocessor
    assert (ours.mean, ours.std, ours.bgr_to_rgb) == (list(MEAN), list(STD), True)
    for model in (cfg.model, theirs.model):
        del model['backbone'], model['neck']['in_channels']
        for key in ('mean', 'std', 'bgr_to_rgb'):
            model.data_preprocessor.pop(key, None)
    assert {key for key in {*cfg, *theirs} if cfg.get(key) != theirs.get(key)} == {'checkpoint', 'custom_imports'}


def test_there_is_a_yolox_and_an_rtmdet_with_repvit():
    assert {path.name for path in YOLO} == {
        'yolox_repvit_m0_9_8xb8-300e_coco.py',
        'rtmdet_repvit_m1_1_8xb32-300e_coco.py',
    }
    assert [path.name for path in SHAPES if 'rtmdet' in path.stem] == ['rtmdet_repvit_m0_6_shapes.py']


@pytest.mark.parametrize('path', ADE20K, ids=name)
def test_ade20k_recipe(path):
    cfg = load(path)
    iteration = np.arange(40000)
    expected = (2e-4 - 1e-6) * (1 - iteration / 40000) ** 0.9 + 1e-6  # mmcv 1.x's poly decay, no warm-up
    np.testing.assert_allclose(walk_learning_rate(cfg, 40000, 40000), expected, rtol=1e-9)

    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (40000, 4000)
    assert cfg.train_dataloader.batch_size == 4
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=32)
    by_type = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    resize = by_type['RandomResize']
    assert (resize.scale, resize.ratio_range, resize.keep_ratio) == ((2048, 512), (0.5, 2.0), True)
    assert by_type['RandomCrop'].crop_size == (512, 512) == tuple(cfg.model.data_preprocessor.size)
    assert by_type['RandomFlip'].prob == 0.5 and 'PhotoMetricDistortion' in by_type
    head = cfg.model.decode_head
    assert (head.type, head.channels, head.num_classes, head.norm_cfg.type) == ('FPNHead', 128, 150, 'SyncBN')
    assert (cfg.model.neck.out_channels, cfg.model.neck.num_outs) == (256, 4)
    assert cfg.optim_wrapper.clip_grad is None
    assert cfg.test_evaluator.iou_metrics == ['mIoU']


@pytest.mark.parametrize('path', [path for path in COCO + ADE20K if is_typical(path)], ids=name)
def test_every_parameter_learns_and_decays(path):
    family, _ = family_and_arch(path)
    rate, decay = (family.coco_rate, 0.05) if path in COCO else (2e-4, 1e-4)
    cfg = load(path)
    model = build(cfg).train()
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed = {id(p) for group in optimizer.param_groups if group['weight_decay'] == decay for p in group['params']}
    assert {group['lr'] for group in optimizer.param_groups} == {rate}
    assert all(p.requires_grad and id(p) in decayed for p in model.parameters())


def test_ade20k_test_images_go_up_to_multiples_of_32_and_the_ground_truth_keeps_its_size(tmp_path):
    """683 x 512 becomes 704 x 512 for the network; the labels stay as they were drawn."""
    from PIL import Image

    height, width = 300, 401
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(tmp_path / 'image.jpg')
    labels = rng.integers(0, 151, (height, width), np.uint8)
    Image.fromarray(labels).save(tmp_path / 'labels.png')
    results = dict(
        img_path=str(tmp_path / 'image.jpg'),
        seg_map_path=str(tmp_path / 'labels.png'),
        label_map=None,
        reduce_zero_label=True,
        seg_fields=[],
    )
    for split in ('val', 'test'):
        packed = dict(results, seg_fields=[])
        for step in load(ADE20K[0])[f'{split}_dataloader'].dataset.pipeline:
            packed = TRANSFORMS.build(step)(packed)
        assert packed['inputs'].shape == (3, 512, 704)  # 512 x 684.4 keeps the ratio
        truth = packed['data_samples'].gt_sem_seg.data[0].numpy()
        assert truth.shape == (height, width) == packed['data_samples'].ori_shape
        np.testing.assert_array_equal(truth, np.where(labels == 0, 255, labels.astype(int) - 1))


def test_every_family_has_the_two_configs_of_the_demo():
    found = sorted((family_and_arch(path)[0].name, path.parent.name) for path in SHAPES if 'rtmdet' not in path.stem)
    assert found == sorted((family.name, task) for family in FAMILIES for task in ('det', 'seg'))


@pytest.mark.parametrize('path', SHAPES, ids=name)
def test_shapes_configs_name_the_classes_of_the_data_set(path):
    cfg = load(path)
    if path in DETECTION:
        classes, palette = shapes.CLASSES, shapes.PALETTE
        found = cfg.model.roi_head.mask_head if has_masks(path) else cfg.model.bbox_head
    else:
        classes, palette, found = shapes.SEG_CLASSES, shapes.SEG_PALETTE, cfg.model.decode_head
    for split in ('train', 'val', 'test'):
        metainfo = cfg[f'{split}_dataloader'].dataset.metainfo
        assert tuple(metainfo.classes) == classes
        assert [tuple(color) for color in metainfo.palette] == palette
    assert found.num_classes == len(classes)


CUSTOM = [path for path in DETECTION + SEGMENTATION if path.stem.endswith('custom')]


def test_both_tasks_have_a_template():
    assert sorted(path.parent.name for path in CUSTOM) == ['det', 'seg']


@pytest.mark.parametrize('path', CUSTOM, ids=name)
def test_template_needs_no_change_but_above_its_line(path, tmp_path):
    """Other classes, paths and numbers of iterations reach everything that depends on them."""
    above, line, below = path.read_text().partition('# ' + '-' * 100)
    assert line and "_base_ = './" in above
    above = above.replace("_base_ = './", f"_base_ = '{path.parent}/").replace('data/custom', 'data/mine')
    above = re.sub(r'^classes = .*$', "classes = ('a', 'b', 'c', 'd', 'e')", above, flags=re.M)
    above = re.sub(r'^palette = .*$', 'palette = [[i, i, i] for i in range(5)]', above, flags=re.M)
    above = re.sub(r'^void = .*$', 'void = 11', above, flags=re.M)
    above = re.sub(r'^max_iters, batch_size = .*$', 'max_iters, batch_size = 600, 1', above, flags=re.M)
    mine = tmp_path / path.name
    mine.write_text(above + line + below)
    cfg = Config.fromfile(mine)
    assert [*wrong_heads(cfg.model, 5)] == [] and [*wrong_heads(cfg.model, 4)]
    paths = [where for _, where in wanted_paths(cfg, 'train', 'val', 'test')]
    assert len(paths) >= 4 and all(where.startswith('data/mine/') for where in paths)
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.metainfo.classes == ('a', 'b', 'c', 'd', 'e')
    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ('ResumableIterBasedTrainLoop', 600)
    rates = walk_learning_rate(cfg, 600, 600)
    base = 16 if path in DETECTION else 32
    assert rates.max() == pytest.approx(2e-4 / base**0.5) and rates.argmax() in (59, 60)
    assert rates[0] < rates.max() / 100 and rates[-1] < rates.max() / 30
    if path in SEGMENTATION:
        assert {cfg.model.decode_head.ignore_index, cfg.model.data_preprocessor.seg_pad_val} == {11}
        assert {cfg.val_evaluator.ignore_index, cfg.test_evaluator.ignore_index} == {11}
