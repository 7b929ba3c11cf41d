"""Half precision in evaluation: what computes in it, what does not, and what comes out."""

import copy

import numpy as np
import pytest
import torch
from helpers import SMALL, randomize, relative_error, slow_but
from torch import Tensor, nn

import repvit_mm.precision
from repvit_mm import switch_to_deploy
from repvit_mm.precision import PrecisionError, check_dtype, compute_in
from repvit_mm.reparam import reparam_blocks

HALF = torch.bfloat16


class Head(nn.Module):
    """A convolution whose name and place are those of a head's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 3, 1)

    def forward(self, maps: list[Tensor]) -> dict[str, list[Tensor]]:
        return {'maps': [self.conv(x) for x in maps]}


class Model(nn.Module):
    """Has the parts of a detector: a backbone, a neck, and heads one inside the other and in lists."""

    def __init__(self, family: str = 'repvit') -> None:
        super().__init__()
        cls, arch = SMALL[family]
        self.backbone = randomize(cls(arch))
        self.neck = nn.Sequential(nn.Conv2d(arch['channels'][-1], 8, 1, bias=False), nn.BatchNorm2d(8))
        self.roi_head = nn.Module()
        self.roi_head.bbox_head = nn.ModuleList([Head(8), Head(8)])
        self.roi_head.extractor = nn.Identity()
        self.seen: dict[str, torch.dtype] = {}
        for name, module in self.named_modules():
            if not name.startswith('backbone') or name == 'backbone':
                module.register_forward_hook(lambda _, args, y, name=name: self.see(name, y))

    def see(self, name: str, y: object) -> None:
        while not isinstance(y, Tensor):
            y = next(iter(y.values())) if isinstance(y, dict) else y[-1]
        self.seen[name] = y.dtype

    def forward(self, images: Tensor) -> Tensor:
        x = self.roi_head.extractor(self.neck(self.backbone(images)[-1]))
        first, second = self.roi_head.bbox_head
        # As MMDetection calls it, and as MMSegmentation does.
        return first([x])['maps'][0] + second.forward([x])['maps'][0]


@pytest.fixture(params=SMALL)
def model(request: pytest.FixtureRequest) -> Model:
    return Model(request.param).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64)


@torch.inference_mode()
def test_networks_compute_in_it_and_what_lies_between_does_not(model, images):
    expected = model(images)
    y = compute_in(model, HALF)(images)
    assert y.dtype is torch.float32 and 1e-4 < relative_error(y, expected) < 0.1
    head = 'roi_head.bbox_head.0'
    assert model.seen == {
        'backbone': HALF,  # which goes into the neck
        'neck.0': HALF,
        'neck.1': HALF,
        'neck': torch.float32,
        'roi_head.extractor': torch.float32,
        f'{head}.conv': HALF,
        head: torch.float32,
        'roi_head.bbox_head.1.conv': HALF,
        '': torch.float32,
    }


@torch.inference_mode()
def test_without_a_neck_the_maps_are_float32(model, images):
    model.neck = None
    assert {map_.dtype for map_ in compute_in(model, HALF).backbone(images)} == {torch.float32}


@torch.inference_mode()
def test_kernels_are_folded_before_they_are_rounded(model, images):
    expected = model(images)
    kernels = [block.equivalent_kernel() for block in reparam_blocks(model)]
    fused = compute_in(switch_to_deploy(copy.deepcopy(model)), HALF)
    assert {conv.weight.dtype for conv in fused.backbone.modules() if isinstance(conv, nn.Conv2d)} == {HALF}
    assert relative_error(fused(images), expected) < 0.1
    compute_in(model, HALF)(images)
    for before, block in zip(kernels, reparam_blocks(model), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, block.equivalent_kernel(), strict=True))
    # A head's layers may be called by others, who know nothing of bfloat16: DINO's are.
    assert {p.dtype for m in (model, fused) for p in m.roi_head.parameters()} == {torch.float32}


def test_which_device_computes_in_what(monkeypatch):
    monkeypatch.setattr(repvit_mm.precision, 'multiplies_bfloat16', lambda: True)
    assert check_dtype('bfloat16', 'cpu') == check_dtype('float16', 'cuda') == ''
    with pytest.raises(PrecisionError, match=r'^float16 is for accelerators'):
        check_dtype('float16', 'cpu')
    monkeypatch.setattr(repvit_mm.precision, 'multiplies_bfloat16', lambda: False)
    assert 'neither AVX512-BF16 nor AMX' in check_dtype('bfloat16', 'cpu')
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation, found=supported: found)
        assert bool(check_dtype('bfloat16', 'cuda')) != supported


@pytest.mark.needs_ops
@pytest.mark.parametrize('fused', [pytest.param(False, marks=pytest.mark.slow), True], ids=['unfused', 'fused'])
@pytest.mark.parametrize(
    'name', slow_but(['semantic_fpn', 'retinanet'], ['semantic_fpn', 'retinanet', 'mask_rcnn', 'cascade_mask_rcnn'])
)
def test_whole_models_predict_about_the_same(name, fused):
    from small_models import small_config, small_model

    from repvit_mm.deploy.load import fuse_model
    from repvit_mm.deploy.metadata import TASKS
    from repvit_mm.deploy.verify import framework_outputs

    model, task = small_model(name), TASKS[small_config(name).default_scope]
    images = np.random.default_rng(0).uniform(0, 255, (2, 3, 128, 128)).astype(np.float32)
    expected = framework_outputs(model, task, images)
    found = framework_outputs(compute_in(fuse_model(model) if fused else model, HALF), task, images)
    assert found.keys() == expected.keys()
    if task == 'segmentation':
        assert 0 < (found['labels'] != expected['labels']).mean() < 0.05
    else:
        best = expected['scores'][:, 0]
        assert (best > 0.05).all() and not np.array_equal(found['scores'], expected['scores'])
        assert np.abs(found['scores'][:, 0] - best).max() < 0.1
