"""Measure the backbones and whole models, plain, folded and fused: python tools/benchmark.py backbone|train|model."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _first  # noqa: F401
import torch
from _launch import (
    Parser,
    add_measuring_arguments,
    check_checkpoint,
    check_measuring_arguments,
    prepare_measuring,
    read_config,
    start,
)
from mmengine.config import DictAction

from repvit_mm.checkpoint import CheckpointError
from repvit_mm.deploy.benchmark import models
from repvit_mm.deploy.benchmark.backbones import PRECISIONS, build, measure_routes, published, registered
from repvit_mm.deploy.benchmark.charts import draw_bars, draw_variants
from repvit_mm.deploy.benchmark.report import describe_machine, show, write_json
from repvit_mm.deploy.benchmark.routes import ROUTES, LeftOut, WrongRoute
from repvit_mm.deploy.benchmark.training import measure_gradients, measure_iterations, measure_steps, measure_traffic
from repvit_mm.deploy.benchmark.worker import WorkerError
from repvit_mm.deploy.graph import ExportError
from repvit_mm.deploy.load import input_size


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description='Measure time, memory and arithmetic; candidates are interleaved.')
    commands = parser.add_subparsers(dest='command', required=True)

    backbone = commands.add_parser('backbone', help='inference of backbones by every route')
    backbone.add_argument('--dtype', default='float32', choices=PRECISIONS, help='default: float32, without TF32')

    train = commands.add_parser('train', help='a step, forward and backward, of backbones: plain against folded')
    train.add_argument('--amp', action='store_true', help='also in mixed precision, in the same rounds')
    train.add_argument('--channels-last', action='store_true', help='channels of a pixel side by side in memory')
    untimed = train.add_mutually_exclusive_group()
    untimed.add_argument(
        '--gradients',
        action='store_true',
        help='compare gradients in mixed precision with float64, of as many networks as --rounds says; time nothing',
    )
    untimed.add_argument(
        '--traffic',
        action='store_true',
        help='count operations and the bytes that elementwise ones move, in float32 and mixed precision; time nothing',
    )

    model = commands.add_parser('model', help='a whole detector or segmentor: in torch and as exported files')
    model.add_argument('config', help='config file of MMDetection or MMSegmentation')
    model.add_argument(
        'checkpoint', nargs='?', help='weights of the whole model (default: random, detections by chance)'
    )
    model.add_argument('--train', action='store_true', help='training iterations, plain against folded')
    model.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='override settings of the config',
    )

    for command, routes in ((backbone, tuple(ROUTES)), (model, models.ROUTES)):
        command.add_argument(
            '--routes',
            nargs='+',
            default=routes,
            choices=routes,
            metavar='ROUTE',
            help=f'some of {" ".join(routes)} (default: all)',
        )

    for command, size, batch in ((backbone, [512], [1, 8]), (train, [320], [2]), (model, None, [1])):
        if command is not model:
            command.add_argument(
                'archs',
                nargs='*',
                metavar='ARCH',
                help='variants, as m1_1 or RepViT:m1_1 (default: all of published accuracy)',
            )
        command.add_argument('--batch', type=int, nargs='+', default=batch, metavar='N', help=f'default: {batch}')
        add_measuring_arguments(command, size, rounds=10, folder='work_dirs/benchmark')
    args = parser.parse_args(argv)
    check_measuring_arguments(args)
    return args


def choose(names: Sequence[str]) -> list[str]:
    """Full names of the named variants, or of all with a published accuracy; exits with one line on an unknown one."""
    full = list(registered())
    if not names:
        return list(published())
    chosen = []
    for name in names:
        fitting = [other for other in full if name in (other, other.partition(':')[2])]
        if len(fitting) > 1:
            sys.exit(f'arch {name}: it could be any of {", ".join(fitting)}')
        if not fitting:
            known = [*full, *(other.partition(':')[2] for other in full)]
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            sys.exit(f'arch {name} is not registered: the nearest is {nearest}')
        chosen += fitting
    return list(dict.fromkeys(chosen))


def benchmark_backbone(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Inference by every route, a table for each variant."""
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    conditions = f'{args.size[0]}x{args.size[1]}, {args.dtype} on {device}'
    for name in choose(args.archs):
        network = build(name, device)
        for batch in args.batch:
            rows += measure_routes(name, network, args.routes, batch, args.size, args.dtype, args.rounds, left_out)
        show(f'{name}, {conditions}', [row for row in rows if row['name'] == name])
    tell(left_out)
    draw_variants(args.out_dir / 'backbone.png', conditions, rows, published())
    return {'rows': rows, 'left_out': left_out}


def benchmark_train(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A step of each variant with frozen statistics, forward and backward, plain against folded."""
    rows: list[dict[str, Any]] = []
    conditions = f'forward and backward, {args.size[0]}x{args.size[1]} on {device}'
    for name in choose(args.archs):
        make = partial(build, name, device, norm_eval=True)
        for batch in args.batch:
            if args.gradients:
                networks = (make(seed=seed).train() for seed in range(args.rounds))
                rows += measure_gradients(name, networks, batch, args.size)
                continue
            network = make().train()
            if args.traffic:
                new = measure_traffic(name, network, batch, args.size)
            else:
                new = measure_steps(name, network, batch, args.size, args.rounds, args.amp, args.channels_last)
            for title in dict.fromkeys(row['name'] for row in new):
                show(f'{title}, {conditions}', [row for row in new if row['name'] == title])
            rows += new
    if args.gradients:
        show(f'distances from float64 in mixed precision, {conditions}', rows)
    draw_bars(args.out_dir / 'train.png', conditions, rows)
    return {'rows': rows}


def benchmark_model(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A whole model: inference by every route, or training iterations, plain and folded."""
    cfg = read_config(Path(args.config), args.cfg_options)
    if args.checkpoint:
        check_checkpoint(args.checkpoint)
    size = args.size or input_size(cfg)
    if size is None:
        sys.exit(f'config {args.config} names no size that it tests at: give --size')
    name = f'{Path(args.config).stem} {size[0]}x{size[1]}'
    model = models.build(cfg, args.checkpoint)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for batch in args.batch:
        if args.train:
            rows += measure_iterations(name, model, cfg, batch, size, args.rounds, device)
        else:
            rows += models.measure_model(name, model, cfg, args.routes, batch, size, args.rounds, device, left_out)
    conditions = f'training iteration, float32 on {device}' if args.train else f'inference on {device}'
    show(f'{name}, {conditions}', rows)
    tell(left_out)
    draw_bars(args.out_dir / 'model.png', conditions, rows)
    return {'rows': rows, 'left_out': left_out}


def tell(left_out: dict[str, str]) -> None:
    """Print which routes were left out, and why."""
    for route, reason in left_out.items():
        print(f'left out: {route}: {reason}')


COMMANDS = {'backbone': benchmark_backbone, 'train': benchmark_train, 'model': benchmark_model}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables and leave the figures as JSON and as a picture."""
    args = parse_args(argv)
    device = prepare_measuring(args)
    machine = describe_machine(device)
    try:
        content = COMMANDS[args.command](args, device)
    except (WrongRoute, LeftOut, WorkerError, ExportError, CheckpointError) as error:
        sys.exit(str(error))
    write_json(args.out_dir / f'{args.command}.json', machine, vars(args), content)
    print(f'{args.out_dir / args.command}.json, {args.out_dir / args.command}.png')


if __name__ == '__main__':
    start(main)
