"""The logs of training runs, and their picture."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repvit_mm.logs import LogError, draw_runs, panels_of, read_run

MAIN = runpy.run_path(str(Path(__file__).parents[1] / 'tools/plot_log.py'))['main']


def write(folder: Path, start: str, *entries: dict, cut: bool = False) -> Path:
    """A log as MMEngine's LocalVisBackend leaves it."""
    file = folder / start / 'vis_data/scalars.json'
    file.parent.mkdir(parents=True)
    text = ''.join(json.dumps(entry) + '\n' for entry in entries)
    file.write_text(text[:-9] if cut else text)
    return folder


def step(iteration: int, loss: float, **more: float) -> dict:
    return {
        'lr': 0.1,
        'data_time': 0.1,
        'loss': loss,
        'loss_cls': loss / 2,
        'time': 1.0,
        'iter': iteration,
        'step': iteration,
        **more,
    }


def test_validation_stands_where_it_was_made(tmp_path):
    """Of a run by epochs it tells the epoch, of one by iterations the iteration."""
    epochs = write(tmp_path / 'a', '1', step(50, 2.0), step(100, 1.0), {'coco/bbox_mAP': 0.5, 'time': 1.0, 'step': 1})
    run = read_run(epochs)
    assert run.name == 'a' and run.metrics == {'coco/bbox_mAP'}
    assert run.series['loss'] == {50: 2.0, 100: 1.0} and run.series['coco/bbox_mAP'] == {100: 0.5}
    iterations = write(tmp_path / 'b', '1', step(50, 2.0), {'mIoU': 40.0, 'step': 70})
    assert read_run(iterations).series['mIoU'] == {70: 40.0}


def test_a_resumed_run_is_right_where_two_starts_overlap(tmp_path):
    write(tmp_path, '1', step(10, 9.0), step(20, 8.0), {'mIoU': 1.0, 'step': 20}, step(30, 7.0), cut=True)
    write(tmp_path, '2', step(20, 5.0), step(30, 4.0), {'mIoU': 2.0, 'step': 30})
    run = read_run(tmp_path)
    assert run.series['loss'] == {10: 9.0, 20: 5.0, 30: 4.0} and run.series['mIoU'] == {30: 2.0}


def test_panels_are_the_loss_its_parts_the_rate_and_the_metrics(tmp_path):
    run = read_run(write(tmp_path, '1', step(10, 9.0, acc=3.0, memory=7), {'mIoU': 1.0, 'step': 10}))
    assert panels_of([run]) == ['loss', 'loss_cls', 'lr', 'mIoU']


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (None, 'holds no log'),
        ('', 'its log is empty'),
        ('x\n{}\n', 'line 1 is not JSON'),
        ('[]\n', 'line 1 is no entry'),
    ],
)
def test_what_is_no_log_is_refused_in_one_line(tmp_path, content, message):
    if content is not None:
        write(tmp_path, '1')
        (tmp_path / '1/vis_data/scalars.json').write_text(content)
    with pytest.raises(LogError, match=message):
        read_run(tmp_path)
    with pytest.raises(SystemExit, match=message):
        MAIN([str(tmp_path), '--out', str(tmp_path / 'x.png')])
    assert not (tmp_path / 'x.png').exists()


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as picture:
        return {tuple(colour) for colour in np.unique(np.asarray(picture.convert('RGB')).reshape(-1, 3), axis=0)}


@pytest.mark.slow
def test_each_run_has_its_colour_and_metrics_can_be_chosen(tmp_path):
    first = write(tmp_path / 'first', '1', step(10, 9.0), step(20, 5.0), {'mIoU': 1.0, 'aAcc': 2.0, 'step': 20})
    second = write(tmp_path / 'second', '1', step(10, 8.0), step(20, 1e-4))
    MAIN([str(first), str(second), '--out', str(tmp_path / 'both.png'), '--metrics', 'mIoU'])
    blue, orange = (31, 119, 180), (255, 127, 14)
    assert {blue, orange} <= colours(tmp_path / 'both.png')
    draw_runs([read_run(first)], tmp_path / 'one.png')
    assert blue in colours(tmp_path / 'one.png') and orange not in colours(tmp_path / 'one.png')
    with Image.open(tmp_path / 'both.png') as both, Image.open(tmp_path / 'one.png') as one:
        assert both.size == one.size == (1650, 759)  # 4 and 5 panels, in two rows of three
