"""What the launchers share: common options, reading a config, and one-line messages about what cannot work."""

import argparse
import difflib
import json
import logging
import os
import subprocess
import sys
import traceback
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from repvit_mm._versions import mmyolo_problem
from repvit_mm.backbone import check_channels
from repvit_mm.checkpoint import CheckpointError, check_file, download
from repvit_mm.compat.pytorch import lost_process
from repvit_mm.compilation import CompilerError
from repvit_mm.data_check import DataError, check_config, check_readable
from repvit_mm.data_check.paths import is_there, wanted_paths
from repvit_mm.deploy.metadata import TASKS
from repvit_mm.deploy.runtimes import RuntimeFileError
from repvit_mm.hooks import FusionError, NonFiniteError
from repvit_mm.messages import Parser, one_line, start  # noqa: F401
from repvit_mm.resume import FolderInUseError, OptimizerError, Stopped
from repvit_mm.samples import SampleError, name_samples

TOOLS = Path(__file__).resolve().parent

SMALLEST_SIDE = 32
"""Smallest side in pixels of the images that are measured on."""

LAUNCHERS = {
    'pytorch': ('RANK', 'torchrun, as tools/dist_train.sh does'),
    'slurm': ('SLURM_PROCID', 'srun, as tools/slurm_train.sh does'),
    'mpi': ('OMPI_COMM_WORLD_LOCAL_RANK', 'mpirun'),
}
"""What starts the processes of a job -> a variable that it sets, and its command."""

TOLD = (
    CheckpointError,
    CompilerError,
    FolderInUseError,
    FusionError,
    NonFiniteError,
    OptimizerError,
    RuntimeFileError,
)
"""Errors of the package whose message says what to do."""

DATA_HINTS = {
    'data/coco': 'get COCO-2017 from https://cocodataset.org/#download and link its folder as data/coco',
    'data/ade': 'get ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu and unpack it in data/ade',
    'data/shapes': 'make it: python tools/make_shapes.py',
}


class Settings(DictAction):
    """``KEY=VALUE ...`` as in MMEngine; anything else is a usage error."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        for value in values:
            if value.find('=') < 1:
                parser.error(f'{option_string} {value}: expected KEY=VALUE')
        super().__call__(parser, namespace, values, option_string)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """``--cfg-options``, spelled as everywhere in OpenMMLab."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=Settings,
        default={},
        metavar='KEY=VALUE',
        help='override settings of the config, e.g. train_dataloader.batch_size=4 or model.neck.in_channels="[1,2]"',
    )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that training and testing share, spelled as everywhere in OpenMMLab."""
    parser.add_argument('--work-dir', help='folder for logs and results (default: work_dirs/<name of the config>)')
    add_config_options(parser)
    parser.add_argument('--launcher', choices=['none', *LAUNCHERS], default='none', help='job launcher')
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read the given checkpoints even if that runs code in them: only if you trust whoever made them',
    )
    # torch.distributed.launch passes it; torchrun sets the environment variable instead.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def add_measuring_arguments(
    parser: argparse.ArgumentParser, size: Sequence[int] | None, rounds: int, folder: str, outputs: str = 'COMMAND'
) -> None:
    """The options that all measurements share.

    Args:
        parser: The parser that they are added to.
        size: Default height and width, or one number for both; ``None`` for the config's own size.
        rounds: Default number of rounds that count.
        folder: Default folder for the results.
        outputs: Name of the results' files without suffix, for the help text.
    """
    shown = "the config's" if size is None else size[0]
    parser.add_argument(
        '--size',
        type=int,
        nargs='+',
        default=size,
        metavar='PIXELS',
        help=f'height and width, or one number for both (default: {shown})',
    )
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--rounds', type=int, default=rounds, help='rounds that count (default: %(default)s)')
    parser.add_argument('--threads', type=int, help="processor threads (default: torch's)")
    parser.add_argument(
        '--out-dir',
        type=Path,
        default=Path(folder),
        metavar='DIR',
        help=f'folder for {outputs}.json and {outputs}.png (default: %(default)s)',
    )


def check_measuring_arguments(args: argparse.Namespace) -> None:
    """Exit with one line if something cannot be measured as asked for."""
    if args.size is not None and (len(args.size) > 2 or min(args.size) < SMALLEST_SIDE):
        sys.exit(f'--size {" ".join(map(str, args.size))}: expected height and width, at least {SMALLEST_SIDE} each')
    for name in ('batch', 'rounds', 'threads'):
        values = getattr(args, name, None)
        if values is not None and min(values if isinstance(values, list) else [values]) < 1:
            sys.exit(f'--{name}: expected a positive number')
    if args.device == 'cuda' and not torch.cuda.is_available():
        sys.exit('--device cuda: torch finds no GPU here; --device cpu measures the processor')
    if args.size is not None:
        args.size = (args.size[0], args.size[-1])


def prepare_measuring(args: argparse.Namespace) -> torch.device:
    """Set threads and precision as asked for, make the output folder, and return the device."""
    if args.threads:
        torch.set_num_threads(args.threads)
    # By default torch allows TF32 for convolutions but not for matrix products. Here both get the same precision.
    tf32 = getattr(args, 'dtype', None) == 'tf32'
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f'--out-dir {args.out_dir} cannot be made: {one_line(error)}')
    return torch.device(args.device)


def load_config(args: argparse.Namespace, *wanted: str) -> Config:
    """Read the config and apply the common options; exits with one line if it lacks one of the ``wanted`` entries."""
    if args.launcher != 'none':
        variable, command = LAUNCHERS[args.launcher]
        if variable not in os.environ:
            sys.exit(f'--launcher {args.launcher}: {variable} is not set; start the processes by {command}')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(Path(args.config), args.cfg_options)
    if missing := [key for key in ('model', *wanted) if not cfg.get(key)]:
        sys.exit(f'config {args.config} has no {", ".join(missing)}')
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    return cfg


def read_config(path: Path, options: dict[str, Any]) -> Config:
    """A detector's or segmentor's config with ``--cfg-options`` in it; exits with one line if it cannot be read."""
    if not path.is_file():
        names = [str(other) for other in path.parent.glob('*.py')]
        nearest = difflib.get_close_matches(str(path), names, n=1)
        sys.exit(f'config {path} not found' + (f'; the nearest is {nearest[0]}' if nearest else ''))
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # anything can go wrong in a file of code
        if 'mmyolo' in str(error):
            check_mmyolo(path)
        hint = ' (save it as UTF-8 without a byte order mark)' if path.read_bytes().startswith(BOM_UTF8) else ''
        sys.exit(f'config {path} cannot be read: {one_line(error)}{hint}')
    try:
        cfg.merge_from_dict(options)
    except Exception as error:
        sys.exit(f'--cfg-options do not fit {path}: {one_line(error)}')
    if cfg.get('default_scope') == 'mmyolo':
        check_mmyolo(path)
    if cfg.get('default_scope') not in TASKS:
        sys.exit(f'config {path} has default_scope={cfg.get("default_scope")!r}: expected one of {", ".join(TASKS)}')
    return cfg


def check_mmyolo(path: Path) -> None:
    """Exit with one line if a config of MMYOLO's cannot be used here."""
    if problem := mmyolo_problem():
        sys.exit(f'config {path} is made for MMYOLO: {problem}')


def build_runner(cfg: Config, *loops: str) -> Runner:
    """The runner of a config; exits with one line if something in the config cannot be built.

    Args:
        cfg: The config.
        loops: ``'train_loop'``, ``'val_loop'`` or ``'test_loop'``: those that will run, with their data sets.
    """
    if cfg.get('launcher') == 'pytorch' and get_device() == 'cpu':
        # MMEngine would want a GPU for each process. If there is a process group already, it uses that one.
        timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')
        options = {'timeout': timedelta(seconds=timeout)} if timeout else {}
        torch.distributed.init_process_group('gloo', **options)
        wrapper = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
        cfg.setdefault(
            'model_wrapper_cfg', dict(wrapper, find_unused_parameters=cfg.get('find_unused_parameters', False))
        )
    name_samples()
    try:
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        check_channels(runner.model, cfg.model)
        for loop in loops:
            getattr(runner, loop)  # the runner builds a loop as it is first asked for
        return runner
    except OSError as error:
        sys.exit(f'the run cannot begin: {one_line(error)} (--debug shows where)')
    except Exception as error:
        sys.exit(f'the config cannot be built: {one_line(error)} (--debug shows where)')


@contextmanager
def failures_told(advice: Callable[[], str]) -> Iterator[None]:
    """Exit with one line if a run fails, and leave the traceback in its log.

    Args:
        advice: Returns the end of the line, which says where the run can go on.
    """
    try:
        yield
    except Stopped:
        raise
    except TOLD as error:
        sys.exit(str(error))
    except Exception as error:
        for handler in MMLogger.get_current_instance().handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(logging.makeLogRecord(dict(levelno=logging.ERROR, msg=traceback.format_exc())))
        if isinstance(error, SampleError):
            text = f'{error} (tools/check_data.py CONFIG reads every file)'
        elif lost_process(error):
            text = f'another process of this job has ended or does not answer ({one_line(error, 200)})'
        else:
            text = f'{one_line(error)} (--debug shows where)'
        sys.exit(f'{text}; {advice()}')


def check_data(cfg: Config, *splits: str) -> None:
    """Exit with one line unless the files and folders that the splits' data sets and metrics read are there.

    Args:
        cfg: The config.
        splits: ``'train'``, ``'val'`` or ``'test'``; one that the config does not have is skipped.
    """
    for name, path in wanted_paths(cfg, *splits):
        if not is_there(path):
            hint = next((hint for start, hint in DATA_HINTS.items() if Path(path).is_relative_to(start)), None)
            sys.exit(
                f'data not found: {path} ({name}; looked for it in {Path.cwd()}); '
                + (f'{hint}, or ' if hint else '')
                + 'set another path with --cfg-options'
            )


def check_test_annotations(cfg: Config) -> None:
    """Exit with one line if an annotation file of the test data sets cannot be read."""
    if is_first_process():
        try:
            check_readable(cfg, 'test')
        except DataError as error:
            sys.exit(str(error))


def check_annotations(cfg: Config, config: str, *splits: str) -> None:
    """Exit with one line if the splits' annotations would stop or ruin a run; print warnings about what is doubtful.

    Only the first process of a job looks. Annotations and headers are read, not every image.

    Args:
        cfg: The config.
        config: Its path, for the message.
        splits: As for :func:`check_data`.
    """
    if not is_first_process():
        return
    errors, warned = [], []
    for report in check_config(cfg, splits, quick=True):
        errors += report.errors
        warned += report.warnings
    for text in warned:
        print(f'warning: {text}', file=sys.stderr)
    if errors:
        more = f' ({len(errors) - 1} more like this)' if len(errors) > 1 else ''
        sys.exit(f'{errors[0]}{more}; tools/check_data.py {config} tells all, --skip-data-check goes on all the same')


def check_checkpoint(path: str, option: str = '') -> None:
    """Exit with one line, which names the option, unless a checkpoint that is given as a path is a file."""
    if '://' not in path:
        try:
            check_file(Path(path).expanduser())
        except CheckpointError as error:
            sys.exit(f'{option}: {error}' if option else str(error))


def prepare_pretrained(cfg: Config, pretrained: str | None) -> None:
    """Put ``--pretrained`` into the config and make sure that the backbone's pretrained file is available.

    Args:
        cfg: The config; its ``model.backbone.init_cfg`` may change, and ``model.pretrained`` is dropped then.
        pretrained: A path or an address, ``'none'`` for random weights, or ``None`` for what the config says.
    """
    backbone = cfg.model.get('backbone')
    if pretrained is not None:
        if backbone is None:
            sys.exit('--pretrained: the config has no model.backbone to load it into')
        backbone.init_cfg = None if pretrained == 'none' else dict(type='Pretrained', checkpoint=pretrained)
        cfg.model.pop('pretrained', None)  # MMSegmentation's way to name a backbone's weights
    init_cfg: Any = backbone.get('init_cfg') if backbone else None
    if not isinstance(init_cfg, dict) or init_cfg.get('type') != 'Pretrained':
        return
    checkpoint = init_cfg.get('checkpoint', '')
    try:
        if checkpoint.startswith(('http://', 'https://')):
            if is_first_process():
                download(checkpoint)
        elif '://' not in checkpoint:
            check_file(Path(checkpoint).expanduser())
    except CheckpointError as error:
        sys.exit(f'pretrained {error}; --pretrained PATH takes another file, --pretrained none starts at random')


def is_first_process() -> bool:
    """Whether this is the only process of a job or its rank 0, before the job's processes have met."""
    ranks = (os.environ.get(name) for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'))
    return int(next((rank for rank in ranks if rank is not None), 0)) == 0


class ToolError(Exception):
    """Another launcher failed; the message is one line that says why."""


def run_tool(name: str, *arguments: str | Path) -> None:
    """Run another launcher, whose output is shown.

    Raises:
        ToolError: if it fails, with the last line that it said.
    """
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    print('+ python', *command[1:], flush=True)
    last = ''
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
    if process.returncode:
        raise ToolError(last or f'tools/{name} ended with status {process.returncode}')


def run_test(config: Path, checkpoint: Path, work_dir: Path, *options: str | Path) -> dict[str, float]:
    """Test with ``test.py`` and return the metrics that it wrote.

    Raises:
        ToolError: if it fails, or if it wrote none.
    """
    before = set(work_dir.glob('*/*.json'))
    run_tool('test.py', config, checkpoint, '--work-dir', work_dir, *options)
    written = set(work_dir.glob('*/*.json')) - before
    if len(written) != 1:
        raise ToolError(f'tools/test.py left no metrics in {work_dir}')
    return json.loads(written.pop().read_text())
