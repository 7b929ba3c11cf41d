"""Test a detector or a segmentor: python tools/test.py CONFIG CHECKPOINT --eval METRIC. Takes exported files too."""

import argparse
import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import _first  # noqa: F401
from _launch import (
    Parser,
    add_common_arguments,
    build_runner,
    check_checkpoint,
    check_data,
    check_test_annotations,
    failures_told,
    load_config,
    start,
)
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device

from repvit_mm.checkpoint import trust
from repvit_mm.compat.mmcv import ties_in_order
from repvit_mm.data_check.paths import evaluators_of
from repvit_mm.deploy.evaluate import MismatchError, put_file
from repvit_mm.deploy.load import plain_datasets
from repvit_mm.deploy.metadata import TASKS
from repvit_mm.deploy.runtimes import RuntimeFileError, is_exported
from repvit_mm.precision import HALF, PrecisionError, check_dtype

METRICS = {
    'detection': ('metric', ('bbox', 'segm', 'proposal', 'proposal_fast')),
    'segmentation': ('iou_metrics', ('mIoU', 'mDice', 'mFscore')),
}
"""Task -> its metric's option for what to evaluate, and the values that it takes."""


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description='Test a detector or a segmentor.')
    parser.add_argument('config', help='config file, e.g. configs/seg/fpn_repvit_m1_1_ade20k_40k.py')
    parser.add_argument('checkpoint', help='checkpoint file, or a file of tools/export.py to test in its own runtime')
    parser.add_argument(
        '--eval',
        nargs='+',
        metavar='METRIC',
        help=f'what to evaluate; detection: {" ".join(METRICS["detection"][1])}; '
        f"segmentation: {' '.join(METRICS['segmentation'][1])} (default: the config's)",
    )
    parser.add_argument('--fuse', action='store_true', help='fuse the backbone for deployment before the test')
    parser.add_argument(
        '--dtype',
        choices=HALF,
        help='compute in half precision; float16 needs an accelerator. With --fuse kernels are folded before rounding',
    )
    parser.add_argument(
        '--compile', action='store_true', help='run backbone and neck by torch.compile; best with --fuse'
    )
    parser.add_argument(
        '--out', help='save the predictions: a .pkl file for detection, a folder of PNGs for segmentation'
    )
    parser.add_argument('--show-dir', help='folder for pictures of the predictions')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_argument(
        '--ties-in-order',
        action='store_true',
        help='sort equal scores of a detector in the order of their indices, as exported files and GPUs do',
    )
    add_common_arguments(parser)
    return parser.parse_args()


def has_masks(node: Any) -> bool:
    """Whether a model's config has a mask head."""
    if isinstance(node, dict):
        return node.get('mask_head') is not None or any(has_masks(child) for child in node.values())
    return isinstance(node, list | tuple) and any(has_masks(child) for child in node)


def choose_metrics(cfg: Config, metrics: list[str]) -> None:
    """Put ``--eval`` into the config's metric; exits with one line unless it fits the task."""
    task = TASKS[cfg.default_scope]
    option, valid = METRICS[task]
    for metric in metrics:
        if metric not in valid:
            sys.exit(f'--eval {metric}: {task} takes {", ".join(valid)}')
    if 'segm' in metrics and not has_masks(cfg.model):
        sys.exit('--eval segm: this detector predicts boxes only, take --eval bbox')
    targets = [evaluator for evaluator in evaluators_of(cfg, 'test') if option in evaluator]
    if not targets:
        types = ', '.join(evaluator.type for evaluator in evaluators_of(cfg, 'test')) or 'nothing'
        sys.exit(f'--eval: the config evaluates with {types}, which has no option {option!r}')
    for evaluator in targets:
        evaluator[option] = metrics


def save_predictions(cfg: Config, out: str) -> None:
    """Put ``--out`` into the config, in the form that each framework gives it."""
    path = Path(out)
    if TASKS[cfg.default_scope] == 'detection':
        if path.suffix not in ('.pkl', '.pickle'):
            sys.exit(f'--out {out}: detection saves a pickle file, expected a name that ends in .pkl')
        cfg.test_evaluator = [*evaluators_of(cfg, 'test'), dict(type='mmdet.DumpDetResults', out_file_path=out)]
    else:
        if path.is_file() or path.suffix in ('.pkl', '.pickle'):
            sys.exit(f'--out {out}: segmentation saves PNGs in a folder, expected the name of one')
        for evaluator in evaluators_of(cfg, 'test'):
            evaluator.update(output_dir=out, keep_results=True)


def show_predictions(cfg: Config, show_dir: str) -> None:
    """Put ``--show-dir`` into the config, so that a picture of every image lands there."""
    path = str(Path(show_dir).resolve())  # MMDetection would take a relative one from inside the work folder
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        sys.exit('--show-dir: the config has no default_hooks.visualization')
    hook.draw = True
    if TASKS[cfg.default_scope] == 'detection':
        hook.test_out_dir = path
    else:
        hook.interval = 1  # MMSegmentation draws every 50th otherwise
        cfg.visualizer.save_dir = path


def augment_tests(cfg: Config) -> None:
    """Put ``--tta`` into the config: its own augmentation, or for a box detector a horizontal flip."""
    if has_masks(cfg.model):
        sys.exit('--tta: MMDetection merges augmented boxes but not masks; test this detector without it')
    for _, dataset in plain_datasets(cfg.test_dataloader.dataset, 'test_dataloader.dataset'):
        dataset.pipeline = cfg.get('tta_pipeline') or flipped(dataset.pipeline)
    if TASKS[cfg.default_scope] == 'detection':
        prefix = 'mmdet.' if cfg.default_scope == 'mmyolo' else ''
        cfg.setdefault(
            'tta_model',
            dict(type=f'{prefix}DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)),
        )
    elif 'tta_model' not in cfg:
        sys.exit('--tta: the config has no tta_model and tta_pipeline; the ones of mmseg::_base_ have them')
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def flipped(pipeline: list[dict]) -> list[dict]:
    """A detection test pipeline whose packing step comes once as it is and once flipped."""
    pack = copy.deepcopy(pipeline[-1])
    pack.meta_keys = tuple(dict.fromkeys([*pack.get('meta_keys', ()), 'flip', 'flip_direction']))
    flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
    return [*pipeline[:-1], dict(type='TestTimeAug', transforms=[flips, [pack]])]


def apply_options(cfg: Config, args: argparse.Namespace) -> None:
    """Put the command line into the config; exits with one line where the two do not fit."""
    if args.eval:
        choose_metrics(cfg, args.eval)
    if is_exported(args.checkpoint):
        take_file(cfg, args)
    else:
        if args.trust_checkpoint:
            trust(args.checkpoint)
        check_checkpoint(args.checkpoint)
        cfg.load_from = args.checkpoint
    if args.out:
        save_predictions(cfg, args.out)
    if args.show_dir:
        show_predictions(cfg, args.show_dir)
    if args.tta:
        augment_tests(cfg)
    if args.ties_in_order and TASKS[cfg.default_scope] != 'detection':
        sys.exit('--ties-in-order is for a detector: a segmentor sorts nothing')
    hooks = [dict(type='WholeCheckpointHook')]
    if args.fuse:
        hooks.append(dict(type='FuseOnDeployHook'))
    if args.dtype:
        warn_of_dtype(args.dtype)
        hooks.append(dict(type='HalfPrecisionHook', dtype=args.dtype))
    if args.compile:
        hooks.append(dict(type='CompileHook'))
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), *hooks]


def warn_of_dtype(dtype: str) -> None:
    """Say what speaks against ``--dtype`` here; exits with one line where it makes no sense."""
    try:
        warning = check_dtype(dtype, get_device())
    except PrecisionError as error:
        sys.exit(f'--dtype {dtype}: {error}')
    if warning:
        print(f'warning: --dtype {dtype}: {warning}', file=sys.stderr)


def take_file(cfg: Config, args: argparse.Namespace) -> None:
    """Put an exported file into the config; exits with one line where the two do not fit."""
    for option in ('fuse', 'dtype', 'compile', 'tta', 'ties_in_order'):
        if getattr(args, option):
            sys.exit(f'--{option.replace("_", "-")} is for a checkpoint: {args.checkpoint} is an exported file')
    if args.launcher != 'none':
        sys.exit(f'--launcher {args.launcher} is for a checkpoint: an exported file is tested in one process')
    try:
        print(put_file(cfg, args.checkpoint))
    except (RuntimeFileError, MismatchError) as error:
        sys.exit(str(error))


def main() -> None:
    """Test."""
    args = parse_args()
    cfg = load_config(args, 'test_dataloader', 'test_evaluator')
    apply_options(cfg, args)
    check_data(cfg, 'test')
    check_test_annotations(cfg)
    runner = build_runner(cfg, 'test_loop')
    order = ties_in_order() if args.ties_in_order else nullcontext()
    with order, failures_told(lambda: 'nothing was measured'):
        runner.test()


if __name__ == '__main__':
    start(main)
