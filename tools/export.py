"""Export a trained model to a file that runs elsewhere: python tools/export.py CONFIG CHECKPOINT --to onnx."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import _first  # noqa: F401
from _launch import Parser, add_config_options, check_checkpoint, read_config, start

from repvit_mm.checkpoint import CheckpointError, trust
from repvit_mm.deploy.export import EXPORTERS, OPSET, Exportable, Options, check_options, export
from repvit_mm.deploy.graph import ExportError
from repvit_mm.deploy.int8 import LIBRARIES, Int8Options, check_target, export_int8
from repvit_mm.deploy.load import input_size, load_model, read_checkpoint, test_images

REAL_IMAGES = 4
"""Number of images of the test data set on which file and model are compared."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description='Export a trained model to a file, and compare the file with the model.')
    parser.add_argument('config', help='config file, e.g. configs/seg/fpn_repvit_m0_6_shapes.py')
    parser.add_argument('checkpoint', help='checkpoint file, its backbone fused or not')
    parser.add_argument(
        '--to', required=True, choices=EXPORTERS, metavar='TARGET', help=f'one of {", ".join(EXPORTERS)}'
    )
    parser.add_argument(
        '--what', choices=['model', 'backbone'], default='model', help='what to export (default: model)'
    )
    parser.add_argument(
        '--shape',
        nargs='+',
        type=int,
        metavar='SIDE',
        help='height and width of the images, for coreml several pairs, the default one first (default: the size that '
        'the config tests at)',
    )
    parser.add_argument('--dynamic', action='store_true', help='take any number of images of any size')
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument('--half', action='store_true', help='weights in half precision')
    precision.add_argument(
        '--bf16', action='store_true', help='OpenVINO: compute in bfloat16 where the processor multiplies it'
    )
    precision.add_argument(
        '--int8', action='store_true', help=f'8-bit integers, for {", ".join(LIBRARIES)}; needs the data set'
    )
    quantization = parser.add_argument_group('--int8')
    defaults = Int8Options()
    quantization.add_argument(
        '--calibration',
        type=int,
        default=defaults.images,
        metavar='N',
        help='calibration images (default: %(default)s)',
    )
    quantization.add_argument(
        '--max-drop',
        type=float,
        default=defaults.max_drop,
        metavar='POINTS',
        help='refuse a file that loses more AP or mIoU (default: %(default)s)',
    )
    quantization.add_argument(
        '--float-layers',
        nargs='+',
        default=(),
        metavar='NAME',
        help='layers whose module has one of these in its name stay in float',
    )
    quantization.add_argument(
        '--reduce-range',
        action='store_true',
        help='weights in half of the range of int8: right on processors without VNNI, too (default: on one of these, '
        'files of both ranges are made and the better one is kept)',
    )
    parser.add_argument('--logits', action='store_true', help="a segmentor's logits instead of its labels")
    parser.add_argument('--opset', type=int, default=OPSET, help=f'opset of an ONNX file (default: {OPSET})')
    parser.add_argument('--out', type=Path, help='the file (default: work_dirs/<config>/<config>.<suffix>)')
    parser.add_argument('--force', action='store_true', help='replace the file if it is there already')
    parser.add_argument('--rounds', type=int, default=5, help='how often to time PyTorch and the file; 0: not at all')
    add_config_options(parser)
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='let the checkpoint run code as it is read, if you trust whoever made it',
    )
    args = parser.parse_args(argv)
    if args.shape and len(args.shape) % 2:
        parser.error(f'--shape takes pairs of a height and a width, not {len(args.shape)} numbers')
    if args.calibration < 1:
        parser.error('--calibration: at least 1 image')
    if any(side < 32 for side in args.shape or ()):
        parser.error('--shape: sides are at least 32 pixels')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Export."""
    args = parse_args(argv)
    cfg = read_config(Path(args.config), args.cfg_options)
    check_checkpoint(args.checkpoint)
    if cfg.default_scope == 'mmyolo' and args.what == 'model':
        head = cfg.model.get('bbox_head', {}).get('type', 'its head')
        sys.exit(f'{head} of MMYOLO cannot be exported; --what backbone exports the backbone')
    if args.trust_checkpoint:
        trust(args.checkpoint)
    name = Path(args.config).stem
    path = args.out or Path('work_dirs', name, name + EXPORTERS[args.to].suffix)
    sizes = tuple(zip(args.shape[::2], args.shape[1::2], strict=True)) if args.shape else (input_size(cfg),)
    if None in sizes:
        sys.exit(f'config {args.config} names no size that it tests at: give --shape')
    options = Options(args.what, sizes, args.dynamic, args.half, args.bf16, args.logits, args.opset)
    try:
        (check_target if args.int8 else check_options)(args.to, path, options)
        if path.exists() and not args.force:
            sys.exit(f'{path} is there already: --force replaces it, --out names another file')
        checkpoint = read_checkpoint(args.checkpoint)
        model = load_model(cfg, checkpoint, deploy=True)
        exportable = Exportable.prepare(model, cfg, checkpoint, args.to, options)
        images = test_images(cfg, REAL_IMAGES)
        if args.int8:
            int8 = Int8Options(args.calibration, args.max_drop, tuple(args.float_layers), args.reduce_range)
            print(export_int8(exportable, path, cfg, int8, images, args.rounds))
        else:
            print(export(exportable, path, images, args.rounds))
    except (CheckpointError, ExportError) as error:
        sys.exit(str(error))


if __name__ == '__main__':
    start(main)
