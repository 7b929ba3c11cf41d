"""Our models behind MMDetection's and MMSegmentation's own Python interfaces, from any file, unfused and fused."""

import copy
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import relative_error, slow_but
from mmengine.config import Config
from mmengine.registry import DefaultScope
from small_models import small_config, small_model
from torch import Tensor, nn

from repvit_mm import RepViT, switch_to_deploy

pytestmark = pytest.mark.needs_ops

CONFIGS = {'det': 'retinanet', 'seg': 'semantic_fpn'}
CLASSES = {'det': 5, 'seg': 7}
FORMS = ['ours', *(pytest.param(form, marks=pytest.mark.slow) for form in ('authors', 'fused', 'safetensors'))]


@pytest.fixture(autouse=True)
def scope_restored() -> Iterator[None]:
    before = copy.copy(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


@pytest.fixture(scope='module')
def models() -> dict[str, nn.Module]:
    return {task: small_model(name) for task, name in CONFIGS.items()}


def meta(task: str) -> dict:
    """What a run of MMEngine's writes of its classes."""
    count = CLASSES[task]
    palette = [(30 * index, 80, 200) for index in range(count)]
    return {'dataset_meta': {'classes': tuple('abcdefg'[:count]), 'palette': palette}}


@pytest.fixture
def file(models: dict[str, nn.Module], task: str, form: str, tmp_path: Path) -> Path:
    """A checkpoint of the task's model in one form."""
    model = models[task]
    if form == 'safetensors':
        path = tmp_path / 'model.safetensors'
        safetensors.torch.save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)
        return path
    tensors = (switch_to_deploy(copy.deepcopy(model)) if form == 'fused' else model).state_dict()
    if form == 'authors':
        ours = [name.removeprefix('backbone.') for name in tensors if name.startswith('backbone.')]
        names = {f'backbone.{o}': f'backbone.{t}' for o, t in RepViT.naming.translate(ours, 'authors').items()}
        tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
        assert any(name.startswith('backbone.features.') for name in tensors)
    path = tmp_path / 'model.pth'
    torch.save({'meta': meta(task), 'state_dict': tensors}, path)
    return path


def config(task: str, form: str) -> Config:
    cfg = small_config(CONFIGS[task], deploy=form == 'fused')
    for step in cfg.test_dataloader.dataset.pipeline:
        if step.type == 'Resize':
            step.scale = (128, 96)
    return cfg


def tensors_of(task: str, prediction: Any) -> list[Tensor]:
    if task == 'det':
        instances = prediction.pred_instances
        assert len(instances) > 5
        return [instances.bboxes, instances.scores]
    assert len(prediction.pred_sem_seg.data.unique()) > 1
    return [prediction.seg_logits.data]


def same(task: str, prediction: Any, expected: Any) -> bool:
    pairs = zip(tensors_of(task, prediction), tensors_of(task, expected), strict=True)
    return max(relative_error(actual, wanted) for actual, wanted in pairs) < 1e-4


@pytest.fixture(scope='module')
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)


@pytest.mark.parametrize('task', CONFIGS)
@pytest.mark.parametrize('form', FORMS)
def test_model_from_a_config_and_a_file(models, task, form, file, image):
    if task == 'det':
        from mmdet.apis import inference_detector as infer
        from mmdet.apis import init_detector as init
    else:
        from mmseg.apis import inference_model as infer
        from mmseg.apis import init_model as init
    model = init(config(task, form), str(file), device='cpu')
    reference = copy.deepcopy(models[task])
    reference.cfg = config(task, form)
    expected = infer(reference, image)
    assert model.backbone.deployed is (form == 'fused')
    assert same(task, infer(model, image), expected)
    if form != 'safetensors':  # which has no room for the names of classes
        assert model.dataset_meta['classes'] == meta(task)['dataset_meta']['classes']
    switch_to_deploy(model)
    assert model.backbone.deployed
    assert same(task, infer(model, image), expected)


@pytest.mark.parametrize('task', slow_but(['seg'], CONFIGS))
@pytest.mark.parametrize('form', FORMS)
def test_inferencer(models, task, form, file, image):
    if task == 'det':
        from mmdet.apis import DetInferencer as Inferencer
    else:
        from mmseg.apis import MMSegInferencer as Inferencer

    # MMDetection 3.0 spells it without the last letter.
    samples = next(name for name in signature(Inferencer.__call__).parameters if name.startswith('return_datasample'))

    def predict(inferencer: Any) -> Any:
        result = inferencer(image, **{samples: True})
        return result['predictions'][0] if task == 'det' else result

    inferencer = Inferencer(config(task, form), str(file), device='cpu')
    unfused = predict(inferencer)
    switch_to_deploy(inferencer.model)
    assert inferencer.model.backbone.deployed
    assert same(task, predict(inferencer), unfused)
    inferencer.model = models[task]
    assert same(task, predict(inferencer), unfused)
