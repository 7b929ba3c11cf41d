"""Measure the backbones and whole models, plain, folded and fused: python tools/benchmark.py backbone|train|model."""

import argparse
import copy
import difflib
import inspect
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from _bench import (
    add_options,
    autocast,
    check_arguments,
    count_macs,
    count_parameters,
    describe_machine,
    draw_bars,
    draw_variants,
    make_trained_like,
    matrix_product,
    peak_bytes,
    relative_error,
    saved_bytes,
    set_up,
    show,
    times,
    write_json,
)
from _launch import check_checkpoint, read_config
from _routes import ROUTES, LeftOut, Route, Source, WrongRoute, check, fused_copy, plain_copy
from mmengine.config import Config, DictAction
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from repvit_mm import switch_to_deploy
from repvit_mm.backbone import ReparamBackbone
from repvit_mm.checkpoint import CheckpointError
from repvit_mm.deploy.timing import Run, Spread, interleave
from repvit_mm.messages import one_line
from repvit_mm.reparam import reparam_blocks
from repvit_mm.specs import Top1

PRECISIONS = {
    'float32': (torch.float32, 1e-4),
    'tf32': (torch.float32, 1e-2),
    'float16': (torch.float16, 2e-2),
    'bfloat16': (torch.bfloat16, 1e-1),
}
"""Name -> dtype of the network, and how far a route's maps may be off the unfused network's in float32."""

GRADIENT_TOLERANCE = 1e-6
"""Largest relative L2 error of a parameter's gradient, folded against plain, in float64.

In float32 rounding carries a few activations across the kink of a ReLU, which alone makes 1e-2.
"""

CHECKED_SIDE = 64
"""Of the image on which gradients are compared: convolutions in float64 are slow."""

OBJECTS = 7
"""Annotated objects in each synthetic image of a detector, about COCO's mean."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Measure time, memory and arithmetic; candidates are interleaved.')
    commands = parser.add_subparsers(dest='command', required=True)

    backbone = commands.add_parser('backbone', help='inference of backbones by every route')
    backbone.add_argument(
        '--routes',
        nargs='+',
        default=list(ROUTES),
        choices=ROUTES,
        metavar='ROUTE',
        help=f'some of {" ".join(ROUTES)} (default: all)',
    )
    backbone.add_argument('--dtype', default='float32', choices=PRECISIONS, help='default: float32, without TF32')

    train = commands.add_parser('train', help='a step, forward and backward, of backbones: plain against folded')
    train.add_argument('--amp', action='store_true', help='automatic mixed precision')
    train.add_argument('--channels-last', action='store_true', help='channels of a pixel side by side in memory')

    model = commands.add_parser('model', help='a whole detector or segmentor')
    model.add_argument('configs', nargs='+', metavar='CONFIG', help='config file of MMDetection or MMSegmentation')
    model.add_argument('--train', action='store_true', help='training iterations, plain against folded')
    model.add_argument('--checkpoint', help='weights of the whole model (default: random, which detect nothing)')
    model.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='override settings of the config',
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
        add_options(command, size, rounds=10, folder='work_dirs/benchmark')
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


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


def build(name: str, device: torch.device, **options: Any) -> nn.Module:
    """A variant with weights like a trained one's, in ``eval`` mode."""
    cls, arch = registered()[name]
    torch.manual_seed(0)
    network = cls(arch, **options)
    make_trained_like(network, torch.randn(2, 3, 128, 128))
    return network.to(device)


def benchmark_backbone(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Inference by every route, a table for each variant."""
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    conditions = f'{args.size[0]}x{args.size[1]}, {args.dtype} on {device}'
    for name in choose(args.archs):
        network = build(name, device)
        for batch in args.batch:
            rows += measure_routes(name, network, batch, args, left_out)
        show(f'{name}, {conditions}', [row for row in rows if row['name'] == name])
    for route, reason in left_out.items():
        print(f'left out: {route}: {reason}')
    draw_variants(args.out_dir / 'backbone.png', conditions, rows, published())
    return {'rows': rows, 'left_out': left_out}


def measure_routes(
    name: str, network: nn.Module, batch: int, args: argparse.Namespace, left_out: dict[str, str]
) -> list[dict[str, Any]]:
    """The rows of one variant and batch size; routes that cannot be taken here are added to ``left_out``.

    Raises:
        WrongRoute: if a route gives another result than the unfused network.
    """
    dtype, tolerance = PRECISIONS[args.dtype]
    device = torch.device(args.device)
    images = torch.randn(batch, 3, *args.size, device=device)
    with ExitStack() as stack, torch.no_grad():
        reference = plain_copy(network, stack)
        with torch.backends.cudnn.flags(allow_tf32=False):
            expected = reference(images)
        source = Source(name, copy.deepcopy(network).to(dtype), images.to(dtype))
        deployed = fused_copy(source)
        macs = {'plain': count_macs(reference, images[:1]), 'fused': count_macs(deployed, source.images[:1])}

        routes: dict[str, Route] = {}
        for route in args.routes:
            try:
                routes[route] = ROUTES[route](source, stack)
            except LeftOut as reason:
                left_out[f'{name} {route}'] = str(reason)
                continue
            check(f'{route} of {name}', routes[route], expected, tolerance)
        if not routes:
            sys.exit(f'none of the routes can be taken here: {"; ".join(left_out.values())}')
        product, product_macs = matrix_product(device, dtype)
        candidates = {route: prepared.run for route, prepared in routes.items()} | {'roofline': product}
        spreads = interleave(candidates, args.rounds, device, f'{name}, batch {batch}')
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


def benchmark_train(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A step of each variant with frozen statistics, forward and backward, plain against folded."""
    rows: list[dict[str, Any]] = []
    precision = 'mixed precision' if args.amp else 'float32'
    conditions = f'forward and backward, {args.size[0]}x{args.size[1]}, {precision} on {device}'
    for name in choose(args.archs):
        network = build(name, device, norm_eval=True).train()
        if args.channels_last:
            network = network.to(memory_format=torch.channels_last)
        for batch in args.batch:
            images = torch.randn(batch, 3, *args.size, device=device)
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with ExitStack() as stack:
                networks = {'plain': plain_copy(network, stack), 'folded': network}
                check_gradients(name, networks, images)
                steps = {route: training_step(twin, images, args.amp) for route, twin in networks.items()}
                new = measure_training(name, networks, steps, batch, args.rounds, device)
            show(f'{name}, {conditions}', new)
            rows += new
    draw_bars(args.out_dir / 'train.png', conditions, rows)
    return {'rows': rows}


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
    """Compare maps and gradients, folded against plain, in float64 on the corner of an image.

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
    for tensor, expected in found['plain'].items():
        error = relative_error(found['folded'][tensor], expected)
        if not error <= GRADIENT_TOLERANCE:
            raise WrongRoute(f'{name}: {tensor} differs by {error:.1e} between folded and plain')


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


def benchmark_model(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Whole models: inference unfused, folded and fused, or training iterations plain and folded."""
    rows: list[dict[str, Any]] = []
    conditions = f'{"training iteration" if args.train else "inference"}, float32 on {device}'
    for path in args.configs:
        cfg = read_config(Path(path), args.cfg_options)
        size = args.size or input_size(cfg, path)
        model = build_model(cfg, path, args.checkpoint).to(device)
        name = f'{Path(path).stem} {size[0]}x{size[1]}'
        new = [row for batch in args.batch for row in measure_model(name, model, cfg, batch, size, args)]
        show(f'{name}, {conditions}', new)
        rows += new
    draw_bars(args.out_dir / 'model.png', conditions, rows)
    return {'rows': rows}


def input_size(cfg: Config, path: str) -> tuple[int, int]:
    """Height and width that a config feeds: its crop, or the scale that it tests at; exits with one line without."""
    size = cfg.model.get('data_preprocessor', {}).get('size')
    if size:
        return tuple(size)
    scales = [step.scale for step in cfg.get('test_pipeline', []) if 'scale' in step]
    if not scales:
        sys.exit(f'config {path} names neither data_preprocessor.size nor a scale in its test_pipeline: give --size')
    return min(scales[0]), max(scales[0])


def build_model(cfg: Config, path: str, checkpoint: str | None) -> nn.Module:
    """The model of a config, with the weights of a checkpoint or like trained ones in the backbone."""
    if not isinstance(cfg.model.get('backbone'), dict):
        sys.exit(f'config {path} has no model.backbone')
    cfg.model.backbone.init_cfg = None
    try:
        init_default_scope(cfg.default_scope)
        torch.manual_seed(0)
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    except Exception as error:  # anything can be wrong in a config
        sys.exit(f'the model of {path} cannot be built: {one_line(error)}')
    if not reparam_blocks(model):
        sys.exit(f'the model of {path} has no block to fold: its backbone is {type(model.backbone).__name__}')
    if checkpoint:
        check_checkpoint(checkpoint, '--checkpoint')
        load_checkpoint(model, checkpoint, map_location='cpu')
    else:
        make_trained_like(model.backbone, torch.randn(2, 3, 128, 128))
    return model


def measure_model(
    name: str,
    model: nn.Module,
    cfg: Config,
    batch: int,
    size: tuple[int, int],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The rows of one model and batch size.

    Raises:
        WrongRoute: if the backbone's maps are not the same in each form.
    """
    device = torch.device(args.device)
    model.train(args.train)
    data = model.data_preprocessor(synthetic_samples(cfg, model, batch, size), args.train)
    with ExitStack() as stack:
        models = {'plain': plain_copy(model, stack), 'folded': model}
        if args.train:
            if not all(block.statistics_frozen() for block in reparam_blocks(model.backbone)):
                sys.exit(
                    f'{name} trains with live statistics, which nothing folds: add '
                    '--cfg-options model.backbone.norm_eval=True'
                )
        else:
            models['fused'] = switch_to_deploy(copy.deepcopy(model))
        with torch.no_grad():
            expected = models['plain'].backbone(data['inputs'])
            for route, twin in models.items():
                check(f'{route} of {name}', Route(lambda twin=twin: twin.backbone(data['inputs'])), expected, 1e-4)
        if args.train:
            steps = {route: training_iteration(twin, cfg, data) for route, twin in models.items()}
            return measure_training(name, models, steps, batch, args.rounds, device)
        stack.enter_context(torch.no_grad())
        runs = {route: lambda twin=twin: twin(**data, mode='predict') for route, twin in models.items()}
        spreads = interleave(runs, args.rounds, device, name)
        return [
            {
                'name': name,
                'batch': batch,
                'route': route,
                'parameters': count_parameters(models[route]),
                **times(measured, spreads['plain'], batch),
                'peak_bytes': peak_bytes(runs[route], device),
            }
            for route, measured in spreads.items()
        ]


def synthetic_samples(cfg: Config, model: nn.Module, batch: int, size: tuple[int, int]) -> dict[str, Any]:
    """Noise with random annotations of the config's task, as a data loader would give it."""
    classes = max((head.num_classes for head in model.modules() if hasattr(head, 'num_classes')), default=2)
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        with_mask = getattr(model, 'with_mask', False)
        return demo_mm_inputs(
            batch, [(3, *size)] * batch, num_items=[OBJECTS] * batch, num_classes=classes, with_mask=with_mask
        )
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = [SegDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size)) for _ in range(batch)]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, *size)))
    return {'inputs': list(torch.randint(256, (batch, 3, *size), dtype=torch.uint8)), 'data_samples': samples}


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


COMMANDS = {'backbone': benchmark_backbone, 'train': benchmark_train, 'model': benchmark_model}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables and leave the figures as JSON and as a picture."""
    args = parse_args(argv)
    device = set_up(args)
    machine = describe_machine(device)
    try:
        content = COMMANDS[args.command](args, device)
    except (WrongRoute, CheckpointError) as error:
        sys.exit(str(error))
    write_json(args.out_dir / f'{args.command}.json', machine, vars(args), content)
    print(f'{args.out_dir / args.command}.json, {args.out_dir / args.command}.png')


if __name__ == '__main__':
    main()
