"""MMPretrain's classifiers and MMPose's estimators with our backbones: where those libraries can be imported."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDENS, Golden, image, imported, normalize, relative_error, settle
from mmengine.config import Config
from torch import Tensor, nn

from repvit_mm import switch_to_deploy
from repvit_mm.deploy.load import build_model
from repvit_mm.reparam import plain_formulation

pytestmark = pytest.mark.usefixtures('scope_restored')


def config(text: str) -> Config:
    return Config.fromstring(text, '.py')


def check_learns(model: nn.Module, batch: dict) -> None:
    loss, logged = model.train().parse_losses(model(**batch, mode='loss'))
    assert torch.isfinite(loss) and loss > 0, logged
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []


def check_fuses(model: nn.Module, x: Tensor) -> None:
    """The scores or maps of the head stay; a backbone that is a little off is noticed."""

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            found = model(x, None, mode='tensor')
        return list(found) if isinstance(found, tuple | list) else [found]

    settle(model.eval().backbone, x)
    with plain_formulation(model):
        expected = outputs()
    switch_to_deploy(model)
    assert model.backbone.deployed
    assert max(map(relative_error, outputs(), expected)) < 1e-4
    with torch.no_grad():
        next(model.backbone.stem.parameters()).mul_(1.1)
    assert max(map(relative_error, outputs(), expected)) > 1e-4


CLASSIFIERS = {
    'repvit': """
custom_imports = dict(imports=['repvit_mm', 'repvit_mm.pretrain'])
model = dict(
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6', out_indices=(3,)),
    head=dict(_delete_=True, type='RepViTHead', num_classes=10, in_channels=320, topk=(1, 5)),
)
""",
    'fastvit': """
custom_imports = dict(imports=['repvit_mm'])
model = dict(
    backbone=dict(_delete_=True, type='FastViT', arch='t8', out_indices=(3,)),
    head=dict(num_classes=10, in_channels=384),
)
""",
}


@pytest.mark.parametrize('family', CLASSIFIERS)
def test_mmpretrain_classifies(family):
    imported('mmpretrain.models')
    from mmpretrain.structures import DataSample

    cfg = config("_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'\n" + CLASSIFIERS[family])
    model = build_model(cfg)
    samples = [DataSample().set_gt_label(label) for label in (1, 7)]
    images = [torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in samples]
    batch = model.data_preprocessor(dict(inputs=images, data_samples=samples), training=True)
    check_learns(model, batch)
    check_fuses(model, batch['inputs'])
    predictions = model.test_step(dict(inputs=images, data_samples=samples))
    assert [prediction.pred_score.shape for prediction in predictions] == [(10,), (10,)]


@pytest.mark.parametrize(
    'golden', [golden for golden in GOLDENS if golden.name in ('repvit_m0_6', 'timm_repvit_m0_9')], ids=lambda g: g.name
)
def test_released_classifiers_load_whole_with_their_heads(golden: Golden, tmp_path, log):
    """Against both classifiers written out, on the maps of the golden files."""
    imported('mmpretrain.models')
    tensors = golden.state_dict()
    path = tmp_path / 'released.pth'
    torch.save(tensors if golden.timm else {golden.family.container: tensors}, path)
    weights = dict(type='Pretrained', checkpoint=str(path))
    channels, tap = golden.family.cls.specs[golden.arch].channels[-1], next(iter(golden.taps))
    cfg = config(
        f"""
default_scope = 'mmpretrain'
custom_imports = dict(imports=['repvit_mm', 'repvit_mm.pretrain'])
model = dict(
    type='ImageClassifier',
    backbone=dict(type='RepViT', arch='{golden.arch}', out_indices=(3,), tap='{tap}', init_cfg={weights}),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='RepViTHead', num_classes=1000, in_channels={channels}, init_cfg={weights}),
)
"""
    )
    model = build_model(cfg)
    model.backbone.init_cfg = weights
    model.init_weights()
    assert not [line for line in log if 'unexpected key' in line or 'missing key' in line]

    pooled = golden.maps(tap)[-1].mean((2, 3)).double()
    names = ('head.head', 'head.head_dist') if golden.timm else ('classifier.classifier', 'classifier.classifier_dist')
    expected = 0
    for name in names:
        given = {key: tensors[f'{name}.{key}'].double() for key in ('bn.weight', 'bn.bias', 'l.weight', 'l.bias')}
        norm = nn.BatchNorm1d(channels).double().eval()
        norm.load_state_dict({k: tensors[f'{name}.bn.{k}'] for k in norm.state_dict()})
        expected = expected + F.linear(normalize(pooled, norm), given['l.weight'], given['l.bias']) / 2
    model.double().eval()
    x = image().double()
    with torch.no_grad():
        assert relative_error(model(x), expected) < 1e-6
        switch_to_deploy(model)
        assert isinstance(model.head.classifiers, nn.Conv2d)
        assert relative_error(model(x), expected) < 1e-6


POSES = {
    'heatmap': """
_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_res50_8xb64-210e_coco-256x192.py'
custom_imports = dict(imports=['repvit_mm'])
model = dict(
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6', out_indices=(3,)),
    head=dict(in_channels=320),
)
""",
    'rtmpose': """
_base_ = 'mmpose::body_2d_keypoint/rtmpose/coco/rtmpose-t_8xb256-420e_aic-coco-256x192.py'
custom_imports = dict(imports=['repvit_mm'])
model = dict(
    backbone=dict(_delete_=True, type='RepViT', arch='m0_6', out_indices=(3,)),
    head=dict(in_channels=320),
)
""",
}


@pytest.mark.parametrize('kind', POSES)
def test_mmpose_estimates(kind):
    imported('mmpose.models')
    from mmpose.testing import get_packed_inputs

    model = build_model(config(POSES[kind]))
    data = get_packed_inputs(2, with_heatmap=kind == 'heatmap', with_simcc_label=kind == 'rtmpose')
    batch = model.data_preprocessor(copy.deepcopy(data), training=True)
    check_learns(model, batch)
    check_fuses(model, batch['inputs'])
    predictions = model.test_step(data)
    assert [p.pred_instances.keypoints.shape for p in predictions] == [(1, 17, 2), (1, 17, 2)]
