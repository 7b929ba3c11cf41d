"""Long runs: memory and open files stay where they are."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from mmengine.config import Config
from programs import launch
from tiny import write_checkpoints, write_tiny

from repvit_mm.deploy.torch_predictor import ModelPredictor

pytestmark = [pytest.mark.needs_ops, pytest.mark.torture]

WARM_UP = 0.25
"""Part of a run in which memory may still grow: allocators and caches fill."""

PICTURE = Path(__file__).parents[2] / 'work_dirs/torture'

WATCH = """
import psutil
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Watch(Hook):
    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter % 20 == 0:
            process = psutil.Process()
            with open('memory.txt', 'a') as file:
                print(runner.iter, process.memory_info().rss, process.num_fds(), file=file)
"""


@pytest.fixture(scope='module')
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp('scene'))
    write_checkpoints(folder)
    (folder / 'watch.py').write_text(WATCH)
    with (folder / 'det.py').open('a') as config:
        config.write("custom_imports['imports'].append('watch')\ncustom_hooks = [dict(type='Watch')]\n")
    return folder


def check(title: str, samples: np.ndarray) -> None:
    """Memory grows by no more than 2% after the warm-up, and files that are opened are closed.

    Args:
        title: Of the picture.
        samples: ``(N, 3)``: number of the step, bytes of memory, open files.
    """
    draw(title, samples)
    steady = samples[len(samples) // int(1 / WARM_UP) :]
    first, last = (np.median(part[:, 1]) for part in np.array_split(steady, 5)[::4])
    assert last <= 1.02 * first, (
        f'{title}: {first / 2**20:.0f} MiB after the warm-up, {last / 2**20:.0f} MiB at the end'
    )
    assert steady[:, 2].max() == steady[:, 2].min(), f'{title}: open files from {steady[0, 2]} to {steady[-1, 2]}'
    print(f'{title}: {first / 2**20:.1f} MiB after the warm-up, {last / 2**20:.1f} MiB at the end')


def draw(title: str, samples: np.ndarray) -> None:
    """Leave a picture of the samples."""
    from matplotlib.figure import Figure

    figure = Figure((7, 3), layout='constrained')
    axes = figure.add_subplot(xlabel=title, ylabel='resident memory, MiB', ylim=(0, samples[:, 1].max() / 2**20 * 1.1))
    axes.plot(samples[:, 0], samples[:, 1] / 2**20)
    axes.axvline(samples[int(len(samples) * WARM_UP), 0], linestyle=':', color='grey', label='warm-up ends')
    axes.legend(loc='lower right')
    PICTURE.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE / f'{title.replace(" ", "_")}.png', dpi=120)


def test_training(scene: Path, tried) -> None:
    """2,000 steps, in 500 epochs."""
    options = ['train_cfg.max_epochs=500', 'train_cfg.val_interval=500', 'default_hooks.checkpoint.interval=100']
    done = launch(scene, 'train.py', 'det.py', '--work-dir', 'long', '--cfg-options', *options, PYTHONPATH=str(scene))
    assert done.returncode == 0, done.stderr[-2000:]
    samples = np.loadtxt(scene / 'memory.txt')
    assert len(samples) == 100
    check('training steps', samples)


@pytest.mark.parametrize(('task', 'count'), [('det', 2000), ('seg', 8000)])
def test_prediction(scene: Path, monkeypatch: pytest.MonkeyPatch, task: str, count: int) -> None:
    """10,000 images in all, of 20 sizes."""
    monkeypatch.syspath_prepend(scene)  # the detector's config imports its hook from there
    predictor = ModelPredictor(Config.fromfile(scene / f'{task}.py'), str(scene / f'{task}.pth'), fuse=True)
    check(f'predictions of {task}', np.array([*predict(predictor, count)]))


def predict(predictor: ModelPredictor, count: int) -> Iterator[tuple[int, int, int]]:
    """Predict, and sample memory and open files after every 1% of the images."""
    process = psutil.Process()
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*rng.integers(20, 90, 2), 3), np.uint8) for _ in range(20)]
    for number in range(count):
        predictor(images[number % len(images)])
        if number % (count // 100) == 0:
            yield number, process.memory_info().rss, process.num_fds()
