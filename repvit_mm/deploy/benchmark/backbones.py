"""Inference of backbones by every route, each of which gives the same maps."""

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import nn

from ...backbone import ReparamBackbone
from ...specs import Top1
from ..timing import Spread, interleave
from .measures import count_macs, count_parameters, matrix_product, peak_bytes
from .report import times
from .routes import ROUTES, LeftOut, Route, Source, check, fused_copy, plain_copy
from .synthetic import make_trained_like

PRECISIONS = {
    'float32': (torch.float32, 1e-4),
    'tf32': (torch.float32, 1e-2),
    'float16': (torch.float16, 2e-2),
    'bfloat16': (torch.bfloat16, 1e-1),
}
"""Name -> dtype of the network, and how far a route's maps may be off the unfused network's in float32."""


def registered() -> dict[str, tuple[type[ReparamBackbone], str]]:
    """Every variant of every registered backbone of this package: 'RepViT:m1_1' -> its class and arch."""
    return {
        f'{name}:{arch}': (cls, arch)
        for name, cls in MODELS.module_dict.items()
        if inspect.isclass(cls) and issubclass(cls, ReparamBackbone)
        for arch in cls.specs
    }


def published() -> dict[str, Top1]:
    """The published accuracy of each registered variant that has one."""
    return {name: cls.top1[arch] for name, (cls, arch) in registered().items() if arch in cls.top1}


def build(name: str, device: torch.device, seed: int = 0, **options: Any) -> nn.Module:
    """A variant with weights like a trained one's, in ``eval`` mode."""
    cls, arch = registered()[name]
    torch.manual_seed(seed)
    network = cls(arch, **options)
    make_trained_like(network, torch.randn(2, 3, 128, 128))
    return network.to(device)


def measure_routes(
    name: str,
    network: nn.Module,
    wanted: Sequence[str],
    batch: int,
    size: tuple[int, int],
    precision: str,
    rounds: int,
    left_out: dict[str, str],
) -> list[dict[str, Any]]:
    """The rows of one variant and batch size, and of the roofline.

    Args:
        name: The variant, as :func:`registered` has it.
        network: The unfused network in ``eval`` mode, on the device that it is to be measured on.
        wanted: Names in ``ROUTES``.
        batch: How many images a run takes.
        size: Their height and width in pixels.
        precision: A name in ``PRECISIONS``.
        rounds: Counted rounds of the timing.
        left_out: Routes that cannot be taken here are added with their reasons.

    Raises:
        WrongRoute: if a route gives another result than the unfused network.
        LeftOut: if no route can be taken.
    """
    dtype, tolerance = PRECISIONS[precision]
    device = next(network.parameters()).device
    images = torch.randn(batch, 3, *size, device=device)
    with ExitStack() as stack, torch.no_grad():
        reference = plain_copy(network, stack)
        with torch.backends.cudnn.flags(allow_tf32=False):
            expected = reference(images)
        source = Source(name, network, images.to(dtype))
        deployed = fused_copy(source)
        macs = {'plain': count_macs(reference, images[:1]), 'fused': count_macs(deployed, source.images[:1])}

        routes: dict[str, Route] = {}
        for route in wanted:
            try:
                routes[route] = ROUTES[route](source, stack)
            except LeftOut as reason:
                left_out[f'{name} {route}'] = str(reason)
                continue
            check(f'{route} of {name}', routes[route], expected, tolerance)
        if not routes:
            raise LeftOut(f'none of the routes can be taken here: {"; ".join(left_out.values())}')
        product, product_macs = matrix_product(device, dtype)
        candidates = {route: prepared.run for route, prepared in routes.items()} | {'roofline': product}
        spreads = interleave(candidates, rounds, device, f'{name}, batch {batch}')
        peaks = {route: peak_bytes(prepared.run, device) for route, prepared in routes.items() if prepared.network}

    # The time that the fused network's arithmetic would take at the product's rate.
    rate = product_macs / spreads['roofline'].median
    spreads['roofline'] = Spread(*(seconds * macs['fused'] * batch / product_macs for seconds in spreads['roofline']))
    first = next(iter(spreads.values()))
    rows = []
    for route, measured in spreads.items():
        row = {'name': name, 'batch': batch, 'route': route, **times(measured, first, batch)}
        row['times_roofline'] = measured.median / spreads['roofline'].median
        row['macs'] = macs['plain' if route == 'plain' else 'fused']
        if route in routes:
            row['parameters'] = count_parameters(routes[route].network or deployed)
            row['peak_bytes'] = peaks.get(route)
        else:
            row['gmacs_per_s'] = rate / 1e9
        rows.append(row)
    return rows
