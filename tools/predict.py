"""Predict on images and videos: python tools/predict.py CONFIG CHECKPOINT INPUTS --out DIR, or FILE.onnx INPUTS."""

import argparse
import sys
from pathlib import Path

import _first  # noqa: F401
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from repvit_mm.deploy.predict import FilePredictor, Predictor, SlicedPredictor, predict_all
from repvit_mm.deploy.results import ResultFolder
from repvit_mm.deploy.runtimes import RUNTIMES, RuntimeFileError
from repvit_mm.deploy.sources import Source, SourceError, find_sources
from repvit_mm.messages import Parser, start

try:
    from mmengine.config import DictAction
except ImportError:  # files run without it
    DictAction = 'store'


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description='Predict on images and videos with a config and its checkpoint, or with an exported file.',
        usage='%(prog)s CONFIG CHECKPOINT INPUT [INPUT ...] --out DIR [options]\n'
        '       %(prog)s FILE INPUT [INPUT ...] --out DIR [options]',
    )
    parser.add_argument('model', help=f'config file, or an exported file ({", ".join(RUNTIMES)})')
    parser.add_argument(
        'inputs',
        nargs='+',
        help="after a config its checkpoint; then images, videos, folders, patterns such as 'photos/*.jpg', "
        'the number of a camera, or the address of a stream',
    )
    parser.add_argument(
        '--out', required=True, help='folder for the pictures, the predictions and index.html, which shows them'
    )
    parser.add_argument(
        '--score-thr', type=float, help='leave out detections below this score (default: 0.3, or what the file says)'
    )
    parser.add_argument('--slice', action='store_true', help='predict on overlapping slices too, for large images')
    parser.add_argument('--slice-size', type=int, default=640, help='side of a slice in pixels (default: 640)')
    parser.add_argument(
        '--slice-overlap', type=float, default=0.2, help='part of a slice that each neighbour shares (default: 0.2)'
    )
    parser.add_argument('--frames', type=int, help='take so many frames of each video or camera (default: all)')
    files = parser.add_argument_group('with an exported file')
    files.add_argument('--threads', type=int, help="threads to compute in (default: the runtime's choice)")
    models = parser.add_argument_group('with a config and a checkpoint')
    models.add_argument('--fuse', action='store_true', help='fuse the model for deployment first')
    models.add_argument('--device', help='cpu, cuda:0, ... (default: a GPU if there is one)')
    models.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override settings of the config'
    )
    models.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read the checkpoint even if that runs code in it: only if you trust whoever made it',
    )
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Exit with one line if an option has an invalid value."""
    if args.score_thr is not None and not 0 <= args.score_thr <= 1:
        sys.exit(f'--score-thr {args.score_thr}: expected a number from 0 to 1')
    if args.slice_size < 32:
        sys.exit(f'--slice-size {args.slice_size}: expected at least 32 pixels')
    if not 0 <= args.slice_overlap <= 0.9:
        sys.exit(f'--slice-overlap {args.slice_overlap}: expected a number from 0 to 0.9')
    for name in ('frames', 'threads'):
        value = getattr(args, name)
        if value is not None and value < 1:
            sys.exit(f'--{name} {value}: expected at least 1')
    if Path(args.out).exists() and not Path(args.out).is_dir():
        sys.exit(f'--out {args.out} is a file: expected the name of a folder')


def open_model(args: argparse.Namespace) -> tuple[Predictor, list[str]]:
    """The predictor and the inputs of the command line; exits with one line if the model cannot be opened."""
    if Path(args.model).suffix not in ('.py', '.json', '.yaml', '.yml'):
        for option in ('fuse', 'device', 'cfg_options', 'trust_checkpoint'):
            if getattr(args, option):
                sys.exit(f'--{option.replace("_", "-")} is for a config and a checkpoint: {args.model} is a file')
        try:
            return FilePredictor(args.model, args.threads), args.inputs
        except RuntimeFileError as error:
            sys.exit(str(error))
    if args.threads:
        sys.exit('--threads is for an exported file; PyTorch takes the environment variable OMP_NUM_THREADS')
    checkpoint, *inputs = args.inputs
    if not inputs:
        sys.exit(f'nothing to predict on: expected CONFIG CHECKPOINT INPUT, got {args.model} {checkpoint}')
    try:
        from repvit_mm import RepViT  # noqa: F401
    except ImportError as error:  # it says what is missing
        sys.exit(str(error))
    from _launch import check_checkpoint, read_config

    from repvit_mm.checkpoint import CheckpointError, trust
    from repvit_mm.deploy.graph import ExportError
    from repvit_mm.deploy.torch_predictor import ModelPredictor

    cfg = read_config(Path(args.model), args.cfg_options or {})
    if args.trust_checkpoint:
        trust(checkpoint)
    check_checkpoint(checkpoint)
    try:
        return ModelPredictor(cfg, checkpoint, args.fuse, args.device), inputs
    except (CheckpointError, ExportError) as error:
        sys.exit(str(error))


def run(predictor: Predictor, sources: list[Source], args: argparse.Namespace) -> list[str]:
    """Predict on everything, with a progress bar; returns what could not be read."""
    problems = []
    console = Console(stderr=True)
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    title = f'{Path(args.model).name}: predictions'
    with (
        ResultFolder(args.out, predictor.task, predictor.classes, predictor.palette, title) as results,
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
    ):
        inputs = progress.add_task('inputs', total=len(sources))
        frames = progress.add_task('frames', visible=False)
        done: dict[Source, None] = {}
        for step in predict_all(predictor, sources, results, args.score_thr, args.frames):
            if step.problem:
                console.print(f'warning: {step.problem}: skipped', style='yellow', markup=False, soft_wrap=True)
                problems.append(step.problem)
            done[step.source] = None
            progress.update(inputs, completed=len(done))
            length = min(filter(None, (step.frames, args.frames)), default=None)
            progress.update(frames, visible=step.source.kind != 'image', completed=step.frame + 1, total=length)
    return problems


def main() -> None:
    """Predict."""
    args = parse_args()
    check(args)
    predictor, inputs = open_model(args)
    try:
        sources = find_sources(inputs)
    except SourceError as error:
        sys.exit(str(error))
    if args.slice:
        predictor = SlicedPredictor(predictor, args.slice_size, args.slice_overlap)
    try:
        problems = run(predictor, sources, args)
    except KeyboardInterrupt:
        problems = []
        if any(source.kind != 'live' for source in sources):  # a camera has no other end
            sys.exit(f'stopped: what was predicted is in {args.out}')
    except (RuntimeFileError, OSError) as error:
        sys.exit(str(error))
    print(f'{args.out}/index.html')
    if problems:
        sys.exit(f'{len(problems)} of {len(sources)} inputs could not be read, {problems[0]} first')


if __name__ == '__main__':
    start(main)
