"""What a dense-prediction backbone of this package is, whatever its blocks are."""

import difflib
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .checkpoint import CheckpointError, describe_misfit, find_backbone, source_of, without_counters
from .names import WHOSE, Naming
from .reparam import ReparamBlock, kernels_together, reparam_blocks, runs_eagerly, switch_to_deploy, tree_of

NUM_STAGES = 4


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ``ValueError`` that names the option and the nearest valid value unless ``value`` is a choice."""
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0)[0]
        raise ValueError(f'{name}={value!r}: expected one of {", ".join(choices)}; the nearest is {nearest!r}')


def check_out_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    """``out_indices`` as a tuple, or a ``ValueError`` unless they are increasing stage indices from 0 to 3."""
    indices = tuple(out_indices) if isinstance(out_indices, Sequence) else (out_indices,)
    whole = {min(max(index, 0), NUM_STAGES - 1) for index in indices if isinstance(index, int)}
    nearest = tuple(sorted(whole)) or (NUM_STAGES - 1,)
    if indices != nearest or not isinstance(out_indices, Sequence):
        raise ValueError(
            f'out_indices={out_indices!r}: expected stage indices from 0 to {NUM_STAGES - 1}, '
            f'each once and in increasing order; the nearest is {nearest}'
        )
    return indices


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
    options = [option for option in inspect.signature(cls).parameters if option != 'unknown']
    nearest = difflib.get_close_matches(name, options, n=1, cutoff=0)[0]
    raise TypeError(f'{cls.__name__} takes no option {name!r}: the nearest is {nearest!r} of {", ".join(options)}')


class RunningStatisticsKept:
    """Within the context a module's BatchNorms gather running statistics in copies, which are thrown away after it.

    It can be entered again, as each further backward pass through one graph does.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]

    def __enter__(self) -> None:
        self.buffers = [dict(norm._buffers) for norm in self.norms]
        for norm in self.norms:
            norm._buffers.update({name: buffer.clone() for name, buffer in norm._buffers.items() if buffer is not None})

    def __exit__(self, *error: object) -> None:
        for norm, buffers in zip(self.norms, self.buffers, strict=True):
            norm._buffers.update(buffers)


def fused_blocks(names: Collection[str], blocks: Collection[str]) -> frozenset[str]:
    """Those of a network's outermost re-parameterizable blocks that tensor names hold as one convolution."""
    return frozenset(block for block in blocks if f'{block}.weight' in names)


def block_of(name: str, blocks: Collection[str]) -> str | None:
    """The block that a tensor belongs to, if it belongs to one."""
    while name and name not in blocks:
        name = name.rpartition('.')[0]
    return name or None


def form_of(names: Collection[str], blocks: Collection[str]) -> str:
    """The form of a network's tensors: ``'training'``, ``'fused'``, or ``'partly fused'`` as others' code leaves it."""
    fused = fused_blocks(names, blocks)
    if not fused:
        return 'training'
    return 'fused' if {block_of(name, blocks) for name in names} - {None} == fused else 'partly fused'


class Recognized(NamedTuple):
    """What tensors are: the class, the variants, several where fusing makes them equal, and the form."""

    family: 'type[ReparamBackbone]'
    archs: list[str]
    form: str


class ReparamBackbone(BaseModule, ABC):
    """A stem and four stages of blocks with maps at strides 4, 8, 16 and 32.

    A subclass says what its stem and its stages are made of; options, taps, freezing, checkpoint names and deployment
    are the same for all and live here. Stages and blocks behind the last tap are not built: their parameters would
    never get a gradient, which distributed training refuses.

    Args:
        arch: Name of a variant in ``specs``, or a dict with the fields of ``spec_type`` for one of your own.
        out_indices: Stages whose maps are returned, increasing, from 0 to 3.
        tap: Which block of a stage gives its map, a key of ``taps``.
        drop_path_rate: Stochastic depth of the last block, in [0, 1); it grows linearly from 0 over the blocks.
        norm_eval: Keep all BatchNorm statistics frozen during training; weights and biases go on learning.
        frozen_stages: -1 freezes nothing, 0 the stem, k also the first k stages: statistics and parameters.
        with_cp: Recompute each block in the backward pass instead of keeping its maps.
        fold_frozen: Run each block whose statistics are frozen as the one convolution that it equals, recompute in the
            backward pass what lies between the 1x1 convolutions; if all are frozen, compute in channels_last on a CPU.
            ``False`` runs and keeps every branch, in the memory format of the input.
        deploy: Build the network with its blocks already fused.
        init_cfg: Initialization, as everywhere in MMEngine.
    """

    specs: ClassVar[Mapping[str, Any]]
    spec_type: ClassVar[type]
    taps: ClassVar[Mapping[str, int]] = {'stage_end': 0}
    """Name of a tap -> how many blocks before the end of stages 0 to 2 it lies."""
    naming: ClassVar[Naming]
    optional: ClassVar[tuple[str, ...]] = ()
    """What the names of tensors begin with that start fresh where a file has none of them."""

    def __init__(
        self,
        arch: str | Mapping[str, Any],
        out_indices: Sequence[int],
        tap: str,
        drop_path_rate: float,
        norm_eval: bool,
        frozen_stages: int,
        with_cp: bool,
        fold_frozen: bool,
        deploy: bool,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        super().__init__(init_cfg)
        self.spec = self._resolve_spec(arch)
        self.out_indices = check_out_indices(out_indices)
        check_choice('tap', tap, list(self.taps))
        self.tap = tap
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

        self.stem = self._make_stem()
        lengths = self._residual_lengths()
        last = max(sum(lengths) - 1, 1)
        rates = iter([drop_path_rate * position / last for position in range(sum(lengths))])
        stages = [
            self._make_stage(index, list(islice(rates, length)))
            for index, length in enumerate(lengths[: self.out_indices[-1] + 1])
        ]
        # The last stage has no downsample behind it, so its map is its end under every tap.
        offsets = [self.taps[tap]] * (NUM_STAGES - 1) + [0]
        self._tapped = {(i, len(stages[i]) - 1 - offsets[i]) for i in self.out_indices}
        if min(self._tapped)[1] < 0:
            raise ValueError(f'tap={tap!r}: stage {min(self._tapped)[0]} has no block before its last one')
        stages[-1] = stages[-1][: max(self._tapped)[1] + 1]
        self.stages = nn.ModuleList(nn.Sequential(*blocks) for blocks in stages)

        for module in self.modules():
            if isinstance(module, ReparamBlock):
                module.folds = fold_frozen
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
        values = {name: tuple(v) if isinstance(v, Sequence) else v for name, v in arch.items()}
        try:
            return cls.spec_type(**values)
        except TypeError as error:
            raise TypeError(f'arch={dict(arch)!r}: {error}') from None

    @abstractmethod
    def _make_stem(self) -> nn.Module:
        """The stem, ``(N, 3, H, W)`` to ``(N, C, ceil(H / 4), ceil(W / 4))``."""

    @abstractmethod
    def _make_stage(self, index: int, drop_path_rates: Sequence[float]) -> list[nn.Module]:
        """The blocks of one stage; the first one of stages 1 to 3 halves the map.

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

    def _options(self) -> dict[str, Any]:
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
            For each stage ``i`` in ``out_indices`` a map ``(N, C_i, ceil(H / s), ceil(W / s))``, ``s = 4 * 2 ** i``,
            in the input's memory format.
        """
        learns = torch.is_grad_enabled()
        if not (self.fold_frozen and runs_eagerly()) or (learns and not self._runs_folded()):
            return self._maps(x)
        if x.device.type == 'cpu':
            # Convolutions are faster in this memory format. Not with live statistics: the gradient of a strided 1x1
            # branch on three channels overruns its memory in oneDNN 3.12. Not all that takes the maps knows the
            # format, mmcv's RoIAlign for one reads it as the other, so they leave in that of the input.
            maps = self._maps(x.contiguous(memory_format=torch.channels_last))
            kept = x.is_contiguous(memory_format=torch.channels_last)
            return maps if kept else tuple(m.contiguous() for m in maps)
        # With checkpointing, a block's second run has to do what its first one did.
        with kernels_together(self) if learns and not self.with_cp else nullcontext():
            return self._maps(x)

    def _runs_folded(self) -> bool:
        return all(module.runs_folded() for module in tree_of(self) if isinstance(module, ReparamBlock))

    def _maps(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self._run(self.stem, x)
        maps = []
        for i, stage in enumerate(self.stages):
            for j, block in enumerate(stage):
                x = self._run(block, x)
                if (i, j) in self._tapped:
                    maps.append(self._output(i, x))
        return tuple(maps)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if not (self.with_cp and torch.is_grad_enabled()):
            return block(x)
        # The second run of a block must not count its batch twice in live statistics.
        contexts = (nullcontext(), RunningStatisticsKept(block))
        return checkpoint(block, x, use_reentrant=False, context_fn=lambda: contexts)

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
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take every form in which a released backbone's tensors come; refuse, strict or not, what does not fit."""
        given = {
            name.removeprefix(prefix): state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)
        }
        tensors, others = (given, 0) if prefix else find_backbone(given, self.naming)
        for name, tensor in self._fit(tensors, others).items():
            state_dict[prefix + name] = tensor
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fit(self, tensors: Mapping[str, Tensor], others: int) -> dict[str, Tensor]:
        """This network's tensors, by our names, out of a backbone's by any names; the log gets one line on them.

        Args:
            tensors: All tensors of one backbone.
            others: How many more the file holds.

        Raises:
            CheckpointError: if a tensor of this network is missing or of another shape, or if one is unexplained.
        """
        source = source_of(tensors.values())
        names = self.naming.translate(tensors)
        whole = {ours: tensors[name] for name, ours in names.items() if ours is not None}
        _, kernels = self.layout(self.spec)
        form = form_of(whole, kernels)
        own = self.state_dict()
        fresh = {}
        if not any(name.startswith(self.optional) for name in whole):
            fresh = {name: tensor for name, tensor in own.items() if name.startswith(self.optional)}
        if self.deployed and form != 'fused':
            twin = self.from_tensors(whole, **self._options())
            print_log(f'{source.file}: fused while loading', 'current', logging.INFO)
            return switch_to_deploy(twin).to(next(self.parameters()).dtype).state_dict() | fresh

        fitted = {name: tensor for name, tensor in whole.items() if not self._is_not_built(name)}
        aside = {
            'classification head': len(names) - len(whole),
            f'not built for out_indices={self.out_indices}': len(whole) - len(fitted),
            'other parts of a model': others,
        }
        fitted |= fresh
        for name, tensor in own.items():
            if name.endswith('num_batches_tracked'):  # absent from old files, and nothing depends on it
                fitted.setdefault(name, torch.zeros_like(tensor))
        missing = [name for name in own if name not in fitted]
        unexplained = [name for name in fitted if name not in own]
        reshaped = [name for name in own if name in fitted and fitted[name].shape != own[name].shape]
        if missing or unexplained or reshaped:
            reason = self._advice(tensors, whole) or describe_misfit(missing, unexplained, reshaped)
            raise CheckpointError(f'{source.file} does not fit {self._title()}: {reason}')
        print_log(
            f'{source.file}: {self._title()}, {form} form, {WHOSE[self.naming.origin_of(tensors)]} names: '
            f'{len(own) - len(fresh)}/{len(own)} backbone tensors loaded'
            + ''.join(f'; {count} set aside ({what})' for what, count in aside.items() if count)
            + (f'; {len(fresh)} start fresh ({next(iter(fresh))}, ...)' if fresh else ''),
            'current',
            logging.INFO,
        )
        if source.tap not in (None, self.tap):
            print_log(
                f'{source.file} was trained with tap={source.tap!r}, this network has tap={self.tap!r}: '
                'its figures hold only with its own tap',
                'current',
                logging.WARNING,
            )
        return fitted

    def _title(self) -> str:
        """Class and variant, as in 'RepViT m1_1'."""
        names = [name for name, spec in self.specs.items() if spec == self.spec]
        return f'{type(self).__name__} {names[0] if names else "of a spec of its own"}'

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **options: Any) -> 'ReparamBackbone':
        """A network of these tensors and in their form, in float64, so that fusing what is left is exact.

        Args:
            tensors: All tensors of a backbone by our names.
            options: Arguments of the class.

        Raises:
            CheckpointError: if they do not fit.
        """
        network = cls(**options).double()
        names = {module: name for name, module in network.named_modules()}
        switch_to_deploy(network, [block for block in reparam_blocks(network) if f'{names[block]}.weight' in tensors])
        network.load_state_dict(tensors)
        return network

    def _advice(self, tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> str | None:
        """What to do about tensors that are those of another variant, or of this one in its other form.

        Args:
            tensors: The file's backbone by any names.
            whole: The same by our names, classification heads left out.
        """
        if not whole:
            return 'it holds no tensor for it; weights of the backbone alone go into its init_cfg, not into load_from'
        found = identify(tensors)
        if found is None:
            if self.naming.origin_of(whole) is None:
                return f'it holds another network (its first tensor is {next(iter(whole))})'
            return None
        family, archs, form = found
        if not isinstance(self, family):
            name = family.__name__
            return f"it holds {name} {archs[0]}: set type='{name}', arch={archs[0]!r} or take another file"
        if self.spec not in [self.specs[arch] for arch in archs]:
            return f'it holds {family.__name__} {archs[0]}: set arch={archs[0]!r} or take another file'
        if form != 'training' and not self.deployed:
            return f'it is {form} and this network is for training: build it with deploy=True or take an unfused file'
        return None

    @classmethod
    def recognize(cls, tensors: Mapping[str, Tensor]) -> Recognized | None:
        """What tensors are, by our names and their shapes; ``None`` if no variant has exactly these.

        Classification heads and what is ``optional`` do not matter.
        """
        shapes = {n: shape for n, shape in without_counters(tensors).items() if not n.startswith(cls.optional)}
        archs = [arch for arch, spec in cls.specs.items() if cls.variant_shapes(spec, shapes) == shapes]
        if not archs:
            return None
        _, kernels = cls.layout(cls.specs[archs[0]])
        return Recognized(cls, archs, form_of(shapes, kernels))

    @classmethod
    def variant_shapes(cls, spec: Any, like: Collection[str]) -> dict[str, torch.Size]:
        """The shapes of a variant's tensors by our names, batch counters left out.

        Args:
            spec: The variant's.
            like: Tensor names; the blocks that they hold as one convolution are so in the result.
        """
        shapes, kernels = cls.layout(spec)
        fused = fused_blocks(like, kernels)
        variant = {name: shape for name, shape in shapes.items() if block_of(name, kernels) not in fused}
        for block in fused:
            weight, bias = kernels[block]
            variant |= {f'{block}.weight': weight, f'{block}.bias': bias}
        return variant

    @classmethod
    @cache
    def layout(cls, spec: Any) -> tuple[dict[str, torch.Size], dict[str, tuple[torch.Size, torch.Size]]]:
        """What a variant is made of, without its numbers; not to be changed.

        Returns:
            The shapes of its tensors in training form, batch counters left out; and the names of its outermost
            re-parameterizable blocks with the shapes of their kernels and biases.
        """
        with torch.device('meta'):
            network = cls(asdict(spec))
        shapes = without_counters(network.state_dict())
        blocks = set(reparam_blocks(network))
        kernels = {}
        with torch.no_grad():
            for name, block in network.named_modules():
                if block in blocks:  # on the meta device each step would take ten times as long
                    weight, bias = block.to_empty(device='cpu').equivalent_kernel()
                    kernels[name] = weight.shape, bias.shape
        return shapes, kernels

    def _is_not_built(self, name: str) -> bool:
        """Whether a full network of this spec has a tensor of that name in a block that this network does not build."""
        head, *indices = name.split('.')[:3]
        if head != 'stages' or len(indices) < 2 or not all(index.isdecimal() for index in indices):
            return False
        i, j = map(int, indices)
        return i < NUM_STAGES and j < self._stage_lengths()[i] and (i, j) > max(self._tapped)


def families() -> list[type[ReparamBackbone]]:
    """The classes of backbones that there are, by name."""
    return sorted(ReparamBackbone.__subclasses__(), key=lambda family: family.__name__)


def identify(tensors: Mapping[str, Tensor]) -> Recognized | None:
    """What tensors of a backbone, by any names, are; ``None`` if they are exactly those of no variant of any family."""
    for family in families():
        names = family.naming.translate(tensors)
        found = family.recognize({ours: tensors[name] for name, ours in names.items() if ours is not None})
        if found:
            return found
    return None
