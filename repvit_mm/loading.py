"""Loading a checkpoint into a backbone: recognize what it holds, fit it to the network, report in one line."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from .checkpoint import CheckpointError, Source, source_of, tensors_of
from .names import WHOSE, Naming
from .reparam import reparam_blocks, switch_to_deploy

if TYPE_CHECKING:
    from .backbone import ReparamBackbone

FAMILIES: list[type['ReparamBackbone']] = []
"""All classes of backbones; each one adds itself when it is defined."""

Shapes = Mapping[str, torch.Size]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes of tensors by name, without BatchNorm's batch counters: old files lack them and nothing needs them."""
    return {name: tensor.shape for name, tensor in tensors.items() if not name.endswith('num_batches_tracked')}


def misfit(given: Shapes, wanted: Shapes) -> str | None:
    """How given tensors differ from the wanted ones: for each kind the number and the first name; ``None`` if not."""
    kinds = {
        'missing': [name for name in wanted if name not in given],
        'unexplained': [name for name in given if name not in wanted],
        'of another shape': [
            f'{name}: {tuple(given[name])} for {tuple(shape)}'
            for name, shape in wanted.items()
            if name in given and given[name] != shape
        ],
    }
    found = ', '.join(f'{kind}: {len(names)} ({names[0]})' for kind, names in kinds.items() if names)
    return f'tensors {found}' if found else None


def check_outside_backbones(model: nn.Module, checkpoint: Any, file: str | None = None) -> None:
    """Check that a checkpoint has every tensor of a model outside its backbones.

    The backbones of this package check their own tensors while they are loaded.

    Args:
        model: A detector, say, wrapped or not.
        checkpoint: What the file holds.
        file: Name of the file, for the message about a file without tensors.

    Raises:
        CheckpointError: if a tensor is missing or of another shape.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    tensors = tensors_of(checkpoint)
    backbones = [name for name, module in model.named_modules() if isinstance(module, tuple(FAMILIES))]
    prefixes = tuple(f'{name}.' for name in backbones)
    wanted = {name: shape for name, shape in shapes_of(model.state_dict()).items() if not name.startswith(prefixes)}
    given = {name.removeprefix('module.'): shape for name, shape in shapes_of(tensors).items()}
    if reason := misfit({name: given[name] for name in wanted if name in given}, wanted):
        file = source_of(tensors.values()).file if tensors else file
        raise CheckpointError(f'checkpoint {file} is not of this config: outside the backbone {reason}')


class Found(NamedTuple):
    """The backbone in a whole file.

    Args:
        prefix: What stands before the names of its tensors, ``''``, ``'backbone.'``, ``'module.'``, ...; ``None`` if no
            name belongs to the family. Then all tensors count as the backbone's.
        tensors: The backbone's tensors, without the prefix.
        others: All other tensors, by their full names.
    """

    prefix: str | None
    tensors: dict[str, Tensor]
    others: dict[str, Tensor]


def find_backbone(checkpoint: Any, naming: Naming) -> Found:
    """The backbone in a whole file: bare, in a container, in a detector, wrapped for running in parallel.

    Args:
        checkpoint: What the file holds.
        naming: The names of the backbone's family.
    """
    tensors = tensors_of(checkpoint)
    prefix = naming.prefix_of(tensors)
    start = prefix or ''
    found = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}
    return Found(prefix, found, others)


# ---------------------------------------------------------------------------------------------------- fused or not


def fused_blocks(names: Collection[str], blocks: Collection[str]) -> frozenset[str]:
    """Which of a network's outermost re-parameterizable blocks are one convolution according to tensor names."""
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


# ------------------------------------------------------------------------------------------------------- recognize


@cache
def layout(
    family: type['ReparamBackbone'], spec: Any
) -> tuple[dict[str, torch.Size], dict[str, tuple[torch.Size, torch.Size]]]:
    """The shapes that a variant is made of. The result is cached: do not change it.

    Returns:
        The shapes of its tensors in training form, batch counters left out; and the names of its outermost
        re-parameterizable blocks with the shapes of their kernels and biases.
    """
    with torch.device('meta'):
        network = family(asdict(spec))
    shapes = shapes_of(network.state_dict())
    blocks = set(reparam_blocks(network))
    kernels = {}
    with torch.no_grad():
        for name, block in network.named_modules():
            if block in blocks:  # on the meta device each step would take ten times as long
                weight, bias = block.to_empty(device='cpu').equivalent_kernel()
                kernels[name] = weight.shape, bias.shape
    return shapes, kernels


def variant_shapes(family: type['ReparamBackbone'], spec: Any, like: Collection[str]) -> dict[str, torch.Size]:
    """The shapes of a variant's tensors by our names, batch counters left out.

    Args:
        family: The class.
        spec: The variant's.
        like: Tensor names; blocks that are fused according to them are fused in the result.
    """
    shapes, kernels = layout(family, spec)
    fused = fused_blocks(like, kernels)
    variant = {name: shape for name, shape in shapes.items() if block_of(name, kernels) not in fused}
    for block in fused:
        weight, bias = kernels[block]
        variant |= {f'{block}.weight': weight, f'{block}.bias': bias}
    return variant


class Recognized(NamedTuple):
    """What tensors belong to: the class, its variants (several if they are equal once fused), and the form."""

    family: type['ReparamBackbone']
    archs: list[str]
    form: str


def recognize(family: type['ReparamBackbone'], tensors: Mapping[str, Tensor]) -> Recognized | None:
    """Which variant tensors belong to, by our names and their shapes; ``None`` if no variant has exactly these.

    Classification heads and the ``optional`` parts are not compared.
    """
    optional = tuple(family.optional)
    shapes = {name: shape for name, shape in shapes_of(tensors).items() if not name.startswith(optional)}
    archs = [arch for arch, spec in family.specs.items() if variant_shapes(family, spec, shapes) == shapes]
    if not archs:
        return None
    _, kernels = layout(family, family.specs[archs[0]])
    return Recognized(family, archs, form_of(shapes, kernels))


def identify(tensors: Mapping[str, Tensor]) -> Recognized | None:
    """Which variant a backbone's tensors belong to, under any convention's names; ``None`` if no variant has these."""
    for family in FAMILIES:
        names = family.naming.translate(tensors)
        found = recognize(family, {ours: tensors[name] for name, ours in names.items() if ours is not None})
        if found:
            return found
    return None


def from_tensors(family: type['ReparamBackbone'], tensors: Mapping[str, Tensor], **options: Any) -> 'ReparamBackbone':
    """A network that holds these tensors, fused where they are, in float64 so that further fusing is exact.

    Args:
        family: The class.
        tensors: All tensors of a backbone by our names.
        options: Arguments of the class.

    Raises:
        CheckpointError: if they do not fit.
    """
    network = family(**options).double()
    names = {module: name for name, module in network.named_modules()}
    switch_to_deploy(network, [block for block in reparam_blocks(network) if f'{names[block]}.weight' in tensors])
    network.load_state_dict(tensors)
    return network


# ------------------------------------------------------------------------------------------------------------- fit


@dataclass(frozen=True)
class Given:
    """A backbone's tensors as they were found.

    Args:
        source: Where they come from.
        by_any_name: All of them, by the names that they came with.
        tensors: Those of the backbone proper by our names: classification heads are left out.
        form: Their form, see :func:`form_of`.
        others: How many more tensors the file holds.
    """

    source: Source
    by_any_name: Mapping[str, Tensor]
    tensors: dict[str, Tensor]
    form: str
    others: int


def fit(network: 'ReparamBackbone', tensors: Mapping[str, Tensor], others: int) -> dict[str, Tensor]:
    """Translate a checkpoint's tensors into those of a network, and log one line about them.

    Args:
        network: The network.
        tensors: All tensors of one backbone, under any convention's names.
        others: How many more tensors the file holds.

    Returns:
        The network's state dict, by our names.

    Raises:
        CheckpointError: if a tensor of the network is missing or of another shape, or if the network has no place for
            one.
    """
    names = network.naming.translate(tensors)
    translated = {ours: tensors[name] for name, ours in names.items() if ours is not None}
    _, kernels = layout(type(network), network.spec)
    given = Given(source_of(tensors.values()), tensors, translated, form_of(translated, kernels), others)
    fresh = tensors_that_start_fresh(network, translated)
    if network.deployed and given.form != 'fused':
        twin = from_tensors(type(network), translated, **network.options())
        print_log(f'{given.source.file}: fused while loading', 'current')
        return switch_to_deploy(twin).to(next(network.parameters()).dtype).state_dict() | fresh

    fitted = {name: tensor for name, tensor in translated.items() if not network.is_not_built(name)}
    not_built = len(translated) - len(fitted)
    fitted |= fresh
    wanted = network.state_dict()
    for name, tensor in wanted.items():
        if name.endswith('num_batches_tracked'):  # absent from old files, and nothing depends on it
            fitted.setdefault(name, torch.zeros_like(tensor))
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (fitted, wanted)]
    if reason := misfit(*shapes):
        reason = advice(network, given) or reason
        raise CheckpointError(f'{given.source.file} does not fit {title(network)}: {reason}')
    report(network, given, not_built, list(fresh))
    return fitted


def tensors_that_start_fresh(network: 'ReparamBackbone', given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's own tensors of those optional parts that a file does not have."""
    absent = tuple(prefix for prefix in network.optional if not any(name.startswith(prefix) for name in given))
    return {name: tensor for name, tensor in network.state_dict().items() if name.startswith(absent)}


def title(network: 'ReparamBackbone') -> str:
    """Class and variant, as in 'RepViT m1_1'."""
    archs = [arch for arch, spec in network.specs.items() if spec == network.spec]
    return f'{type(network).__name__} {archs[0] if archs else "of a spec of its own"}'


def advice(network: 'ReparamBackbone', given: Given) -> str | None:
    """What to do about tensors that belong to another variant, or to this one in another form."""
    if not given.tensors:
        return 'it holds no tensor for it; weights of the backbone alone go into its init_cfg, not into load_from'
    wanted = network.state_dict()
    for prefix, cure in network.optional.items():
        in_file, in_network = (any(name.startswith(prefix) for name in names) for names in (given.tensors, wanted))
        if in_file and not in_network:
            return cure
    found = identify(given.by_any_name)
    if found is None:
        if network.naming.origin_of(given.tensors) is None and not wanted.keys() & given.tensors.keys():
            return f'it holds another network (its first tensor is {next(iter(given.tensors))})'
        return None
    family, archs, form = found
    if network.specs is not family.specs:  # not by the class: a step of repvit_mm.roadmap is a RepViT too
        name = family.__name__
        return f"it holds {name} {archs[0]}: set type='{name}', arch={archs[0]!r} or take another file"
    if network.spec not in [network.specs[arch] for arch in archs]:
        return f'it holds {family.__name__} {archs[0]}: set arch={archs[0]!r} or take another file'
    if form != 'training' and not network.deployed:
        return f'it is {form} and this network is for training: build it with deploy=True or take an unfused file'
    return None


# ---------------------------------------------------------------------------------------------------------- report


def report(network: 'ReparamBackbone', given: Given, not_built: int, fresh: list[str]) -> None:
    """Log what was loaded and what was set aside, and warn if the checkpoint was trained with another tap."""
    set_aside = {
        'classification head': len(given.by_any_name) - len(given.tensors),
        f'not built for out_indices={network.out_indices}': not_built,
        'other parts of a model': given.others,
    }
    count = len(network.state_dict())
    file, tap = given.source.file, given.source.tap
    print_log(
        f'{file}: {title(network)}, {given.form} form, {WHOSE[network.naming.origin_of(given.by_any_name)]} names: '
        f'{count - len(fresh)}/{count} backbone tensors loaded'
        + ''.join(f'; {number} set aside ({what})' for what, number in set_aside.items() if number)
        + (f'; {len(fresh)} start fresh ({fresh[0]}, ...)' if fresh else ''),
        'current',
    )
    if tap not in (None, network.tap):
        print_log(
            f'{file} was trained with tap={tap!r}, this network has tap={network.tap!r}: '
            'its figures hold only with its own tap',
            'current',
            logging.WARNING,
        )
