"""Every way to fuse gives one and the same network, whatever the checkpoint has been through."""

import copy
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import since_torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.structures import PixelData
from small_models import like_trained, small_config, small_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvit_mm import FuseOnDeployHook, RepViT
from repvit_mm.backbone import ReparamBackbone
from repvit_mm.deploy.graph import graph_of
from repvit_mm.deploy.load import build_model, fuse_model, load_model
from repvit_mm.deploy.verify import Tolerance, compare, framework_outputs, relative_error
from repvit_mm.reparam import plain_formulation, reparam_blocks

pytest.importorskip('mmcv.ops')
from mmdet.structures import DetDataSample
from mmseg.structures import SegDataSample

TOOLS = Path(__file__).parents[1] / 'tools'
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 96)).astype(np.float32)
EMA = dict(type='EMAHook', momentum=0.3, update_buffers=True)


def config(model: str = 'semantic_fpn', **backbone: object) -> Config:
    """A segmentor or a detector with a variant that checkpoints are recognized as, and only its head small."""
    cfg = small_config(model)
    cfg.model.backbone = dict(type='RepViT', arch='m0_6', init_cfg=None, **backbone)
    cfg.model.neck.in_channels = [40, 80, 160, 320]
    return cfg


def samples() -> list[dict]:
    """The images with random labels, as a data set gives them."""
    labels = torch.randint(7, (2, 1, 64, 96), generator=torch.Generator().manual_seed(0))
    meta = dict(img_shape=(64, 96), ori_shape=(64, 96))
    items = []
    for image, label in zip(torch.from_numpy(IMAGES).flip(1), labels, strict=True):
        sample = SegDataSample(metainfo=meta)
        sample.gt_sem_seg = PixelData(data=label)
        items.append(dict(inputs=image, data_samples=sample))
    return items


class Logits(BaseMetric):
    """Keeps the logits of each image."""

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        self.results += [sample['seg_logits']['data'].float().numpy() for sample in data_samples]

    def compute_metrics(self, results: list) -> dict[str, list]:
        return {'logits': np.stack(results)}


class MixedPrecision(OptimWrapper):
    """MMEngine's own wants a GPU."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


class Nothing(BaseMetric):
    """A run needs some metric."""

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        self.results += data_samples

    def compute_metrics(self, results: list) -> dict[str, int]:
        return {'images': len(results)}


def make_runner(model: nn.Module, work_dir: Path, *hooks: object, **options: object) -> Runner:
    loader = dict(
        batch_size=2,
        num_workers=0,
        dataset=samples(),
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='pseudo_collate'),
    )
    return Runner(
        model,
        work_dir=str(work_dir),
        experiment_name=f'run{len(list(work_dir.iterdir())) if work_dir.exists() else 0}',
        custom_hooks=list(hooks),
        **dict(test_dataloader=loader, test_cfg={}, test_evaluator=[Logits()]) | options,
    )


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """What training leaves: after mixed precision with an average, and what a wrapper for several processes saves."""
    folder = tmp_path_factory.mktemp('fusing')
    torch.manual_seed(0)
    model = like_trained(build_model(config()), torch.randn(2, 3, 128, 128))
    runner = make_runner(
        model,
        folder / 'train',
        EMA,
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            dataset=samples(),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=3),
        optim_wrapper=MixedPrecision(torch.optim.SGD(model.parameters(), lr=0.005)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=3)),
    )
    runner.train()
    trained = torch.load(folder / 'train/epoch_3.pth', weights_only=False)
    assert 'ema_state_dict' in trained
    content = {
        'ema': trained,
        'amp': {'meta': {}, 'state_dict': trained['state_dict']},
        'ddp': {'meta': {}, 'state_dict': {f'module.{name}': t for name, t in trained['state_dict'].items()}},
    }
    paths = {name: folder / f'{name}.pth' for name in content}
    for name, path in paths.items():
        torch.save(content[name], path)
    return paths


def logits_of(model: nn.Module) -> np.ndarray:
    return framework_outputs(model, 'segmentation', IMAGES, logits=True)['logits']


def reference(checkpoint: Path) -> np.ndarray:
    """The network as it was trained, branch by branch."""
    model = load_model(config(), checkpoint)
    with plain_formulation(model):
        return logits_of(model)


def by_hook(checkpoint: Path, folder: Path, **backbone: object) -> np.ndarray:
    """As ``tools/test.py --fuse``: the runner loads, the hook fuses, the averaged weights are exchanged."""
    hooks = [FuseOnDeployHook()] + ([EMA] if checkpoint.stem == 'ema' else [])
    model = build_model(config(**backbone))
    runner = make_runner(model, folder / 'hook', *hooks, load_from=str(checkpoint))
    logits = runner.test()['logits']
    assert_fused(model)
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            assert_fused(hook.ema_model)
    return logits


def by_exporter(checkpoint: Path, folder: Path, **backbone: object) -> np.ndarray:
    """As ``tools/export.py``."""
    model = load_model(config(**backbone), checkpoint, deploy=True)
    assert_fused(model)
    with torch.no_grad():
        logits = graph_of(model, logits=True).eval()(torch.from_numpy(IMAGES))
    return logits.numpy()


def by_converter(checkpoint: Path, folder: Path, **backbone: object) -> np.ndarray:
    """As ``tools/convert_checkpoint.py --fuse``, whose file the exporter then takes."""
    return by_exporter(convert(checkpoint, folder), folder, **backbone)


def convert(checkpoint: Path, folder: Path) -> Path:
    fused = folder / 'fused.pth'
    sys.path.append(str(TOOLS))
    importlib.import_module('convert_checkpoint').main([str(checkpoint), str(fused), '--fuse'])
    return fused


def assert_fused(model: nn.Module) -> None:
    assert not reparam_blocks(model)
    assert not [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


ROUTES = {'hook': by_hook, 'exporter': by_exporter, 'converter': by_converter}


class Renamed(RepViT):
    """A class that a user derives, given to a config as it is."""


@pytest.mark.parametrize(
    'backbone',
    [dict(type='RepViTRoadmap', step='se'), dict(type=Renamed, arch='m0_6'), dict(type='RepViT', arch='m0_6')],
)
def test_every_backbone_of_ours_is_built_fused(backbone):
    """So that a checkpoint whose backbone is fused already loads."""
    cfg = small_config('semantic_fpn')
    cfg.model.backbone = backbone
    cfg.model.neck.in_channels = list(MODELS.build(dict(backbone)).out_channels)
    assert not reparam_blocks(build_model(cfg, deploy=True).backbone)
    assert reparam_blocks(build_model(cfg).backbone)


@pytest.mark.slow
@pytest.mark.parametrize('route', ROUTES)
@pytest.mark.parametrize('form', ['ema', 'amp', 'ddp'])
def test_every_route_gives_the_trained_network(checkpoints, tmp_path, form, route):
    expected = reference(checkpoints[form])
    assert np.std(expected) > 0.05, 'there is something to compare'
    assert relative_error(ROUTES[route](checkpoints[form], tmp_path), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('route', ROUTES)
def test_every_route_gives_the_detectors_detections(tmp_path, route):
    """Mask R-CNN: boxes, scores and masks, the norms of its heads folded with those of its backbone."""
    cfg, checkpoint = config('mask_rcnn'), tmp_path / 'detector.pth'
    torch.manual_seed(0)
    model = like_trained(build_model(cfg), torch.randn(2, 3, 128, 128))
    torch.save({'meta': {}, 'state_dict': model.state_dict()}, checkpoint)
    with plain_formulation(model):
        expected = framework_outputs(model, 'detection', IMAGES)
    assert expected['count'].min() > 3 and expected['masks'].any()

    if route == 'hook':
        fused = build_model(cfg)
        sample = DetDataSample(metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96), scale_factor=(1.0, 1.0)))
        item = dict(inputs=torch.from_numpy(IMAGES[0]), data_samples=sample)
        loader = dict(dataset=[item], sampler=dict(type='DefaultSampler'), collate_fn=dict(type='pseudo_collate'))
        options = dict(test_dataloader=loader, test_evaluator=[Nothing()], load_from=str(checkpoint))
        make_runner(fused, tmp_path / 'hook', FuseOnDeployHook(), **options).test()
    else:
        if route == 'converter':
            checkpoint = convert(checkpoint, tmp_path)
        fused = load_model(cfg, checkpoint, deploy=True)
    assert_fused(fused)
    assert_same_detections(framework_outputs(fused, 'detection', IMAGES), expected)

    spoiled = copy.deepcopy(model)
    spoil(spoiled)
    with pytest.raises(AssertionError):
        assert_same_detections(framework_outputs(fuse_model(spoiled), 'detection', IMAGES), expected)


def assert_same_detections(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    difference = compare('detection', expected, found, Tolerance(boxes=0.01, scores=1e-4, masks=0.02))
    assert difference.tolerated, difference.text


@pytest.mark.slow
def test_averaged_weights_are_other_ones(checkpoints):
    """Without this the test above could not tell whether they were taken."""
    trained = torch.load(checkpoints['ema'], weights_only=False)
    source = trained['ema_state_dict']['module.decode_head.conv_seg.weight']
    assert not torch.equal(trained['state_dict']['decode_head.conv_seg.weight'], source)


@pytest.mark.slow
@pytest.mark.parametrize('options', [dict(frozen_stages=2), dict(norm_eval=True)], ids=str)
def test_frozen_networks(checkpoints, tmp_path, options):
    expected = reference(checkpoints['amp'])
    for route in (by_hook, by_exporter):
        assert relative_error(route(checkpoints['amp'], tmp_path, **options), expected) < 1e-5


@pytest.mark.parametrize('family', ['repvit', 'fastvit'])
@pytest.mark.parametrize(
    ('options', 'tolerance'),
    [
        (dict(), 1e-5),
        (dict(memory_format=torch.channels_last), 1e-5),
        (dict(dtype=torch.bfloat16), 5e-2),
        pytest.param(
            dict(dtype=torch.float16),
            5e-3,
            marks=[pytest.mark.slow, since_torch('2.6', 'convolution in float16')],
        ),
        pytest.param(dict(dtype=torch.bfloat16, memory_format=torch.channels_last), 5e-2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_formats(family, options, tolerance):
    """Fused in a format, and twice in a row, against the float32 network branch by branch."""
    model = small_model('semantic_fpn', family)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        with plain_formulation(model):
            expected = model(images, mode='tensor')
        fused = fuse_model(copy.deepcopy(model).to(**options))
        once = fused(images.to(**options), mode='tensor')
        again = fuse_model(fused)(images.to(**options), mode='tensor')
    assert_fused(fused)
    assert once.dtype == options.get('dtype', torch.float32)
    assert relative_error(once.float().numpy(), expected.numpy()) < tolerance
    assert torch.equal(again, once)


def spoil(model: nn.Module) -> Tensor:
    """A norm of one branch, changed."""
    backbone = next(module for module in model.modules() if isinstance(module, ReparamBackbone))
    norm = next(module for module in backbone.modules() if isinstance(module, _BatchNorm))
    norm.running_mean += 0.5
    return norm.running_mean


def test_broken_branch_shows():
    """The twin of the tests above."""
    model = small_model('semantic_fpn')
    expected = logits_of(model)
    spoil(model)
    assert relative_error(logits_of(fuse_model(model)), expected) > 1e-3
