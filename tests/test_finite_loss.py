"""A run whose loss or weights are no longer finite stops, and leaves its last good checkpoint."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from repvit_mm.checkpoint import read_checkpoint
from repvit_mm.hooks import BatchError, FiniteLossHook, NamedBatchHook, NonFiniteError
from repvit_mm.samples import SampleError


class Samples(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(inputs=torch.ones(1), data_samples=SimpleNamespace(img_path=f'{index}.jpg'))


class Net(BaseModel):
    """Its box loss is ``loss_at[i]`` in iteration ``i``, where that is given."""

    def __init__(self, loss_at: dict[int, float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.loss_at, self.iteration = loss_at, 0

    def forward(self, inputs: list[Tensor], data_samples: list, mode: str) -> dict[str, Tensor]:
        self.iteration += 1
        factor = self.loss_at.get(self.iteration, 1.0)
        return dict(loss_cls=self.weight.sum(), loss_bbox=self.weight.sum() * factor, acc=torch.tensor(float('nan')))


class Poison(Hook):
    """Behind a finite loss the weights become infinite."""

    priority = 'HIGH'

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter + 1 == 4:
            runner.model.weight.data.fill_(float('inf'))


def run(
    folder: Path,
    loss_at: dict[int, float] | None = None,
    hooks: tuple[Hook, ...] = (FiniteLossHook(),),
    model: BaseModel | None = None,
) -> Runner:
    """Eight iterations; a checkpoint after each second one, of which the latest alone stays."""
    loader = DataLoader(Samples(), 1, collate_fn=lambda items: {key: [item[key] for item in items] for key in items[0]})
    runner = Runner(
        model=model or Net(loss_at or {}),
        work_dir=str(folder),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=False, max_iters=8),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(
            checkpoint=dict(type='ResumableCheckpointHook', interval=2, by_epoch=False, max_keep_ckpts=1)
        ),
        custom_hooks=list(hooks),
        experiment_name=f'{folder.name}{id(hooks)}',
        log_level='ERROR',
    )
    runner.train()
    return runner


def test_a_finite_loss_is_left_alone(tmp_path):
    assert run(tmp_path).iter == 8


@pytest.mark.parametrize('value', [float('inf'), float('-inf'), float('nan')])
def test_run_stops_at_the_iteration(tmp_path, value):
    with pytest.raises(NonFiniteError) as caught:
        run(tmp_path, {4: value})
    message = str(caught.value)
    checkpoint = tmp_path / 'iter_2.pth'
    assert message.startswith(f'iteration 4: loss_bbox is {value}, on 3.jpg; the last good checkpoint is {checkpoint}.')
    assert '\n' not in message and '--keep-going' in message
    assert {path.name for path in tmp_path.glob('*.pth')} == {'iter_2.pth'}
    assert read_checkpoint(checkpoint)['state_dict']['weight'].isfinite().all()


def test_before_the_first_checkpoint(tmp_path):
    with pytest.raises(
        NonFiniteError, match=r'^iteration 1: loss_bbox is inf, on 0.jpg; no checkpoint was saved before'
    ):
        run(tmp_path, {1: float('inf')})


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The loss of iteration 4 was finite, and a checkpoint is due after it."""
    with pytest.raises(NonFiniteError, match=r'^iteration 4: the weights are no longer finite \(weight first\)'):
        run(tmp_path, hooks=(FiniteLossHook(), Poison()))
    assert {path.name for path in tmp_path.glob('*.pth')} == {'iter_2.pth'}
    assert read_checkpoint(tmp_path / 'iter_2.pth')['state_dict']['weight'].isfinite().all()


def test_without_the_hook_the_good_checkpoint_is_lost(tmp_path):
    """What MMEngine does by itself."""
    assert run(tmp_path, {4: float('nan')}, hooks=()).iter == 8
    assert {path.name for path in tmp_path.glob('*.pth')} == {'iter_8.pth'}
    assert read_checkpoint(tmp_path / 'iter_8.pth')['state_dict']['weight'].isnan().all()


class Failing(Net):
    """Its third step raises something."""

    def __init__(self, error: Exception, ignored: int | None = None) -> None:
        super().__init__({})
        self.error, self.num_classes = error, 7
        if ignored is not None:
            self.ignore_index = ignored

    def forward(self, inputs: list[Tensor], data_samples: list, mode: str) -> dict[str, Tensor]:
        if self.iteration == 2:
            for sample in data_samples:
                sample.gt_sem_seg, sample.seg_map_path = SimpleNamespace(data=torch.tensor([[0, 255, 6, 9]])), 'a.png'
            raise self.error
        return super().forward(inputs, data_samples, mode)


@pytest.mark.parametrize(
    ('model', 'error', 'expected'),
    [
        (Failing(ValueError('of no size')), BatchError, r'^iteration 3: ValueError: of no size, on 2.jpg$'),
        (
            Failing(IndexError('Target is out of bounds'), ignored=255),
            SampleError,
            r'^iteration 3: label 9 in a.png of 2.jpg is no class, expected 0 to 6, or 255 where nothing is learned: '
            'Target is out of bounds$',
        ),
        (Failing(ValueError('of no size'), ignored=9), SampleError, r'^iteration 3: label 255 in a.png'),
        (Failing(RuntimeError('[/gloo/pair.cc:1] closed')), RuntimeError, r'^\[/gloo/pair.cc:1\] closed$'),
    ],
)
def test_failing_step_names_its_images(tmp_path, model, error, expected):
    with pytest.raises(error, match=expected) as caught:
        run(tmp_path, hooks=(NamedBatchHook(),), model=model)
    assert type(caught.value) is error and '\n' not in str(caught.value)


def test_model_is_left_as_it_was(tmp_path):
    assert 'train_step' not in vars(run(tmp_path, hooks=(NamedBatchHook(),)).model)
    model = Net({})
    model.train_step = compiled = partial(model.train_step)
    assert run(tmp_path, hooks=(NamedBatchHook(),), model=model).model.train_step is compiled


def test_it_looks_before_a_checkpoint_is_saved():
    assert FiniteLossHook.priority == 'NORMAL' and CheckpointHook.priority == 'VERY_LOW'
