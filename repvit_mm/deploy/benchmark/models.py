"""Inference of a whole model by every route, each in a process of its own, in turns."""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import nn

from ...messages import one_line
from ...precision import check_dtype
from ...reparam import reparam_blocks, switch_to_deploy
from ..export import EXPORTERS, Exportable, Options, export, random_images, resized
from ..graph import ExportError
from ..load import build_model, fuse_model, load_model, test_images
from ..metadata import TASKS
from ..runtimes import RuntimeFileError, open_file
from ..timing import interleave
from ..verify import framework_outputs
from .measures import count_parameters
from .report import times
from .routes import FILES, LeftOut, Route, check, plain_copy, quantized
from .synthetic import make_trained_like
from .worker import Worker, WorkerError

FORMS = {
    'plain': dict(fold_frozen=False, recompute=False, channels_last=False),
    'folded': {},
    'fused': {},
    'fused_bf16': {},
    'compiled': {},
    'compiled_bf16': {},
}
"""Name of a route in torch -> the options of its backbone: ``plain`` runs the branches, as others would."""

UNFUSED = ('plain', 'folded')

ROUTES = (*FORMS, *FILES)

CALIBRATION = 32
"""Images that int8 files are calibrated on: enough to time them."""

MAP_TOLERANCE = 1e-4
"""Largest relative L2 error of a map of the backbone in torch."""


def build(cfg: Config, checkpoint: str | None) -> nn.Module:
    """The model of a config in ``eval`` mode, with a checkpoint's weights or with random ones.

    Raises:
        ExportError: if it cannot be built, or if its backbone has nothing to fold.
        CheckpointError: if the checkpoint does not fit it.
    """
    torch.manual_seed(0)
    model = load_model(cfg, checkpoint) if checkpoint else build_model(cfg)
    backbone = getattr(model, 'backbone', None)
    if not (backbone and reparam_blocks(backbone)):
        raise ExportError(f'the model has no block to fold: its backbone is {type(backbone).__name__}')
    if not checkpoint:
        make_trained_like(backbone, torch.randn(2, 3, 128, 128))
    return model


class Bench:
    """What the routes of one model start from, in a folder of their own.

    Args:
        cfg: The config.
        model: Its model, unfused, in ``eval`` mode.
        images: ``(N, 3, H, W)``, RGB, from 0 to 255.
        device: Where torch computes.
        folder: For files.
        files: Route -> its file, where there is one already. It is not compared again.
    """

    def __init__(
        self,
        cfg: Config,
        model: nn.Module,
        images: np.ndarray,
        device: torch.device,
        folder: Path,
        files: Mapping[str, Path],
    ) -> None:
        self.cfg = cfg
        self.fused = fuse_model(copy.deepcopy(model))
        self.images = images
        self.device = device
        self.folder = folder
        self.files = files
        self.common = {'threads': torch.get_num_threads(), 'images': str(folder / 'images.npy')}
        np.save(self.common['images'], images)
        self.weights = folder / 'weights.pth'
        torch.save(model.state_dict(), self.weights)

    def task(self, route: str) -> dict[str, Any]:
        """What the process of a route gets ready.

        Raises:
            LeftOut: if the route cannot be taken.
        """
        if route in FORMS:
            half = 'bfloat16' if route.endswith('_bf16') else None
            if half and (warning := check_dtype(half, self.device.type)):
                raise LeftOut(warning)
            cfg = copy.deepcopy(self.cfg)
            cfg.model.backbone.update(FORMS[route])
            path = self.folder / f'{route}.py'
            cfg.dump(path)
            return {
                'config': str(path),
                'weights': str(self.weights),
                'fuse': route not in UNFUSED,
                'half': half,
                'compile': route.startswith('compiled'),
                'device': str(self.device),
                'task': TASKS[cfg.default_scope],
                **self.common,
            }
        if self.device.type != 'cpu':
            raise LeftOut('measured on the CPU only')
        if route in self.files:
            return {'file': str(self.files[route]), **self.common}
        file = FILES[route]
        file.check()
        try:
            path = self.float_file(file.target, file.precision == 'bfloat16')
            return {'file': str(self.int8_file(path) if file.precision == 'int8' else path), **self.common}
        except (ExportError, RuntimeFileError) as error:
            raise LeftOut(one_line(error)) from None

    def float_file(self, target: str, bf16: bool = False) -> Path:
        """The exported file, which was compared with the model; made once.

        Args:
            target: A key of ``EXPORTERS``.
            bf16: Whether it shall compute in bfloat16.

        Raises:
            ExportError: if it cannot be made, or if it is not the model.
        """
        exporter = EXPORTERS[target]
        path = self.folder / f'{target}{"_bf16" if bf16 else ""}{exporter.suffix}'
        if not path.exists():
            dynamic = len(self.images) > 1 and exporter.dynamic
            options = Options(sizes=(self.images.shape[2:],), dynamic=dynamic, bf16=bf16)
            export(Exportable.prepare(self.fused, self.cfg, None, target, options), path, list(self.images), rounds=0)
        return path

    def int8_file(self, path: Path) -> Path:
        """A file in int8, which was compared with the float file.

        Raises:
            ExportError: if it is too far off.
            RuntimeFileError: if a library is missing.
        """
        from ..int8 import calibration_images, check_int8  # needs mmcv, which backbones do without

        reference = open_file(path)
        try:
            images = calibration_images(self.cfg, reference.info, CALIBRATION)
        except ExportError:  # no data set
            images = [image[None] for image in self.images]
        goal = quantized(path, images)
        check_int8(reference, open_file(goal), images[:1])
        return goal


def measure_model(
    name: str,
    model: nn.Module,
    cfg: Config,
    routes: Sequence[str],
    batch: int,
    size: tuple[int, int],
    rounds: int,
    device: torch.device,
    left_out: dict[str, str],
    files: Mapping[str, Path] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """The rows of one model and batch size.

    Args:
        name: Of the rows.
        model: The model, by :func:`build`.
        cfg: Its config.
        routes: Some of ``ROUTES``.
        batch: How many images a run takes.
        size: Their height and width in pixels. They are the first ones of the test data set, or noise without it.
        rounds: Counted rounds of the timing.
        device: Where torch computes; files run on the CPU.
        left_out: Routes that cannot be taken here are added with their reasons.
        files: Route -> its file, where there is one already; others are exported.

    Raises:
        WrongRoute: if the model is not the same in each form.
        LeftOut: if no route can be taken.
    """
    found = [resized(image, size) for image in test_images(cfg, batch)]
    images = np.concatenate(found * -(-batch // len(found)))[:batch] if found else random_images(batch, size)
    check_forms(name, model, images)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(cfg, model, images, device, folder, files)
        workers: dict[str, Worker] = {}
        for route in routes:
            try:
                workers[route] = stack.enter_context(Worker(bench.task(route)))
            except (LeftOut, WorkerError) as reason:
                left_out[f'{name} {route}'] = str(reason)
        if not workers:
            raise LeftOut(f'none of the routes can be taken here: {"; ".join(left_out.values())}')
        spreads = interleave(workers, rounds, device, name)
        first = next(iter(spreads.values()))
        return [
            {
                'name': name,
                'batch': batch,
                'route': route,
                'parameters': count_parameters(model if route in UNFUSED else bench.fused),
                **times(spread, first, batch),
                **workers[route].memory(),
            }
            for route, spread in spreads.items()
        ]


def check_forms(name: str, model: nn.Module, images: np.ndarray) -> None:
    """Compare the maps of the backbone: of its branches, folded and fused.

    Raises:
        WrongRoute: if they differ.
    """
    with ExitStack() as stack:
        twins = {
            'plain': plain_copy(model, stack),
            'folded': model,
            'fused': switch_to_deploy(copy.deepcopy(model)),
        }
        maps = {form: list(framework_outputs(twin, 'backbone', images).values()) for form, twin in twins.items()}
    for form, found in maps.items():
        check(f'{form} of {name}', Route(lambda found=found: found), maps['plain'], MAP_TOLERANCE)
