"""The base class of all backbones: everything but the blocks that a family is made of."""

import difflib
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from typing import Any, ClassVar

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .compat.pytorch import BatchNorm, before_loading, has_hooks, tree_of
from .layers import dilate, overwriting
from .loading import FAMILIES, Found, find_backbone, fit
from .messages import one_line
from .names import Naming
from .recompute import runs_eagerly
from .reparam import ReparamBlock, kernels_together, reparam_blocks, switch_to_deploy
from .specs import Top1

NUM_STAGES = 4
OUTPUT_STRIDES = (8, 16, 32)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ``ValueError`` that names the option and the nearest valid value unless ``value`` is a choice."""
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0)[0]
        raise ValueError(f'{name}={value!r}: expected one of {", ".join(choices)}; the nearest is {nearest!r}')


def check_out_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    """``out_indices`` as a tuple, or a ``ValueError`` unless they are increasing stage indices from 0 to 3."""
    indices = tuple(out_indices) if isinstance(out_indices, Sequence) else (out_indices,)
    clamped = {min(max(index, 0), NUM_STAGES - 1) for index in indices if isinstance(index, int)}
    nearest = tuple(sorted(clamped)) or (NUM_STAGES - 1,)
    if indices != nearest or not isinstance(out_indices, Sequence):
        raise ValueError(
            f'out_indices={out_indices!r}: expected stage indices from 0 to {NUM_STAGES - 1}, '
            f'each once and in increasing order; the nearest is {nearest}'
        )
    return indices


def options_of(cls: type['ReparamBackbone']) -> dict[str, inspect.Parameter]:
    """The options that a class of backbones takes, its own first."""
    return {
        name: parameter
        for base in cls.__mro__
        if issubclass(base, ReparamBackbone)
        for name, parameter in inspect.signature(base.__init__).parameters.items()
        if name != 'self' and parameter.kind is not parameter.VAR_KEYWORD
    }


def refuse_unknown(cls: type, unknown: Mapping[str, Any]) -> None:
    """Raise a ``TypeError`` that names the first unknown option and the nearest one that ``cls`` takes."""
    if not unknown:
        return
    name = next(iter(unknown))
    if name == 'pretrained':
        raise TypeError(
            f"{cls.__name__} takes no option 'pretrained': set model.pretrained=None in the config and give the "
            "backbone init_cfg=dict(type='Pretrained', checkpoint=...)"
        )
    options = list(options_of(cls))
    nearest = difflib.get_close_matches(name, options, n=1, cutoff=0)[0]
    raise TypeError(f'{cls.__name__} takes no option {name!r}: the nearest is {nearest!r} of {", ".join(options)}')


class RunningStatisticsKept:
    """Within the context a module's BatchNorms gather running statistics in copies, which are thrown away after it.

    It can be entered several times: each further backward pass through one graph does so.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [child for child in module.modules() if isinstance(child, BatchNorm)]

    def __enter__(self) -> None:
        self.buffers = [dict(norm.named_buffers(recurse=False)) for norm in self.norms]
        for norm, buffers in zip(self.norms, self.buffers, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer.clone())

    def __exit__(self, *error: object) -> None:
        for norm, buffers in zip(self.norms, self.buffers, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


def check_channels(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Check that a model's neck, or the head if there is none, takes the channels that this package's backbone gives.

    Args:
        model: The model.
        config: What it was built from.

    Raises:
        ValueError: if the numbers of channels differ; the message is one line that names the setting.
    """
    backbone = getattr(model, 'backbone', None)
    part = next((name for name in ('neck', 'decode_head') if isinstance(config.get(name), Mapping)), '')
    wanted = config[part].get('in_channels') if part else None
    if not isinstance(backbone, ReparamBackbone) or not isinstance(wanted, Sequence):
        return
    given = list(backbone.out_channels)
    index = config[part].get('in_index')
    if part == 'decode_head' and isinstance(index, Sequence):
        given = [given[i] for i in index if i < len(given)]
    if hasattr(getattr(model, part, None), 'widen_factor') and len(wanted) == len(given):
        check_widened(model, config)
    elif list(wanted) != given:
        raise ValueError(f'model.{part}.in_channels is {list(wanted)}, the backbone gives maps of {given} channels')


@torch.no_grad()
def check_widened(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Check that a neck and a head of MMYOLO take the channels that come to them, by handing them small maps.

    They multiply widths by a factor, and each kind rounds the products in its own way.

    Raises:
        ValueError: as :func:`check_channels`.
    """
    indices, like = model.backbone.out_indices, next(model.neck.parameters())
    maps = [
        like.new_zeros(1, width, 2 ** (indices[-1] - index), 2 ** (indices[-1] - index))
        for index, width in zip(indices, model.backbone.out_channels, strict=True)
    ]
    parts = [('neck', model.neck, config['neck'], 'backbone')]
    head = (config.get('bbox_head') or {}).get('head_module')
    if isinstance(head, Mapping):
        parts.append(('bbox_head.head_module', model.bbox_head.head_module, head, 'neck'))
    for name, part, settings, source in parts:
        wanted, given, trains = settings.get('in_channels'), [map_.shape[1] for map_ in maps], part.training
        part.eval()
        try:
            maps = part(maps)
        except (RuntimeError, AssertionError) as error:
            fitting = given[0] if isinstance(wanted, int) else given
            raise ValueError(
                f'model.{name} with in_channels={wanted} and widen_factor={settings.get("widen_factor", 1.0)} does not '
                f"take the {source}'s maps of {given} channels: set in_channels={fitting} and widen_factor=1.0 "
                f'({one_line(error)})'
            ) from error
        finally:
            part.train(trains)


def run_block(block: nn.Module, x: Tensor, with_cp: bool) -> Tensor:
    """A block's output; with checkpointing the block runs again in the backward pass and keeps only its input."""
    if not (with_cp and torch.is_grad_enabled()):
        return block(x)
    # The second run must not count its batch twice in live statistics.
    contexts = (nullcontext(), RunningStatisticsKept(block))
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: contexts)


class Stage(nn.Sequential):
    """The blocks of one stage.

    Args:
        blocks: The blocks.
        tapped: Index of the block that gives the stage's map, ``None`` if it is not wanted.
        with_cp: Recompute each block in the backward pass instead of keeping its maps.
    """

    def __init__(self, blocks: Sequence[nn.Module], tapped: int | None, with_cp: bool) -> None:
        super().__init__(*blocks)
        self.tapped = tapped
        self.with_cp = with_cp

    def forward(self, x: Tensor, maps: list[Tensor]) -> Tensor:
        """The output of the last block; the stage's map is appended to ``maps``."""
        for index, block in enumerate(self):
            x = run_block(block, x, self.with_cp)
            if index == self.tapped:
                maps.append(x)
        return x


class ReparamBackbone(BaseModule, ABC):
    """A stem and four stages of blocks; the maps behind the stages have strides 4, 8, 16 and 32, or are dilated.

    A subclass says what its stem and its stages are made of; options, taps, freezing, checkpoint names and deployment
    are the same for all families and live here. Stages and blocks behind the last tap are not built: their parameters
    would never get a gradient, and distributed training refuses such parameters.

    Args:
        arch: Name of a variant in ``specs``, or a dict with the fields of ``spec_type`` for one of your own.
        out_indices: Stages whose maps are returned, increasing, from 0 to 3.
        tap: Which block of a stage gives its map, a key of ``taps``.
        output_stride: Largest stride of a map. With 8 or 16 the later stages keep that resolution and dilate their
            convolutions instead, as DeepLab and PSPNet expect it; the weights are the same.
        drop_path_rate: Stochastic depth of the last block, in [0, 1); it grows linearly from 0 over the blocks. A
            network without residual branches accepts only 0.
        norm_eval: Keep all BatchNorm statistics frozen during training; weights and biases go on learning.
        frozen_stages: -1 freezes nothing, 0 the stem, k also the first k stages: statistics and parameters.
        with_cp: Recompute each block in the backward pass instead of keeping its maps.
        fold_frozen: Run each block whose statistics are frozen as the one convolution that it equals, with the
            gradients of its branches. ``False`` runs every branch.
        recompute: Where blocks run folded, compute the outputs of depthwise convolutions, gates and activations again
            in the backward pass instead of keeping them. ``False`` keeps them, and allows second derivatives.
        channels_last: On a CPU, compute in this memory format, in which convolutions are faster, unless branches learn.
            ``False`` computes in the format of the input.
        deploy: Build the network with its blocks already fused. It cannot be trained. Unfused checkpoints are fused
            on load.
        init_cfg: Initialization, e.g. ``dict(type='Pretrained', checkpoint=...)``; the authors' files load as they are.
            It replaces the ``pretrained`` that a base of MMSegmentation's may hand on.

    Raises:
        ValueError: if a value is not valid; names the option and the nearest valid value.
        TypeError: if an option does not exist; names the nearest one.
    """

    specs: ClassVar[Mapping[str, Any]]
    top1: ClassVar[Mapping[str, Top1]]
    """Published accuracy of those variants that have one."""
    spec_type: ClassVar[type]
    taps: ClassVar[Mapping[str, int]] = {'stage_end': 0}
    """Name of a tap -> how many blocks before the end of stages 0 to 2 it lies."""
    naming: ClassVar[Naming]
    optional: ClassVar[Mapping[str, str]] = {}
    """Prefixes of tensors that a checkpoint may omit -> what to do if only the checkpoint has them."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if ReparamBackbone in cls.__bases__:
            FAMILIES.append(cls)

    def __init__(
        self,
        arch: str | Mapping[str, Any],
        *,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        tap: str = 'stage_end',
        output_stride: int = 32,
        drop_path_rate: float = 0.0,
        norm_eval: bool = False,
        frozen_stages: int = -1,
        with_cp: bool = False,
        fold_frozen: bool = True,
        recompute: bool = True,
        channels_last: bool = True,
        deploy: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **unknown: Any,
    ) -> None:
        if init_cfg and 'pretrained' in unknown:  # a stock config of MMSegmentation's hands on what its ResNet reads
            left = unknown.pop('pretrained')
            print_log(f'{type(self).__name__}: init_cfg replaces pretrained={left!r}', 'current', logging.WARNING)
        refuse_unknown(type(self), unknown)
        super().__init__(init_cfg)
        self.spec = self._resolve_spec(arch)
        self.out_indices = check_out_indices(out_indices)
        check_choice('tap', tap, list(self.taps))
        self.tap = tap
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(f'output_stride={output_stride!r}: expected 32, or 16 or 8 by dilation')
        self.output_stride = output_stride
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate={drop_path_rate}: expected a rate from 0 to below 1')
        if frozen_stages not in range(-1, NUM_STAGES + 1):
            raise ValueError(
                f'frozen_stages={frozen_stages!r}: expected -1 (nothing), 0 (the stem) or k from 1 to {NUM_STAGES} '
                '(also the first k stages)'
            )
        self.norm_eval = norm_eval
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.fold_frozen = fold_frozen
        self.channels_last = channels_last

        before_loading(self, ReparamBackbone.take_every_form)

        self.stem = self._make_stem()
        lengths = self._residual_lengths()
        if drop_path_rate > 0 and not any(lengths):
            raise ValueError(
                f'drop_path_rate={drop_path_rate}: expected 0, {type(self).__name__} has no residual branches to drop'
            )
        last = max(sum(lengths) - 1, 1)
        rates = iter([drop_path_rate * position / last for position in range(sum(lengths))])
        stages = [
            self._make_stage(index, list(islice(rates, length)))
            for index, length in enumerate(lengths[: self.out_indices[-1] + 1])
        ]
        # No downsample follows the last stage, so every tap takes its last block.
        offsets = [self.taps[tap]] * (NUM_STAGES - 1) + [0]
        tapped = {index: len(stages[index]) - 1 - offsets[index] for index in self.out_indices}
        if min(tapped.values()) < 0:
            raise ValueError(f'tap={tap!r}: stage {min(tapped, key=tapped.get)} has no block before its last one')
        stages[-1] = stages[-1][: tapped[len(stages) - 1] + 1]
        self.stages = nn.ModuleList(Stage(blocks, tapped.get(index), with_cp) for index, blocks in enumerate(stages))
        dilations = [max(4 * 2**index // output_stride, 1) for index in range(NUM_STAGES)]
        for stage, before, dilation in zip(self.stages[1:], dilations, dilations[1:], strict=False):
            if dilation > 1:
                dilate(stage, before, dilation)

        for module in self.modules():
            if isinstance(module, ReparamBlock):
                module.folds = fold_frozen
                module.recomputes = recompute
        if deploy:
            switch_to_deploy(self)
            self.eval()
        self._freeze_stages()

    @classmethod
    def _resolve_spec(cls, arch: str | Mapping[str, Any]) -> Any:
        if isinstance(arch, str):
            check_choice('arch', arch, list(cls.specs))
            return cls.specs[arch]
        if not isinstance(arch, Mapping):
            raise TypeError(f'arch={arch!r}: expected a name or a dict, e.g. {next(iter(cls.specs))!r}')
        fields = list(inspect.signature(cls.spec_type).parameters)
        for name in arch:
            check_choice('field of arch', name, fields)
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in arch.items()}
        try:
            return cls.spec_type(**values)
        except TypeError as error:
            raise TypeError(f'arch={dict(arch)!r}: {error}') from None

    @abstractmethod
    def _make_stem(self) -> nn.Module:
        """The stem, ``(N, 3, H, W)`` to a map of stride 2 or 4."""

    @abstractmethod
    def _make_stage(self, index: int, drop_path_rates: Sequence[float]) -> list[nn.Module]:
        """The blocks of one stage; the map behind them has stride ``4 * 2 ** index``.

        Args:
            index: The stage, from 0 to 3.
            drop_path_rates: Stochastic depth of each of its residual blocks.
        """

    @abstractmethod
    def _stage_lengths(self) -> list[int]:
        """The number of blocks of each of the four stages."""

    def _residual_lengths(self) -> list[int]:
        """The number of blocks with stochastic depth of each of the four stages."""
        return self._stage_lengths()

    def _output(self, index: int, x: Tensor) -> Tensor:
        """The map to return of a stage whose tapped map is ``x``, of the same shape."""
        return x

    def options(self) -> dict[str, Any]:
        """Arguments that build a network of the same tensors, unfused."""
        return {'arch': asdict(self.spec), 'out_indices': self.out_indices, 'tap': self.tap}

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of the returned maps."""
        return tuple(self.spec.channels[index] for index in self.out_indices)

    @property
    def deployed(self) -> bool:
        """Whether no block is left to fuse."""
        return not reparam_blocks(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of the stages in ``out_indices``.

        Args:
            x: Images ``(N, 3, H, W)``, normalized, H and W at least 32.

        Returns:
            For each stage ``i`` in ``out_indices`` a map ``(N, C_i, ceil(H / s), ceil(W / s))`` in the input's memory
            format, ``s`` the smaller one of ``4 * 2 ** i`` and ``output_stride``.

        Raises:
            ValueError: if BatchNorm is to learn statistics from a single value.
        """
        if self.training and x.numel() <= 3 * self.output_stride**2:
            self._check_statistics(x)
        learns = torch.is_grad_enabled()
        if not runs_eagerly() or (learns and not self._runs_folded()):
            return self._maps(x)
        with overwriting(not any(map(has_hooks, tree_of(self)[1:]))):
            on_cpu = x.device.type == 'cpu'
            # Without gradients a CPU keeps its kernels.
            with nullcontext() if on_cpu and not learns else kernels_together(self):
                return self._maps_in_channels_last(x) if on_cpu and self.channels_last else self._maps(x)

    def _check_statistics(self, x: Tensor) -> None:
        """Refuse a single small image whose last map has one place, if a BatchNorm there takes its statistics."""
        if any(norm.training for norm in self.stages[-1].modules() if isinstance(norm, BatchNorm)):
            stride = min(4 * 2 ** (len(self.stages) - 1), self.output_stride)
            height, width = x.shape[-2:]
            if max(height, width) <= stride:
                raise ValueError(
                    f'one image of {width}x{height} pixels leaves BatchNorm a single value per channel to learn from: '
                    'train with more than one image, with larger ones, or with norm_eval=True'
                )

    def _maps_in_channels_last(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps, computed in channels_last and returned in the input's memory format.

        Convolutions are faster in this format on a CPU. Branches that learn do not use it: in oneDNN 3.12 the gradient
        of a strided 1x1 branch on three channels overruns its memory. The maps are converted back because some
        operators do not know the format: mmcv's RoIAlign reads it as if it were the usual one.
        """
        maps = self._maps(x.contiguous(memory_format=torch.channels_last))
        return maps if x.is_contiguous(memory_format=torch.channels_last) else tuple(m.contiguous() for m in maps)

    def _runs_folded(self) -> bool:
        return all(module.runs_folded() for module in tree_of(self) if isinstance(module, ReparamBlock))

    def _maps(self, x: Tensor) -> tuple[Tensor, ...]:
        maps: list[Tensor] = []
        x = run_block(self.stem, x, self.with_cp)
        for stage in self.stages:
            x = stage(x, maps)
        return tuple(self._output(index, x) for index, x in zip(self.out_indices, maps, strict=True))

    def _freeze_stages(self) -> None:
        frozen = [self.stem, *self.stages][: self.frozen_stages + 1]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'ReparamBackbone':
        """Set the mode, but keep frozen what ``norm_eval`` and ``frozen_stages`` say.

        Raises:
            RuntimeError: on ``train(True)`` of a fused network, which has no BatchNorm left to train.
        """
        if mode and self.deployed:
            raise RuntimeError(
                f'{type(self).__name__} is fused for deployment and cannot be trained: '
                'build it with deploy=False and load a checkpoint of the unfused network'
            )
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, BatchNorm):
                    module.eval()
        return self

    def take_every_form(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Translate a state dict that is being loaded, in whatever form it was released, into this network's own names.

        Raises:
            CheckpointError: strict or not, if it does not fit.
        """
        given = {
            name.removeprefix(prefix): state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)
        }
        # With a prefix, everything under it belongs to this network.
        found = Found(prefix, given, {}) if prefix else find_backbone(given, self.naming)
        for name, tensor in fit(self, found.tensors, len(found.others)).items():
            state_dict[prefix + name] = tensor

    def is_not_built(self, name: str) -> bool:
        """Whether the tensor belongs to a block that this spec has but this network, for its taps, does not build."""
        head, *indices = name.split('.')[:3]
        if head != 'stages' or len(indices) < 2 or not all(index.isdecimal() for index in indices):
            return False
        i, j = map(int, indices)
        built = len(self.stages) - 1, len(self.stages[-1]) - 1
        return i < NUM_STAGES and j < self._stage_lengths()[i] and (i, j) > built
