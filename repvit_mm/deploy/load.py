"""Loads the model that is exported from a config and a checkpoint, and makes the description of its file."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from torch import nn

from .._versions import DISTRIBUTIONS
from ..checkpoint import cached, tensors_of
from ..fingerprint import digest_of
from ..fold import fold_conv_norms
from ..loading import FAMILIES, check_outside_backbones
from ..messages import one_line
from ..reparam import reparam_blocks, switch_to_deploy
from .graph import ExportError, Graph
from .metadata import FileInfo


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Args:
        source: Its path or address.
        content: What it holds.
    """

    source: str
    content: Any

    @property
    def meta(self) -> Mapping[str, Any]:
        """Its training metadata; empty if it has none."""
        meta = self.content.get('meta') if isinstance(self.content, Mapping) else None
        return meta if isinstance(meta, Mapping) else {}

    @property
    def path(self) -> Path:
        """Its file; if it was downloaded, the copy in the cache."""
        return cached(self.source) if '://' in self.source else Path(self.source).expanduser()


def read_checkpoint(checkpoint: str | Path | Checkpoint) -> Checkpoint:
    """Read a checkpoint by the package's own reader; one that was read already is returned as it is.

    Raises:
        CheckpointError: if it cannot be read.
    """
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    source = str(checkpoint)
    return Checkpoint(source, CheckpointLoader.load_checkpoint(source, 'cpu', logger='silent'))


def load_model(cfg: Config, checkpoint: str | Path | Checkpoint, deploy: bool = False) -> nn.Module:
    """A config's model with a checkpoint's weights, in ``eval`` mode.

    Args:
        cfg: The config.
        checkpoint: The checkpoint, its path or its address.
        deploy: Whether to fuse the whole model; then the checkpoint's backbone may be fused already. If not, the model
            is what the config says.

    Raises:
        ExportError: if the config's model cannot be built.
        CheckpointError: if the checkpoint cannot be read, or does not fit the model, its heads included.
    """
    model = build_model(cfg, deploy)
    checkpoint = read_checkpoint(checkpoint)
    check_outside_backbones(model, checkpoint.content, checkpoint.source)
    # Not strict: a file may hold more than the model, and old files lack BatchNorm's batch counters.
    tensors = {name.removeprefix('module.'): tensor for name, tensor in tensors_of(checkpoint.content).items()}
    model.load_state_dict(tensors, strict=False)
    return fuse_model(model) if deploy else model


def build_model(cfg: Config, deploy: bool = False) -> nn.Module:
    """A config's model with random weights, in ``eval`` mode.

    Args:
        cfg: The config.
        deploy: Whether to build its backbone fused, if it is one of this package's.

    Raises:
        ExportError: if it cannot be built.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = copy.deepcopy(cfg.model)
    model.pop('pretrained', None)  # what they would download is overwritten
    if isinstance(model.get('backbone'), dict):
        model.backbone.init_cfg = None
        if deploy and is_fusable(model.backbone.get('type')):
            model.backbone.deploy = True
    try:
        # A test runs in one process: SyncBN becomes BN.
        return revert_sync_batchnorm(MODELS.build(model)).eval()
    except Exception as error:  # anything can be wrong in a config
        raise ExportError(f'the model cannot be built: {one_line(error)}') from error


def is_fusable(backbone: str | type | None) -> bool:
    """Whether a config's backbone, a name or a class, is one of this package's or derived from it."""
    cls = MODELS.get(backbone) if isinstance(backbone, str) else backbone
    return isinstance(cls, type) and issubclass(cls, tuple(FAMILIES))


def fuse_model(model: nn.Module) -> nn.Module:
    """Fuse a whole model in place: the blocks of its backbone, and the norms behind the convolutions of the rest.

    Args:
        model: A model in ``eval`` mode, fused or not.

    Returns:
        The same model.
    """
    count = len(reparam_blocks(model))
    if count:
        print_log(f'{count} blocks of the backbone fused', 'current', logging.INFO)
    switch_to_deploy(model)
    fold_conv_norms(model)
    return model


def describe(cfg: Config, checkpoint: str | Path | Checkpoint | None, graph: Graph, **fields: Any) -> FileInfo:
    """The description of an exported file.

    Args:
        cfg: The config.
        checkpoint: The checkpoint with the graph's weights, its path or its address; ``None`` for random weights.
        graph: What is exported.
        fields: Further fields of :class:`~repvit_mm.deploy.metadata.FileInfo`.
    """
    checkpoint = None if checkpoint is None else read_checkpoint(checkpoint)
    classes, palette = ((), ()) if graph.task == 'backbone' else class_names(cfg, checkpoint)
    preprocess = graph.preprocess
    known: dict[str, Any] = dict(
        task=graph.task,
        outputs=graph.outputs,
        classes=classes,
        palette=palette,
        mean=tuple(preprocess.mean.flatten().tolist()),
        std=tuple(preprocess.std.flatten().tolist()),
        divisor=preprocess.divisor,
        mask_threshold=graph.mask_threshold,
        config=Path(cfg.filename).name if cfg.filename else '',
        versions=versions(('repvit_mm', *DISTRIBUTIONS)),
        **resizing(cfg),
    )
    if checkpoint is not None:
        path = checkpoint.path
        known |= {'checkpoint': path.name, 'sha256': digest_of(path)}
    return FileInfo(**known | fields)


def class_names(
    cfg: Config, checkpoint: str | Path | Checkpoint | None
) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Names and colours of a model's classes, from the checkpoint or else from the config's test data set."""
    meta = {} if checkpoint is None else read_checkpoint(checkpoint).meta
    # The keys of MMEngine, and of the 2.x libraries.
    found = dict(meta.get('dataset_meta') or {'classes': meta.get('CLASSES'), 'palette': meta.get('PALETTE')})
    if not (found.get('classes') and found.get('palette')) and (dataset := test_dataset(cfg)):
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        declared = DATASETS.build(dict(dataset, lazy_init=True)).metainfo  # the data may not be there
        if not found.get('classes'):
            found['classes'] = declared.get('classes')
        if len(declared.get('classes') or ()) == len(found['classes'] or ()):
            found['palette'] = found.get('palette') or declared.get('palette')
    classes, palette = found.get('classes') or (), found.get('palette')
    colours = palette if isinstance(palette, Sequence) and not isinstance(palette, str) else ()
    if colours and isinstance(colours[0], int):  # how MMDetection writes a single colour
        colours = [colours]
    return tuple(classes), tuple(tuple(int(value) for value in colour) for colour in colours)


def test_dataset(cfg: Config) -> Any:
    """The config of the first plain data set that a config tests on; empty if there is none."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    return next(plain_datasets(dataset))[1]


def plain_datasets(dataset: Mapping[str, Any], name: str = '') -> Iterator[tuple[str, Any]]:
    """The plain data sets inside wrappers such as ``RepeatDataset`` and ``ConcatDataset``: config and name of each."""
    if 'datasets' in dataset:
        for index, inner in enumerate(dataset['datasets']):
            yield from plain_datasets(inner, f'{name}.datasets.{index}')
    elif 'dataset' in dataset:
        yield from plain_datasets(dataset['dataset'], f'{name}.dataset')
    else:
        yield name, dataset


def resizing(cfg: Config) -> dict[str, Any]:
    """How a config's test pipeline resizes an image, as fields of :class:`~repvit_mm.deploy.metadata.FileInfo`."""
    pipeline = test_dataset(cfg).get('pipeline') or cfg.get('test_pipeline') or []
    steps = {step['type'].rpartition('.')[2] if isinstance(step['type'], str) else '': step for step in pipeline}
    fields: dict[str, Any] = {}
    if scale := steps.get('Resize', {}).get('scale'):
        fields = {'scale': tuple(scale), 'keep_ratio': bool(steps['Resize'].get('keep_ratio', False))}
    if 'ResizeToMultiple' in steps:
        fields['scale_divisor'] = steps['ResizeToMultiple'].get('size_divisor', 32)
    if size := steps.get('Pad', {}).get('size'):
        value = steps['Pad'].get('pad_val', 0)
        value = value.get('img', 0) if isinstance(value, Mapping) else value
        fields |= {'canvas': tuple(size), 'canvas_value': float(value[0] if isinstance(value, Sequence) else value)}
    return fields


def input_size(cfg: Config) -> tuple[int, int] | None:
    """Height and width in pixels of a config's input: its canvas, its crop or its test scale, if it has any."""
    fields = resizing(cfg)
    if 'canvas' in fields:
        return fields['canvas'][::-1]
    if size := (cfg.model.get('data_preprocessor') or {}).get('size'):
        return tuple(size)
    scale = fields.get('scale')
    return (min(scale), max(scale)) if scale else None


def versions(distributions: Sequence[str]) -> dict[str, str]:
    """The versions of those distributions that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def test_images(cfg: Config, count: int) -> list[np.ndarray]:
    """The first images of the data set that a config tests on, as its pipeline resizes them.

    Args:
        cfg: The config.
        count: How many at most.

    Returns:
        Arrays ``(3, H, W)``, float32, RGB, from 0 to 255; none if the data set is not there.
    """
    dataset = test_dataset(cfg)
    if not dataset:
        return []
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    try:
        built = DATASETS.build(dataset)
        inputs = [built[index]['inputs'] for index in range(min(count, len(built)))]
    except Exception as error:  # a data set that is not there may fail in any way, and it is not what is to be exported
        print_log(f'no real images: the test data set cannot be read ({error})', 'current', logging.WARNING)
        return []
    return [image.flip(0).to(torch.float32).numpy() for image in inputs]  # the frameworks load BGR
