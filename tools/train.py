"""Train a detector or a segmentor: python tools/train.py CONFIG."""

import argparse
import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import _first  # noqa: F401
from _launch import (
    Parser,
    add_common_arguments,
    build_runner,
    check_annotations,
    check_checkpoint,
    check_data,
    failures_told,
    is_first_process,
    load_config,
    prepare_pretrained,
    start,
)
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import VISBACKENDS
from mmengine.runner import Runner, find_latest_checkpoint

from repvit_mm.checkpoint import CheckpointError, read_checkpoint, trust
from repvit_mm.compat.pytorch import multiplies_bfloat16
from repvit_mm.messages import one_line
from repvit_mm.precision import HALF
from repvit_mm.resume import Stopped, make_resumable


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description='Train a detector or a segmentor.')
    parser.add_argument('config', help='config file, e.g. configs/det/mask_rcnn_repvit_m1_1_fpn_1x_coco.py')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='go on from a checkpoint of this config; without PATH from the latest one in the work folder',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='auto',
        choices=['auto', *HALF],
        metavar='|'.join(HALF),
        help='train with automatic mixed precision; by itself in float16 on an accelerator, in bfloat16 on a CPU',
    )
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help="scale the learning rate to this run's total batch size"
    )
    parser.add_argument('--seed', type=int, help='seed of all random numbers')
    parser.add_argument(
        '--pretrained', metavar='PATH|none', help="the backbone's pretrained weights instead of the config's"
    )
    parser.add_argument(
        '--vis-backend',
        nargs='+',
        default=(),
        metavar='NAME',
        help='log to it too: tensorboard, wandb, mlflow or another visualization backend of MMEngine',
    )
    parser.add_argument(
        '--skip-data-check', action='store_true', help='train whatever the annotations hold (see tools/check_data.py)'
    )
    parser.add_argument(
        '--keep-going', action='store_true', help='train on when a loss is no longer finite, as MMDetection does'
    )
    add_common_arguments(parser)
    return parser.parse_args()


def apply_options(cfg: Config, args: argparse.Namespace) -> None:
    """Put the command line into the config; exits with one line where the two do not fit."""
    if args.amp:
        use_mixed_precision(cfg, args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            sys.exit("--auto-scale-lr: the config has no auto_scale_lr.base_batch_size, the recipe's total batch size")
        cfg.auto_scale_lr.enable = True
    hooks = ['StopOnSignalHook', 'NamedBatchHook', *([] if args.keep_going else ['FiniteLossHook'])]
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), *(dict(type=hook) for hook in hooks)]
    make_resumable(cfg)
    if args.vis_backend:
        add_backends(cfg, args.vis_backend)
    if args.seed is not None:
        cfg.randomness = dict(cfg.get('randomness', {}), seed=args.seed)
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.trust_checkpoint:
        trust(*filter(None, (cfg.get('load_from'), args.pretrained)))
    if cfg.get('load_from'):
        check_checkpoint(cfg.load_from, '--resume' if args.resume else 'load_from')
        if args.resume:
            check_resumable(cfg.load_from)


def use_mixed_precision(cfg: Config, dtype: str) -> None:
    """Put ``--amp`` into the config's optimizer wrapper; exits with one line where the device is not made for it.

    Args:
        cfg: The config.
        dtype: A name in ``HALF``, or ``'auto'``: the device's own, float16 on a GPU and bfloat16 on a CPU.
    """
    if get_device() != 'cpu':
        # bfloat16 has the range of float32: there is nothing to scale.
        cfg.optim_wrapper.update(type='AmpOptimWrapper', loss_scale=1.0 if dtype == 'bfloat16' else 'dynamic')
        if dtype != 'auto':
            cfg.optim_wrapper.dtype = dtype
    elif dtype == 'float16':
        sys.exit('--amp float16 is for accelerators: on a CPU take --amp bfloat16')
    elif multiplies_bfloat16():
        cfg.optim_wrapper.type = 'CpuAmpOptimWrapper'
    else:
        sys.exit('--amp needs an accelerator or a processor with AVX512-BF16 or AMX, and this machine has neither')


def add_backends(cfg: Config, names: Sequence[str]) -> None:
    """Let the visualizer log to further backends; exits with one line on an unknown name."""
    known = {name.removesuffix('VisBackend').lower(): name for name in VISBACKENDS.module_dict}
    visualizer = cfg.setdefault('visualizer', dict(type='Visualizer'))
    backends = list(visualizer.get('vis_backends') or [dict(type='LocalVisBackend')])
    for name in names:
        kind = known.get(name.lower().removesuffix('visbackend'))
        if kind is None:
            sys.exit(f'--vis-backend {name}: expected one of {", ".join(sorted(known))}')
        if kind == 'TensorboardVisBackend' and find_spec('tensorboard') is None:
            sys.exit(f"--vis-backend {name} needs what is not installed: pip install 'repvit_mm[tensorboard]'")
        if kind not in [backend['type'] for backend in backends]:
            backends.append(dict(type=kind))
    visualizer.vis_backends = backends


def check_length(cfg: Config) -> None:
    """Exit with one line unless a run would train, and validate at some time if at all."""
    for key in ('max_epochs', 'max_iters', 'val_interval'):
        value = cfg.train_cfg.get(key, 1)
        is_number = isinstance(value, int) or (isinstance(value, float) and (value.is_integer() or value == math.inf))
        if not is_number or value < 1:
            sys.exit(f'train_cfg.{key}={value!r}: expected a whole number, at least 1')


def check_resumable(path: str) -> None:
    """Exit with one line unless a checkpoint is one that a run of MMEngine's Runner left."""
    found = read_checkpoint(path, map_location='cpu')
    if not (isinstance(found, dict) and {'meta', 'state_dict', 'optimizer', 'message_hub'} <= found.keys()):
        sys.exit(
            f"--resume: {path} is no checkpoint of a training run's; to start from its weights: "
            f'--cfg-options load_from={path}'
        )


def where_to_go_on(work_dir: str) -> str:
    """What to do once a run that failed can go on."""
    latest = find_latest_checkpoint(work_dir)
    return f'--resume goes on from {latest}' if latest else 'no checkpoint was saved before'


def tell_what_is_left_out(runner: Runner) -> None:
    """Warn of parameters that would not learn, as FastViT's layer scales with MMYOLO's constructor of optimizers."""
    groups = runner.optim_wrapper.param_groups
    if isinstance(groups, list):  # those of several optimizers are in a dictionary
        learned = {id(parameter) for group in groups for parameter in group['params']}
        parameters = [(name, each) for name, each in runner.model.named_parameters() if each.requires_grad]
        left = [name for name, parameter in parameters if id(parameter) not in learned]
        if left and is_first_process():
            text = f'{len(left)} of {len(parameters)} parameters will not learn, {left[0]} first'
            print(f'warning: the optimizer leaves some out: {text}; see optim_wrapper.constructor', file=sys.stderr)


def main() -> None:
    """Train."""
    args = parse_args()
    cfg = load_config(args, 'train_cfg', 'train_dataloader', 'optim_wrapper')
    try:
        apply_options(cfg, args)
        check_length(cfg)
        check_data(cfg, 'train', 'val')
        if not args.skip_data_check:
            check_annotations(cfg, args.config, 'train', 'val')
        with failures_told(lambda: where_to_go_on(cfg.work_dir)):
            train(cfg, args.pretrained)
    except CheckpointError as error:
        sys.exit(str(error))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signum)


def train(cfg: Config, pretrained: str | None) -> None:
    """Train what a config says, from the backbone's pretrained weights or a checkpoint that holds all weights."""
    resumed = cfg.get('resume') and (cfg.get('load_from') or find_latest_checkpoint(cfg.work_dir))
    prepare_pretrained(cfg, 'none' if resumed else pretrained)
    loops = ('train_loop', 'val_loop') if cfg.get('val_cfg') else ('train_loop',)
    runner = build_runner(cfg, *loops)
    if isinstance(runner, Runner):  # a FlexibleRunner leaves it to its strategy
        try:
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        except Exception as error:
            sys.exit(f'optim_wrapper cannot be built from {dict(cfg.optim_wrapper)}: {one_line(error)}')
        tell_what_is_left_out(runner)
    runner.train()


if __name__ == '__main__':
    start(main)
