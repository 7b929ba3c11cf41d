"""Folds the BatchNorms of necks and heads into the convolutions in front of them."""

import copy
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from mmengine.logging import print_log
from torch import fx, nn

from .backbone import ReparamBackbone
from .compat.pytorch import BatchNorm, InstanceNorm, children_of, replace_module
from .reparam import add_up, conv_kernel, fold_norm


@dataclass
class FoldReport:
    """Which norms were folded into convolutions, and which were not.

    Args:
        folded: Names of the norms that were folded.
        left: Name of each other norm -> why it was not.
        difference: The largest output difference of a folded convolution on a random input, relative to its largest
            output; not a number if a norm is broken.
    """

    folded: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    difference: float = 0.0

    def __str__(self) -> str:
        text = f'{len(self.folded)} norms outside the backbone folded into their convolutions'
        if self.folded:
            text += f' ({_abridged(self.folded)}), with a difference of {self.difference:.1e} on a random input'
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        return text + ''.join(
            f'; {len(names)} stay, {reason} ({_abridged(names)})' for reason, names in reasons.items()
        )


@dataclass(frozen=True)
class _Pair:
    """A convolution and the norm directly behind it, by their names in the module that runs both."""

    parent: nn.Module
    conv: str
    norm: str


@torch.no_grad()
def fold_conv_norms(model: nn.Module) -> FoldReport:
    """Fold each BatchNorm outside the backbone that directly follows a convolution into it, in place.

    The order is known for mmcv's ``ConvModule``, which states it. For any other module that holds norms it is read off
    the traced graph. It is never guessed from the order in which modules are registered. A convolution that several
    norms follow becomes one convolution for each of them: RTMDet's heads share theirs between levels. Kernels are
    folded in float64; they keep their dtype, device and memory format.

    Args:
        model: A detector, a segmentor or a part of one in ``eval`` mode. Backbones of this package are not touched:
            :func:`~repvit_mm.reparam.switch_to_deploy` fuses them.

    Returns:
        What was folded and what was not. The log gets a line on it, too.

    Raises:
        ValueError: if a norm is in training mode, so that its statistics are not frozen. Nothing is folded then.
    """
    backbones = [module for module in model.modules() if isinstance(module, ReparamBackbone)]
    in_backbones = {module for backbone in backbones for module in backbone.modules()}
    modules = {name: module for name, module in model.named_modules() if module not in in_backbones}
    norms = {name: module for name, module in modules.items() if _is_norm(module)}
    for name, norm in norms.items():
        if isinstance(norm, BatchNorm) and norm.training:
            raise ValueError(f'{name or "the norm"} is in training mode: call eval() before folding')
    report = FoldReport()
    folds: list[tuple[_Pair, nn.Conv2d]] = []
    for name, parent in modules.items():
        pairs, reasons = _pairs_of(parent)
        prefix = f'{name}.' if name else ''
        report.left |= {prefix + norm: reason for norm, reason in reasons.items()}
        for pair in pairs:
            conv, norm = parent.get_submodule(pair.conv), parent.get_submodule(pair.norm)
            if reason := _obstacle(conv, norm):
                report.left[prefix + pair.norm] = reason
                continue
            folded = _folded(conv, norm)
            folds.append((pair, folded))
            report.folded.append(prefix + pair.norm)
            # Unlike Python's max, NumPy's keeps a NaN.
            report.difference = float(np.maximum(report.difference, _difference(conv, norm, folded)))
    # Every kernel is computed before the first is replaced: a norm or a convolution may serve in several places.
    for pair, conv in folds:
        _replace(pair, conv)
    if report.folded or report.left:
        print_log(str(report), 'current', logging.INFO)
    return report


def _pairs_of(parent: nn.Module) -> tuple[list[_Pair], Mapping[str, str]]:
    """The pairs of a convolution and a norm, among a module's children, that run directly one after the other.

    Returns:
        The pairs, and for each other norm among its children why it has no convolution.
    """
    norms = [name for name, child in children_of(parent).items() if _is_norm(child)]
    if not norms:
        return [], {}
    if _is_conv_module(parent):
        (norm,) = norms
        order = parent.order
        if order.index('norm') != order.index('conv') + 1:
            return [], {norm: f'its order is {", ".join(order)}'}
        if parent.with_spectral_norm:
            return [], {norm: 'its convolution has a spectral norm'}
        return [_Pair(parent, 'conv', norm)], {}
    found, obstacle = _consecutive(parent)
    pairs = [_Pair(parent, conv, norm) for norm, conv in found.items()]
    return pairs, {norm: obstacle for norm in norms if norm not in found}


class _Shallow(fx.Tracer):
    """Traces only what a module does with its children, not what happens inside them."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _consecutive(parent: nn.Module) -> tuple[dict[str, str], str]:
    """For each norm among a module's children the convolution whose output goes to it and to nothing else.

    Returns:
        Name of the norm -> name of the convolution, and why the other norms have none.
    """
    try:
        graph = _Shallow().trace(parent)
    except Exception:  # tracing replaces tensors, and a module's code may not work with that
        return {}, 'what runs before it cannot be traced'
    calls = [node for node in graph.nodes if node.op == 'call_module']
    uses = [node.target for node in calls]
    found = {}
    for node in calls:
        before = node.args[0] if node.args else None
        if (
            _is_norm(parent.get_submodule(node.target))
            and isinstance(before, fx.Node)
            and before.op == 'call_module'
            and isinstance(parent.get_submodule(before.target), nn.Conv2d)
            and len(before.users) == 1
            and uses.count(node.target) == uses.count(before.target) == 1
        ):
            found[node.target] = before.target
    return found, 'no convolution runs directly before it alone'


def _obstacle(conv: nn.Module, norm: nn.Module) -> str | None:
    """Why a norm cannot be folded into the convolution before it, or ``None``."""
    if not isinstance(norm, BatchNorm):
        return f'{type(norm).__name__} depends on the image'
    if norm.running_mean is None:
        return 'it keeps no running statistics'
    # A subclass of a convolution may do more; mmcv's only handles empty images.
    plain = (nn.Conv2d, *_classes('mmcv.cnn.bricks.wrappers', 'Conv2d'))
    if type(conv) not in plain:
        return f'{type(conv).__name__} is no plain convolution'
    return None


def _folded(conv: nn.Conv2d, norm: BatchNorm) -> nn.Conv2d:
    """A convolution followed by a norm as one convolution of the same options, dtype, device and memory format."""
    device = 'cpu' if conv.weight.device.type == 'mps' else conv.weight.device  # which has no float64
    exact_conv, exact_norm = (copy.deepcopy(module).to(device, torch.float64) for module in (conv, norm))
    weight, bias = add_up(fold_norm(conv_kernel(exact_conv), exact_norm))
    folded = copy.deepcopy(conv)
    folded.weight = nn.Parameter(weight.to(conv.weight), requires_grad=conv.weight.requires_grad)
    folded.bias = nn.Parameter(bias.to(conv.weight), requires_grad=conv.weight.requires_grad)
    return folded


def _difference(conv: nn.Conv2d, norm: BatchNorm, folded: nn.Conv2d) -> float:
    """The largest output difference on a random input, relative to the largest output."""
    side = max((size - 1) * dilation + 1 for size, dilation in zip(conv.kernel_size, conv.dilation, strict=True))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, conv.in_channels, side + 2, side + 2, generator=generator).to(conv.weight)
    before = norm(conv(x)).float()
    return ((folded(x).float() - before).abs().max() / before.abs().max().clamp_min(1e-12)).item()


def _replace(pair: _Pair, conv: nn.Conv2d) -> None:
    """Replace a pair by its folded convolution."""
    replace_module(pair.parent, pair.conv, conv)
    if _is_conv_module(pair.parent):
        # The same state as if it had been built without a norm.
        delattr(pair.parent, pair.norm)
        pair.parent.norm_name, pair.parent.norm_cfg = None, None
        pair.parent.with_norm, pair.parent.with_bias = False, True
    else:
        replace_module(pair.parent, pair.norm, nn.Identity())


def _is_conv_module(module: nn.Module) -> bool:
    """Whether a module runs as mmcv's ``ConvModule`` does; a subclass may only be built in another way."""
    return any(type(module).forward is cls.forward for cls in _classes('mmcv.cnn.bricks.conv_module', 'ConvModule'))


def _classes(module: str, name: str) -> Iterator[type]:
    """A class of an optional library; none if the library is not imported, because then no model holds its objects."""
    if module in sys.modules:
        yield getattr(sys.modules[module], name)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, BatchNorm | InstanceNorm | nn.GroupNorm | nn.LayerNorm)


def _abridged(names: list[str]) -> str:
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
