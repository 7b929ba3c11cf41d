"""Measure the road from MobileNetV3-L to RepViT, and draw the paper's figure again: python tools/roadmap.py."""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _first  # noqa: F401
import torch
from _launch import Parser, add_measuring_arguments, check_measuring_arguments, prepare_measuring, start
from torch import Tensor, nn

from repvit_mm import RepViTRoadmapClassifier, switch_to_deploy
from repvit_mm.deploy.benchmark.charts import draw_road
from repvit_mm.deploy.benchmark.measures import count_macs, count_parameters
from repvit_mm.deploy.benchmark.report import describe_machine, show, times, write_json
from repvit_mm.deploy.benchmark.routes import Route, WrongRoute, check
from repvit_mm.deploy.benchmark.synthetic import make_trained_like
from repvit_mm.deploy.timing import interleave
from repvit_mm.roadmap import ABLATIONS, STEPS


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description='Measure each step from MobileNetV3-L to RepViT as a fused classifier, one image at a time; '
        "the steps are interleaved. Accuracies, and latencies of the phone, are the paper's."
    )
    parser.add_argument('--ablations', action='store_true', help="measure the last step's ablations too")
    add_measuring_arguments(parser, [224], rounds=20, folder='work_dirs/roadmap', outputs='roadmap')
    args = parser.parse_args(argv)
    check_measuring_arguments(args)
    return args


def deployed(name: str, image: Tensor) -> nn.Module:
    """A step's classifier with weights like trained ones, fused.

    Raises:
        WrongRoute: if fusing changes what it computes.
    """
    torch.manual_seed(0)
    network = RepViTRoadmapClassifier(name)
    make_trained_like(network, torch.randn(2, 3, 128, 128))
    network.to(image.device)
    fused = switch_to_deploy(copy.deepcopy(network))
    check(name, Route(lambda: [fused(image)]), [network(image)], 1e-4)
    return fused


@torch.no_grad()
def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each step: the paper's figures, arithmetic, and the time here."""
    steps = STEPS | ABLATIONS if args.ablations else STEPS
    image = torch.randn(1, 3, *args.size, device=device)
    networks = {name: deployed(name, image) for name in steps}
    spreads = interleave({name: lambda n=n: n(image) for name, n in networks.items()}, args.rounds, device, 'roadmap')
    first = spreads[next(iter(steps))]
    return [
        {
            'name': 'ablations' if name in ABLATIONS else 'steps',
            'batch': 1,
            'route': name,
            'title': step.title,
            'top1': step.top1,
            'phone_ms': step.phone_ms,
            'parameters': count_parameters(networks[name]),
            'macs': count_macs(networks[name], image),
            **times(spreads[name], first, batch=1),
        }
        for name, step in steps.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and leave the figures as JSON and as a picture."""
    args = parse_args(argv)
    device = prepare_measuring(args)
    machine = describe_machine(device)
    try:
        rows = measure(args, device)
    except WrongRoute as error:
        sys.exit(str(error))
    conditions = f'{args.size[0]}x{args.size[1]}, batch 1, float32 on {device}'
    show(f'From MobileNetV3-L to RepViT, fused, {conditions}', rows)
    if args.ablations:
        print(
            "the paper's accuracies of ablations are those of RepViT-M0.9 after distillation, which has 78.74 unchanged"
        )
    picture: Path = args.out_dir / 'roadmap.png'
    draw_road(picture, conditions, [row for row in rows if row['name'] == 'steps'])
    write_json(picture.with_suffix('.json'), machine, vars(args), {'rows': rows})
    print(f'{picture.with_suffix(".json")}, {picture}')


if __name__ == '__main__':
    start(main)
