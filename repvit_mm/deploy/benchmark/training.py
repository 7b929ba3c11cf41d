"""Training steps and iterations, plain against folded and deployed: whether they do the same, and what they take."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn

from ...reparam import reparam_blocks, switch_to_deploy
from ..timing import Run, interleave
from ..verify import relative_error
from .measures import Traffic, peak_bytes, saved_bytes
from .report import times
from .routes import LeftOut, Route, WrongRoute, check, plain_copy
from .synthetic import synthetic_samples

GRADIENT_TOLERANCE = 1e-6
"""Largest relative L2 error of a parameter's gradient, folded against plain, in float64.

In float32 rounding carries a few activations across the kink of a ReLU, which alone makes 1e-2.
"""

MAP_TOLERANCE = 1e-4
"""Largest relative L2 error of a map, folded against plain, in float32."""

TRAFFIC = ('operations', 'elementwise_bytes', 'bias_bytes')
"""What is counted of a training step."""

CHECKED_SIDE = 64
"""Of the image on which gradients are compared: convolutions in float64 are slow."""


def measure_steps(
    name: str,
    network: nn.Module,
    batch: int,
    size: tuple[int, int],
    rounds: int,
    amp: bool = False,
    channels_last: bool = False,
) -> list[dict[str, Any]]:
    """The rows of a backbone's training steps in float32, by each of :func:`training_forms`.

    Args:
        name: Of the rows.
        network: The backbone in ``train`` mode with frozen statistics.
        batch: How many images a step takes.
        size: Their height and width in pixels.
        rounds: Counted rounds of the timing.
        amp: Whether to train in mixed precision too, in the same rounds.
        channels_last: Whether the channels of a pixel lie side by side in memory.

    Raises:
        WrongRoute: if a map or a gradient differs.
    """
    images = torch.randn(batch, 3, *size, device=next(network.parameters()).device)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    with ExitStack() as stack:
        networks = training_forms(network, stack)
        check_gradients(name, networks, images)
        steps = {route: training_step(twin, images, amp=False) for route, twin in networks.items()}
        if amp:
            networks |= {f'{route}, mixed': twin for route, twin in networks.items()}
            steps |= {route: training_step(twin, images, amp) for route, twin in networks.items() if route not in steps}
        return measure_training(name, networks, steps, batch, rounds, images.device)


def training_forms(network: nn.Module, stack: ExitStack) -> dict[str, nn.Module]:
    """A backbone with frozen statistics in each form in which it can be trained.

    ``'deployed'`` is what folding is measured by: the fused network, each convolution of which learns a bias.

    Args:
        network: The backbone in ``train`` mode.
        stack: The forms are valid for as long as it lasts.
    """
    keeping = copy.deepcopy(network)
    for block in reparam_blocks(keeping):
        block.recomputes = False
    deployed = switch_to_deploy(copy.deepcopy(network)).eval().requires_grad_(True)
    plain = plain_copy(network, stack)
    return {'plain': plain, 'folded': network, 'folded, all maps kept': keeping, 'deployed': deployed}


def measure_traffic(name: str, network: nn.Module, batch: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """The rows of what a training step moves, by each form, in float32 and in mixed precision. Nothing is timed.

    Args:
        name: Of the rows.
        network: The backbone in ``train`` mode with frozen statistics.
        batch: How many images a step takes.
        size: Their height and width in pixels.
    """
    images = torch.randn(batch, 3, *size, device=next(network.parameters()).device)
    rows = []
    with ExitStack() as stack:
        networks = training_forms(network, stack)
        for amp in (False, True):
            steps = {route: training_step(twin, images, amp) for route, twin in networks.items()}
            first: dict[str, Any] = {}
            for route, step in steps.items():
                with Traffic() as traffic:
                    step()
                row = {'name': f'{name} {"mixed" if amp else "float32"}', 'batch': batch, 'route': route}
                row |= {field: getattr(traffic, field) for field in TRAFFIC}
                first = first or row
                rows.append(row | {'times_plain': row['elementwise_bytes'] / first['elementwise_bytes']})
    return rows


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'drawn': lambda map_, gradient: (map_ * gradient).sum(),
    'squares': lambda map_, gradient: map_.square().mean(),
}
"""What is differentiated of each map, whose gradient is drawn at random or follows the map itself.

Errors that change from place to place show in the first, those that do not in the second.
"""


def measure_gradients(
    name: str, networks: Iterable[nn.Module], batch: int, size: tuple[int, int]
) -> list[dict[str, Any]]:
    """The rows of how far gradients under autocast are from those in float64, plain and folded. Nothing is timed.

    A distance is the relative L2 error over all parameters. Its squares are averaged over networks and images, so that
    chance counts less.

    Args:
        name: Of the rows.
        networks: A backbone with several weights, in ``train`` mode with frozen statistics.
        batch: How many images each of them takes.
        size: Their height and width in pixels.
    """
    errors: dict[str, dict[str, list[float]]] = {'plain': {}, 'folded': {}}
    for seed, network in enumerate(networks):
        torch.manual_seed(seed)
        images = torch.randn(batch, 3, *size, device=next(network.parameters()).device)
        with torch.no_grad():
            drawn = [torch.randn_like(map_) for map_ in network(images)]
        exact = loss_gradients(copy.deepcopy(network).double(), images.double(), drawn)
        with ExitStack() as stack:
            for route, twin in (('plain', plain_copy(network, stack)), ('folded', network)):
                for loss, found in loss_gradients(twin, images, drawn, amp=True).items():
                    errors[route].setdefault(loss, []).append(relative_error(found, exact[loss]))
    rows = []
    for route, of_route in errors.items():
        row: dict[str, Any] = {'name': name, 'variant': name, 'batch': batch, 'route': route}
        for loss, sample in of_route.items():
            row[loss] = math.hypot(*sample) / math.sqrt(len(sample))
            row[f'{loss}_times_plain'] = row[loss] / (rows or [row])[0][loss]
        rows.append(row)
    return rows


def loss_gradients(network: nn.Module, images: Tensor, drawn: Sequence[Tensor], amp: bool = False) -> dict[str, Tensor]:
    """For each of ``LOSSES`` the gradients of all parameters as one vector."""
    with autocast(images.device, amp):
        maps = network(images)
    found = {}
    for name, loss in LOSSES.items():
        pairs = zip(maps, drawn, strict=True)
        total = sum(loss(map_.to(images.dtype), gradient.to(images.dtype)) for map_, gradient in pairs)
        gradients = torch.autograd.grad(total, list(network.parameters()), retain_graph=True)
        found[name] = torch.cat([gradient.flatten() for gradient in gradients])
    return found


def training_step(network: nn.Module, images: Tensor, amp: bool) -> Run:
    """Forward and backward from fixed gradients of the maps; no gradient is left behind."""
    with torch.no_grad():
        gradients = [torch.randn_like(map_) for map_ in network(images)]

    def step() -> None:
        with autocast(images.device, amp):
            maps = network(images)
        torch.autograd.backward(maps, [g.to(map_.dtype) for g, map_ in zip(gradients, maps, strict=True)])
        network.zero_grad()

    return step


def check_gradients(name: str, networks: Mapping[str, nn.Module], images: Tensor) -> None:
    """Compare maps and gradients with the first network's, in float64 on the corner of an image.

    A deployed network has parameters of its own; of the others' gradients, it shares those of gates.

    Raises:
        WrongRoute: if they differ.
    """
    found = {}
    corner = images[:1, :, :CHECKED_SIDE, :CHECKED_SIDE].double()
    for route, network in networks.items():
        torch.manual_seed(0)
        maps = network.double()(corner)
        torch.autograd.backward(maps, [torch.randn_like(map_) for map_ in maps])
        tensors = {f'map {i}': map_.detach() for i, map_ in enumerate(maps)}
        tensors |= {parameter: value.grad for parameter, value in network.named_parameters()}
        network.zero_grad()
        network.to(images.dtype)
        found[route] = tensors
    plain = found.pop('plain')
    if plain.keys() != found['folded'].keys():
        raise WrongRoute(f'{name}: plain and folded have other parameters')
    for route, tensors in found.items():
        tolerance = MAP_TOLERANCE if route == 'deployed' else GRADIENT_TOLERANCE  # its kernels were rounded
        for tensor in plain.keys() & tensors.keys():
            error = relative_error(tensors[tensor], plain[tensor])
            if not error <= tolerance:
                raise WrongRoute(f'{name}: {tensor} differs by {error:.1e} between {route} and plain')


def measure_training(
    name: str,
    networks: Mapping[str, nn.Module],
    steps: Mapping[str, Run],
    batch: int,
    rounds: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """The rows of steps that train the networks of the same names, the first of which the others are compared with."""
    spreads = interleave(steps, rounds, device, name)
    return [
        {
            'name': name,
            'batch': batch,
            'route': route,
            **times(measured, spreads[next(iter(steps))], batch),
            'saved_bytes': saved_bytes(steps[route], networks[route]),
            'peak_bytes': peak_bytes(steps[route], device),
        }
        for route, measured in spreads.items()
    ]


def training_iteration(model: nn.Module, cfg: Config, data: dict[str, Any]) -> Run:
    """Losses, backward and the optimizer's step, with a learning rate of 0 so that all iterations are the same."""
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    for group in wrapper.param_groups:
        group['lr'] = 0.0

    def iteration() -> None:
        torch.manual_seed(0)  # heads draw samples
        with wrapper.optim_context(model):
            loss, _ = model.parse_losses(model(**data, mode='loss'))
        wrapper.update_params(loss)

    return iteration


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager:
    """Automatic mixed precision of the device: float16 on a GPU, bfloat16 on a CPU."""
    return torch.autocast(device.type) if enabled else nullcontext()


def measure_iterations(
    name: str,
    model: nn.Module,
    cfg: Config,
    batch: int,
    size: tuple[int, int],
    rounds: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """The rows of training iterations of a whole model, on noise with annotations drawn at random.

    Args:
        name: Of the rows.
        model: The model; it is left in ``train`` mode.
        cfg: Its config.
        batch: How many images an iteration takes.
        size: Their height and width in pixels.
        rounds: Counted rounds of the timing.
        device: Where it trains.

    Raises:
        LeftOut: if the model trains with live statistics, which nothing folds.
        WrongRoute: if the backbone's maps are not the same folded.
    """
    model.train().to(device)
    if not all(block.statistics_frozen() for block in reparam_blocks(model.backbone)):
        raise LeftOut(
            f'{name} trains with live statistics, which nothing folds: add --cfg-options model.backbone.norm_eval=True'
        )
    data = model.data_preprocessor(synthetic_samples(cfg, model, batch, size), True)
    with ExitStack() as stack:
        models = {'plain': plain_copy(model, stack), 'folded': model}
        with torch.no_grad():
            expected = models['plain'].backbone(data['inputs'])
            check(f'folded of {name}', Route(lambda: model.backbone(data['inputs'])), expected, MAP_TOLERANCE)
        steps = {route: training_iteration(twin, cfg, data) for route, twin in models.items()}
        return measure_training(name, models, steps, batch, rounds, device)
