"""MMPretrain's classifiers and MMPose's estimators with our backbones, where those libraries are installed."""

import copy
import re

import numpy as np
import pytest
import torch
from helpers import DATA, GOLDENS, Golden, image, imported, relative_error, settle
from mmengine.config import Config
from mmengine.model import initialize
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from repvit_mm import switch_to_deploy
from repvit_mm.checkpoint import CheckpointError
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

    x = x.double()
    settle(model.double().eval().backbone, x)
    with plain_formulation(model):
        expected = outputs()
    switch_to_deploy(model)
    assert model.backbone.deployed
    assert max(map(relative_error, outputs(), expected)) < 1e-9
    with torch.no_grad():
        next(model.backbone.stem.parameters()).mul_(1.001)
    assert max(map(relative_error, outputs(), expected)) > 1e-9
    model.float()


@pytest.fixture
def mmpretrain() -> None:
    """MMPretrain's registries are asked first, as in its own runs, and know our heads."""
    imported('mmpretrain.datasets', 'mmpretrain.models', 'repvit_mm.pretrain')
    init_default_scope('mmpretrain')


CLASSIFIER = """
_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'
custom_imports = dict(imports=['repvit_mm', 'repvit_mm.pretrain'])
model = dict(
    backbone=dict(_delete_=True, type='mmengine.{0}', arch='{1}', out_indices=(3,)),
    neck=None,
    head=dict(_delete_=True, type='{0}Head', num_classes={3}, in_channels={2}, topk=(1, 5)),
)
"""


@pytest.mark.parametrize(
    ('family', 'arch', 'channels'), [('RepViT', 'm0_6', 320), ('FastViT', 't8', 384), ('MobileOne', 's0', 1024)]
)
def test_mmpretrain_classifies(mmpretrain, family, arch, channels):
    from mmpretrain.structures import DataSample

    model = build_model(config(CLASSIFIER.format(family, arch, channels, 10)))
    samples = [DataSample().set_gt_label(label) for label in (1, 7)]
    images = [torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in samples]
    batch = model.data_preprocessor(dict(inputs=images, data_samples=samples), training=True)
    check_learns(model, batch)
    check_fuses(model, batch['inputs'])
    predictions = model.test_step(dict(inputs=images, data_samples=samples))
    assert [prediction.pred_score.shape for prediction in predictions] == [(10,), (10,)]


AUTHORS_HEADS = {
    'repvit': {r'head\.head': 'classifier.classifier'},
    'fastvit': {
        r'final_conv\.conv_kxk': 'conv_exp.rbr_conv',
        r'final_conv\.conv_scale': 'conv_exp.rbr_scale',
        r'final_conv\.se\.fc1': 'conv_exp.se.reduce',
        r'final_conv\.se\.fc2': 'conv_exp.se.expand',
        r'head\.fc': 'head',
    },
    'mobileone': {r'head\.fc': 'linear'},
}
"""Family -> what timm's names of a classification head begin with -> the authors' names."""


def as_the_authors(golden: Golden) -> dict[str, Tensor]:
    """timm's tensors under the authors' names."""
    tensors = golden.state_dict()
    names = golden.backbone.naming.translate(tensors, to='authors')
    for name in (name for name in names if names[name] is None):
        ((start, theirs),) = ((s, t) for s, t in AUTHORS_HEADS[golden.family.name].items() if re.match(s, name))
        names[name] = re.sub(f'^{start}', theirs, name)
    shapes = {names[name]: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == Golden(golden.family, golden.arch, {}).shapes
    tensors = {names[name]: tensor for name, tensor in tensors.items()}
    return tensors if golden.family.container is None else {golden.family.container: tensors}


@pytest.mark.parametrize('name', ['timm_repvit_m0_9', 'timm_fastvit_t8', 'timm_mobileone_s0'])
def test_released_files_load_whole_with_their_heads(mmpretrain, name, tmp_path, log):
    """From either file the scores are timm's."""
    (golden,) = (golden for golden in GOLDENS if golden.name == name)
    family, channels = golden.backbone.__name__, golden.backbone.specs[golden.arch].channels[-1]
    torch.save(golden.state_dict(), tmp_path / 'timm.pth')
    torch.save(as_the_authors(golden), tmp_path / 'authors.pth')
    x = image().double()
    with np.load(DATA / 'timm_scores.npz') as scores:
        expected = torch.from_numpy(scores[name])
    model = build_model(config(CLASSIFIER.format(family, golden.arch, channels, 1000))).double().eval()
    with torch.no_grad():
        for file in tmp_path.iterdir():
            for tensor in model.state_dict().values():
                tensor.zero_()
            for part in (model.backbone, model.head):
                initialize(part, dict(type='Pretrained', checkpoint=str(file)))  # as init_weights does
            assert relative_error(model(x), expected) < 1e-6
        assert not [line for line in log if 'unexpected key' in line or 'missing key' in line]
        switch_to_deploy(model)
        assert not [name for name in model.state_dict() if 'running' in name]
        assert relative_error(model(x), expected) < 1e-6
        model.head.classifier.weight.mul_(1.001)
        assert relative_error(model(x), expected) > 1e-6


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(num_classes=10), r'of 10 classes: tensors of another shape: 2 \(classifier\.weight: .*1000'),
        (dict(in_channels=512), r'of 1000 classes: tensors of another shape: .* \(classifier\.weight'),
    ],
)
def test_file_of_another_classifier_is_refused(mmpretrain, options, words, tmp_path):
    (golden,) = (golden for golden in GOLDENS if golden.name == 'timm_mobileone_s0')
    torch.save(golden.state_dict(), tmp_path / 'released.pth')
    head = MODELS.build(dict(type='MobileOneHead', **{'num_classes': 1000, 'in_channels': 1024, **options}))
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    with pytest.raises(CheckpointError, match=r'released\.pth does not fit MobileOneHead ' + words):
        load_checkpoint(head, str(tmp_path / 'released.pth'))
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())


def test_pooled_features_are_refused(mmpretrain):
    head = MODELS.build(dict(type='MobileOneHead', num_classes=10, in_channels=8))
    with pytest.raises(ValueError, match=r'MobileOneHead pools .* set neck=None'):
        head((torch.ones(2, 8),))


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
