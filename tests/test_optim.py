"""Learning rates that fall from stage to stage, and mixed precision on a CPU, in MMEngine's own optimizer."""

import pytest
import torch
from helpers import relative_error
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn

from repvit_mm import RepViT
from repvit_mm.backbone import ReparamBackbone
from repvit_mm.compat.pytorch import autocast_dtype

RATE, DECAY = 0.1, 0.05


class Model(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))


def build_wrapper(model: nn.Module, **paramwise: float) -> OptimWrapper:
    return build_optim_wrapper(
        model,
        dict(
            constructor='StageDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=RATE, weight_decay=DECAY),
            paramwise_cfg=paramwise,
        ),
    )


def settings(model: nn.Module, wrapper: OptimWrapper) -> dict[str, tuple[float, float]]:
    """Parameter -> its learning rate and weight decay."""
    found = {
        id(parameter): (group['lr'], group['weight_decay'])
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    }
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


def test_stages_learn_at_falling_rates_and_norms_and_biases_do_not_decay():
    model = Model(RepViT(dict(channels=(8, 16, 24, 32), depths=(1, 1, 1, 1))))
    found = settings(model, build_wrapper(model, stage_decay=0.5, norm_decay_mult=0.0, bias_decay_mult=0.0))
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    power = {'backbone.stem': 5, 'backbone.stages.0': 4, 'backbone.stages.1': 3, 'backbone.stages.2': 2}
    power |= {'backbone.stages.3': 1, 'head': 0}
    assert len(found) == len(list(model.parameters()))
    for name, (rate, decay) in found.items():
        (exponent,) = (power for start, power in power.items() if name.startswith(f'{start}.'))
        assert rate == pytest.approx(RATE * 0.5**exponent), name
        plain = name.endswith('.bias') or name.rpartition('.')[0] in norms
        assert decay == (0.0 if plain else DECAY), name


def test_every_family_has_stages(build):
    """``build`` is the fixture that builds a small network of each kind."""
    backbone: ReparamBackbone = build()
    model = Model(backbone)
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor='StageDecayOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=1.0),
            paramwise_cfg=dict(stage_decay=0.5),
        ),
    )
    rates = {id(group['params'][0]): group['lr'] for group in wrapper.optimizer.param_groups}
    for distance, part in enumerate([*reversed(backbone.stages), backbone.stem], 1):
        assert {rates[id(parameter)] for parameter in part.parameters()} == {0.5**distance}
    assert {rates[id(parameter)] for parameter in model.head.parameters()} == {1.0}


def test_a_decay_of_one_is_mmengine_s_own():
    model = Model(RepViT(dict(channels=(8, 16, 24, 32), depths=(1, 1, 1, 1))))
    assert set(settings(model, build_wrapper(model, stage_decay=1.0)).values()) == {(RATE, DECAY)}


@pytest.mark.parametrize('decay', [0, -0.5, 1.1, float('nan')])
def test_a_wrong_decay_is_refused(decay):
    with pytest.raises(ValueError, match=r'paramwise_cfg\.stage_decay is'):
        build_wrapper(Model(RepViT('m0_6')), stage_decay=decay)


def test_a_model_of_others_is_refused():
    with pytest.raises(ValueError, match='no backbone of repvit_mm'):
        build_wrapper(Model(nn.Conv2d(3, 2, 1)), stage_decay=0.5)


def test_a_scheduler_moves_all_rates_alike():
    model = Model(RepViT(dict(channels=(8, 16, 24, 32), depths=(1, 1, 1, 1))))
    wrapper = build_wrapper(model, stage_decay=0.5)
    before = settings(model, wrapper)
    torch.optim.lr_scheduler.LambdaLR(wrapper.optimizer, lambda _: 0.1)
    after = settings(model, wrapper)
    assert all(after[name][0] == pytest.approx(0.1 * before[name][0]) for name in before)


class Detector(BaseModel):
    """One whose head takes no bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = RepViT('m0_6', norm_eval=True)
        self.seen: list[torch.dtype] = []
        self.backbone.stem.register_forward_hook(lambda module, args, maps: self.seen.append(maps.dtype))

    def extract_feat(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.backbone(images)

    def forward(self, inputs: torch.Tensor, mode: str) -> dict[str, torch.Tensor]:
        maps = self.extract_feat(inputs)
        assert autocast_dtype('cpu') is None
        assert all(one.dtype is torch.float32 for one in maps)
        return {'loss': sum(one.square().mean() for one in maps)}


def test_mixed_precision_on_a_cpu():
    torch.manual_seed(0)
    inputs = torch.randn(1, 3, 64, 64)
    gradients, seen = {}, {}
    for kind in ('OptimWrapper', 'CpuAmpOptimWrapper'):
        torch.manual_seed(1)
        model = Detector().train()
        wrapper = build_optim_wrapper(model, dict(type=kind, optimizer=dict(type='SGD', lr=1.0)))
        extract, before = model.extract_feat, nn.utils.parameters_to_vector(model.parameters()).detach()
        losses = model.train_step(dict(inputs=inputs), wrapper)
        assert losses['loss'].isfinite() and model.extract_feat == extract
        gradients[kind] = before - nn.utils.parameters_to_vector(model.parameters()).detach()
        seen[kind] = model.seen
    assert seen == {'OptimWrapper': [torch.float32], 'CpuAmpOptimWrapper': [torch.bfloat16]}
    assert 1e-4 < relative_error(gradients['CpuAmpOptimWrapper'], gradients['OptimWrapper']) < 0.1
