"""MMDetection's and MMSegmentation's launchers and interfaces run their stock configs with the README's lines alone.

The data lie where the stock configs expect COCO and ADE20K. Sizes and numbers of iterations change by the launchers'
own ``--cfg-options``.
"""

import importlib
import json
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from helpers import relative_error
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from programs import launch, launch_anew
from pycocotools.mask import decode
from small_models import like_trained
from torch import Tensor

from repvit_mm import switch_to_deploy
from repvit_mm.checkpoint import read_checkpoint
from repvit_mm.datasets.shapes import write_shapes
from repvit_mm.deploy.load import build_model

sys.path.append(str(Path(__file__).parents[1] / 'tools'))
prepare_pretrained = importlib.import_module('_launch').prepare_pretrained

pytestmark = [pytest.mark.needs_ops, pytest.mark.slow, pytest.mark.usefixtures('scope_restored')]

README = Path(__file__).parents[1] / 'README.md'
(LINES,) = re.findall(r'^```python\n(_base_ = .*?)^```', README.read_text(), re.S | re.M)
SIDE = 96
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


@dataclass(frozen=True)
class Case:
    """A stock config.

    Args:
        library: The module whose config it is.
        name: Of the user's config, and of the folder of its runs.
        base: Of the stock config.
        scales: Which steps of the training and of the test pipeline have which size.
        short: Further options, for a short run.
        longer: What a resumed run changes.
        checkpoints: What is there after the first and after the resumed run.
        metric: What a test prints.
    """

    library: str
    name: str
    base: str
    scales: tuple[str, ...]
    short: tuple[str, ...]
    longer: str
    checkpoints: tuple[str, str]
    metric: str

    def __str__(self) -> str:
        return self.library

    @cached_property
    def tools(self) -> Path:
        """The folder of launchers that its wheel carries."""
        return Path(importlib.import_module(self.library).__file__).parent / '.mim' / 'tools'

    @property
    def options(self) -> list[str]:
        """What ``--cfg-options`` says."""
        workers = [f'{loader}.{key}' for loader in LOADERS for key in ('num_workers=0', 'persistent_workers=False')]
        scales = [f'{scale}=({SIDE},{SIDE})' for scale in self.scales]
        return ['randomness.seed=0', 'default_hooks.logger.interval=1', *workers, *scales, *self.short]


CASES = [
    Case(
        'mmdet',
        'detector',
        'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        tuple(f'{loader}.dataset.pipeline.{step}.scale' for loader, step in zip(LOADERS, (2, 1, 1), strict=True)),
        (
            'load_from=start.pth',
            'optim_wrapper.optimizer.lr=1e-4',
            'train_cfg.max_epochs=1',
            'model.train_cfg.rcnn.sampler.num=64',
            'model.train_cfg.rpn_proposal.max_per_img=100',
            'model.test_cfg.rpn.max_per_img=100',
            'model.test_cfg.rcnn.max_per_img=20',
        ),
        'train_cfg.max_epochs=2',
        ('epoch_1.pth', 'epoch_2.pth'),
        'bbox_mAP',
    ),
    Case(
        'mmseg',
        'segmentor',
        'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py',
        (
            *(f'{loader}.dataset.pipeline.{step}.scale' for loader, step in zip(LOADERS, (2, 1, 1), strict=True)),
            'train_dataloader.dataset.pipeline.3.crop_size',
            'model.data_preprocessor.size',
            'test_pipeline.1.scale',
        ),
        (
            'optim_wrapper.optimizer.lr=1e-4',
            'train_dataloader.batch_size=2',
            'train_cfg.max_iters=2',
            'train_cfg.val_interval=2',
            'default_hooks.checkpoint.interval=2',
        ),
        'train_cfg.max_iters=4',
        ('iter_2.pth', 'iter_4.pth'),
        'mIoU',
    ),
]


def config(base: str, weights: str) -> str:
    """The README's config of another base, with weights that are at hand in place of those that it would download."""
    text, bases = re.subn(r"^_base_ = '.*'$", f"_base_ = '{base}'", LINES, flags=re.M)
    text, addresses = re.subn(r"'https://.*?'", f"'{weights}'", text)
    assert bases == addresses == 1
    return text


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configs, data in the place of COCO and ADE20K, weights of the backbone, and of a whole detector."""
    folder = tmp_path_factory.mktemp('theirs')
    write_shapes(folder / 'data', train=4, val=2, size=SIDE)
    from mmdet.datasets import CocoDataset

    for path in (folder / 'data/coco/annotations').glob('*.json'):
        content = json.loads(path.read_text())
        names = enumerate(CocoDataset.METAINFO['classes'], 1)
        content['categories'] = [{'id': number, 'name': name} for number, name in names]
        path.write_text(json.dumps(content))
    for case in CASES:
        (folder / f'{case.name}.py').write_text(config(case.base, 'weights.pth'))
        hook = "custom_hooks = [dict(type='FuseOnDeployHook')]"
        (folder / f'{case.name}_fused.py').write_text(f"_base_ = '{case.name}.py'\n{hook}\n")
    images = [cv2.imread(str(path)) for path in (folder / 'data/coco/val2017').iterdir()]
    model = build_model(Config.fromfile(folder / f'{CASES[0].name}.py'))
    batch = {'inputs': [torch.from_numpy(image).permute(2, 0, 1) for image in images]}
    like_trained(model, model.data_preprocessor(batch)['inputs'])
    torch.save({'state_dict': model.state_dict()}, folder / 'start.pth')
    torch.save(model.backbone.state_dict(), folder / 'weights.pth')
    return folder


def output(done: subprocess.CompletedProcess) -> str:
    """What a run that succeeded has said."""
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    return said


def same(case: Case, found: Any, expected: Any) -> bool:
    """Whether the same is predicted for an image."""
    if case.library == 'mmdet':
        return same_instances(found.pred_instances, expected.pred_instances)
    assert len(expected.pred_sem_seg.data.unique()) > 1
    return relative_error(found.seg_logits.data, expected.seg_logits.data) < 1e-4


def same_instances(found: Any, expected: Any) -> bool:
    """The same of detections. A pixel whose value is next to the threshold may change sides."""
    classes = expected.get('labels')
    assert len(classes) > 5 and len(classes.unique()) > 1
    if not torch.equal(found.get('labels'), classes):
        return False
    masks = [pixels(instances.get('masks')) for instances in (found, expected)]
    assert masks[1].any()
    errors = [relative_error(found.get(name), expected.get(name)) for name in ('bboxes', 'scores')]
    return max(errors) < 1e-3 and (masks[0] != masks[1]).float().mean() < 1e-3


def pixels(masks: Tensor | list[dict]) -> Tensor:
    """Masks of shape (N, H, W), which files and plain results hold run by run."""
    return masks if isinstance(masks, Tensor) else torch.from_numpy(decode(masks)).permute(2, 0, 1).bool()


def written(folder: Path, case: Case, out: str) -> list[Any]:
    """The predictions that a test run has written."""
    if case.library == 'mmdet':
        return [sample['pred_instances'] for sample in pickle.loads((folder / out).read_bytes())]
    return [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in sorted((folder / out).glob('*.png'))]


@pytest.fixture(scope='module', params=CASES, ids=str)
def trained(request: pytest.FixtureRequest, folder: Path) -> Case:
    """A stock config that was trained, stopped and resumed, each time by the library's own launcher.

    ``mim train`` starts the launcher in the first way. So no module has been imported but by the launcher and the
    config.
    """
    case = request.param
    train, work_dir = case.tools / 'train.py', ('--work-dir', case.name)
    assert '--gpus' not in train.read_text(), 'mim would add options'
    command = (folder, train, f'{case.name}.py')
    said = output(launch_anew(*command, '--launcher', 'none', *work_dir, '--cfg-options', *case.options))
    assert re.search(r'weights.pth: RepViT \w+, training form, our names: (\d+)/\1 backbone tensors loaded', said)
    first, last = (folder / case.name / name for name in case.checkpoints)
    assert first.is_file() and not last.exists()
    said = output(launch(*command, *work_dir, '--resume', '--cfg-options', *case.options, case.longer))
    assert re.search('resumed epoch: [01], iter: 2', said) and last.is_file()
    return case


@pytest.mark.parametrize('case', CASES, ids=str)
def test_our_own_launchers_take_the_same_lines(folder, case):
    """Without the weights too, which a stock segmentor names beside its backbone."""
    cfg = Config.fromfile(folder / f'{case.name}.py')
    assert build_model(cfg).backbone.init_cfg is None
    prepare_pretrained(cfg, 'none')
    with DefaultScope.overwrite_default_scope(case.library):
        assert MODELS.build(cfg.model).backbone.init_cfg is None


def test_training_starts_from_the_weights_that_the_lines_name(folder, trained):
    """Statistics stay as they are (``norm_eval``), while weights are learned."""
    weights = read_checkpoint(folder / 'weights.pth')
    first, last = (read_checkpoint(folder / trained.name / name)['state_dict'] for name in trained.checkpoints)
    for name, tensor in weights.items():
        if name.endswith(('running_mean', 'running_var')):
            assert torch.equal(first[f'backbone.{name}'], tensor) and torch.equal(last[f'backbone.{name}'], tensor)
    moved = [name for name in weights if not torch.equal(first[f'backbone.{name}'], last[f'backbone.{name}'])]
    assert len(moved) > 100
    assert max(relative_error(last[f'backbone.{name}'], weights[name]) for name in moved) < 0.1


def test_their_launcher_tests_the_same_unfused_and_fused_by_the_hook(folder, trained):
    name, checkpoint = trained.name, f'{trained.name}/{trained.checkpoints[1]}'
    unfused, fused = (f'{name}{form}{".pkl" * (trained.library == "mmdet")}' for form in ('_out', '_fused_out'))
    command = (folder, trained.tools / 'test.py')
    end = ('--cfg-options', *trained.options)
    plain = output(launch(*command, f'{name}.py', checkpoint, '--work-dir', 'tests', '--out', unfused, *end))
    # As `mim test` does.
    arguments = (f'{name}_fused.py', checkpoint, '--launcher', 'none', '--work-dir', 'tests', '--out', fused)
    said = output(launch_anew(*command, *arguments, *end))
    assert 'FuseOnDeployHook: fused' in said and 'FuseOnDeployHook' not in plain
    metrics = [re.findall(rf'{trained.metric}: +(-?[\d.]+)', text) for text in (plain, said)]
    assert metrics[0] and metrics[0] == metrics[1]
    pairs = list(zip(written(folder, trained, fused), written(folder, trained, unfused), strict=True))
    assert len(pairs) == 2
    for found, expected in pairs:
        if trained.library == 'mmdet':
            assert same_instances(found, expected)
        else:
            assert len(np.unique(expected)) > 1 and (found != expected).mean() < 1e-3


def test_their_interfaces_predict_the_same_before_and_after_fusing(folder, trained, monkeypatch):
    """With the config that the launcher wrote beside the checkpoint."""
    monkeypatch.chdir(folder)
    apis = importlib.import_module(f'{trained.library}.apis')
    if trained.library == 'mmdet':
        init, infer, Inferencer = apis.init_detector, apis.inference_detector, apis.DetInferencer
    else:
        init, infer, Inferencer = apis.init_model, apis.inference_model, apis.MMSegInferencer
    config, checkpoint = (f'{trained.name}/{name}' for name in (f'{trained.name}.py', trained.checkpoints[1]))
    image = str(next((folder / 'data/coco/val2017').iterdir()))

    model = init(config, checkpoint, device='cpu')
    assert not model.backbone.deployed
    expected = infer(model, image)
    switch_to_deploy(model)
    assert model.backbone.deployed
    assert same(trained, infer(model, image), expected)
    kernel = next(model.backbone.parameters())
    kernel.data *= 1.1
    assert not same(trained, infer(model, image), expected)

    inferencer = Inferencer(config, checkpoint, device='cpu')
    for deployed in (False, True):
        assert inferencer.model.backbone.deployed is deployed
        told = inferencer(image)['predictions']
        if trained.library == 'mmdet':
            tensors = {name: torch.tensor(told[0][name]) for name in ('bboxes', 'labels', 'scores')}
            assert same_instances(tensors | {'masks': told[0]['masks']}, expected.pred_instances)
        else:
            assert (told != expected.pred_sem_seg.data[0].numpy()).mean() < 1e-3
        switch_to_deploy(inferencer.model)
