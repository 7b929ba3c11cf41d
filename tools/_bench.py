"""What the tools that measure share: options, times, memory, multiply-accumulates, tables, pictures and files."""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import torch
from mmengine.analysis import FlopAnalyzer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from repvit_mm.compat.pytorch import BatchNorm
from repvit_mm.deploy.timing import Run, Spread
from repvit_mm.messages import one_line
from repvit_mm.specs import Top1

DISTRIBUTIONS = (
    'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'timm', 'onnx', 'onnxruntime', 'openvino', 'numpy',
)  # fmt: skip
"""Whose versions the JSON file holds beside torch's, as far as they are installed."""

MATRIX_SIZE = {'cpu': 2048, 'cuda': 8192}
"""Side of the matrices that are multiplied for the roofline: large enough that the arithmetic is all that counts."""

SMALLEST_SIDE = 32


def add_options(
    parser: argparse.ArgumentParser, size: Sequence[int] | None, rounds: int, folder: str, outputs: str = 'COMMAND'
) -> None:
    """The options that all measurements share.

    Args:
        parser: Gets them.
        size: Height and width unless given, or one number for both; ``None`` for a config's.
        rounds: Counted rounds unless given.
        folder: Where results go unless said otherwise.
        outputs: What the results' files are called.
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


def check_arguments(args: argparse.Namespace) -> None:
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


def set_up(args: argparse.Namespace) -> torch.device:
    """Threads and precision as asked for; the device."""
    if args.threads:
        torch.set_num_threads(args.threads)
    # Convolutions and matrix products in the same precision: by itself torch lets only the former have TF32.
    tf32 = getattr(args, 'dtype', None) == 'tf32'
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f'--out-dir {args.out_dir} cannot be made: {one_line(error)}')
    return torch.device(args.device)


def times(measured: Spread, first: Spread, batch: int) -> dict[str, Any]:
    """The fields of a row that say how long it took, also in terms of the first candidate."""
    return {
        'ms': 1000 * measured.median,
        'quartiles_ms': [1000 * measured.lower, 1000 * measured.upper],
        'images_per_s': batch / measured.median,
        'times_first': measured.median / first.median,
    }


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Run, int]:
    """A large product of square matrices, for the machine's matrix rate, and its multiply-accumulates."""
    size = MATRIX_SIZE[device.type]
    first, second = torch.randn(2, size, size, device=device, dtype=dtype)
    return lambda: torch.mm(first, second), size**3


def count_macs(network: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of a network's convolutions and linear layers, counted by MMEngine.

    Args:
        network: The network; it is traced.
        images: Its input ``(N, 3, H, W)``.
    """
    # MMEngine calls a multiply-accumulate one flop.
    analyzer = FlopAnalyzer(network, images).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad():
        operators = analyzer.by_operator()
    return operators['conv'] + operators['linear']


def count_parameters(network: nn.Module) -> int:
    """The number of a network's parameters, frozen ones too."""
    return sum(parameter.numel() for parameter in network.parameters())


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most memory that tensors take at once during a run, above what was there before it, in bytes.

    Weights and input are there before. On a GPU the allocator counts; on a CPU the profiler sees each tensor come and
    go. Memory that a library takes for itself, not for a tensor, is not seen.
    """
    if device.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def saved_bytes(run: Run, network: nn.Module) -> int:
    """The memory of all distinct tensors that a run saves for its backward pass, in bytes.

    Views of one tensor count once, with the memory that they keep; the network's parameters and buffers, which are
    there anyway, do not count. The input does.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    # Kept until the end: memory that was given back could be another tensor's.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of ``expected``, in float64; not a number if there is one."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.shape != expected.shape:
        return float('inf')
    scale = expected.norm()
    return ((actual - expected).norm() / scale).item() if scale > 0 else actual.norm().item()


@torch.no_grad()
def make_trained_like(network: nn.Module, images: Tensor) -> None:
    """Give a network that was just built weights under which each of its branches counts.

    A norm or a layer scale starts as a constant, often as nothing, and would hide an error behind it. Constants are
    drawn anew, and the norms take their statistics from a batch, so that the maps keep their size through all blocks.

    Args:
        network: The network; it is left in ``eval`` mode.
        images: A batch ``(N, 3, H, W)``.
    """
    for parameter in network.parameters():
        if parameter.numel() > 1 and parameter.min() == parameter.max():
            nn.init.uniform_(parameter, 0.5, 1.5)
    norms = [module for module in network.eval().modules() if isinstance(module, BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # this batch's statistics alone
    network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager:
    """Automatic mixed precision of the device: float16 on a GPU, bfloat16 on a CPU."""
    return torch.autocast(device.type) if enabled else nullcontext()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on: processor, threads, GPU, versions, and the load that there was before."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        processor = next(line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    # Of torch its own word, which names its CUDA too.
    versions = {'python': platform.python_version(), 'torch': torch.__version__}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    machine: dict[str, Any] = {
        'processor': processor,
        'instructions': torch.backends.cpu.get_cpu_capability(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'load before': round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None,
        'system': platform.platform(),
        'versions': versions,
    }
    if device.type == 'cuda':
        machine['gpu'] = torch.cuda.get_device_name()
        versions |= {'cuda': torch.version.cuda, 'cudnn': torch.backends.cudnn.version()}
    return machine


def write_json(path: Path, machine: Mapping[str, Any], settings: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Everything that was measured, with the command, the settings and the machine it was measured on."""
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    everything = {'command': command, 'machine': machine, 'settings': settings, **content}
    path.write_text(json.dumps(everything, indent=2, default=str) + '\n')


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    'batch': ('batch', str),
    'route': ('', str),
    'top1': ('top-1, %\n(paper)', str),
    'phone_ms': ('phone, ms\n(paper)', lambda value: f'{value:.2f}'),
    'parameters': ('parameters\nM', lambda number: f'{number / 1e6:.2f}'),
    'macs': ('MACs\nG an image', lambda number: f'{number / 1e9:.2f}'),
    'ms': ('median\nms', lambda value: f'{value:.2f}'),
    'quartiles_ms': ('quartiles\nms', lambda values: '{:.2f} - {:.2f}'.format(*values)),
    'images_per_s': ('images\na second', lambda value: f'{value:.1f}'),
    'times_first': ('times\nthe first', lambda value: f'{value:.2f}'),
    'times_roofline': ('times\nroofline', lambda value: f'{value:.2f}'),
    'saved_bytes': ('saved for\nbackward, MiB', lambda number: f'{number / 2**20:.1f}'),
    'peak_bytes': ('peak of\ntensors, MiB', lambda number: f'{number / 2**20:.1f}'),
}
"""Field of a row -> the heading of its column and how its value is written."""


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table; a field that no row has is left out, batches are set apart."""
    fields = [field for field in COLUMNS if any(row.get(field) is not None for row in rows)]
    table = Table(title=title, title_justify='left')
    for field in fields:
        table.add_column(COLUMNS[field][0], justify='left' if field == 'route' else 'right', no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = ['' if row.get(field) is None else COLUMNS[field][1](row[field]) for field in fields]
        together = following is not None and (following['name'], following['batch']) == (row['name'], row['batch'])
        table.add_row(*cells, end_section=not together)
    # Where the screen is narrower, lines wrap; figures are never cut.
    Console(width=max(Console().width, 150)).print(table)


def new_figure(title: str, panels: int, width: float = 7) -> tuple[Any, Any]:
    """An empty picture of panels side by side, each of the given width in inches."""
    from matplotlib.figure import Figure  # not pyplot, which would want to know of a screen

    figure = Figure(figsize=(width * panels, 5), layout='constrained')
    figure.suptitle(title)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def draw_variants(path: Path, title: str, rows: Sequence[Mapping[str, Any]], top1: Mapping[str, Top1]) -> None:
    """Latency of each route at the smallest batch, against parameters and, where known, published accuracy."""
    batch = min(row['batch'] for row in rows)
    rows = [row for row in rows if row['batch'] == batch]
    fused_parameters = {
        name: min(row['parameters'] for row in rows if row['name'] == name and 'parameters' in row)
        for name in dict.fromkeys(row['name'] for row in rows)
    }
    panels = [('parameters of the fused backbone, M', {n: count / 1e6 for n, count in fused_parameters.items()})]
    if known := {name: top1[name] for name in fused_parameters if name in top1}:
        kinds = {name.partition(':')[0]: 'distilled' if best.distilled else 'plain' for name, best in known.items()}
        label = f'published ImageNet top-1, %\n({", ".join(map(" ".join, kinds.items()))})'
        panels.append((label, {name: best.distilled or best.plain for name, best in known.items()}))
    figure, axes = new_figure(f'{title}, batch {batch}', len(panels))
    routes = list(dict.fromkeys(row['route'] for row in rows))
    families = list(dict.fromkeys(row['name'].partition(':')[0] for row in rows))
    # Names of the first family stand left of its fastest route, those of others right of their slowest.
    sides = [(min, (-6, 3), 'right')] + [(max, (6, -9), 'left')] * (len(families) - 1)
    for axis, (label, values) in zip(axes, panels, strict=True):
        for family, (extreme, offset, side), marker in zip(families, sides, 'os^D', strict=False):
            own = [row for row in rows if row['name'].startswith(f'{family}:') and row['name'] in values]
            for index, route in enumerate(routes):
                line = sorted((values[row['name']], row['ms']) for row in own if row['route'] == route)
                if line:
                    heights, latencies = zip(*line, strict=True)
                    style = dict(color='black', linestyle=':') if route == 'roofline' else dict(color=f'C{index}')
                    axis.plot(latencies, heights, marker=marker, markersize=4, label=f'{family}, {route}', **style)
            for name in dict.fromkeys(row['name'] for row in own):
                place = extreme(row['ms'] for row in own if row['name'] == name), values[name]
                axis.annotate(name.partition(':')[2], place, offset, textcoords='offset points', ha=side)
        axis.set(xlabel='median latency, ms', ylabel=label, xscale='log')
        for of_ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            of_ticks('{x:g}')
        axis.tick_params(axis='x', which='both', labelrotation=45)
        axis.grid(alpha=0.3)
        axis.margins(x=0.08)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper')
    figure.savefig(path, dpi=120)


PANELS = {
    'ms': ('median time, ms (bars: quartiles)', 1),
    'saved_bytes': ('saved for backward, MiB', 2**20),
    'peak_bytes': ('peak of tensors, MiB', 2**20),
}
"""Field that is drawn as bars -> its label, and what one unit of it is."""


def draw_bars(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Time and memory of each route side by side, with each one's ratio to the first."""
    panels = [field for field in PANELS if field in rows[0]]
    groups = list(dict.fromkeys((row['name'], row['batch']) for row in rows))
    routes = list(dict.fromkeys(row['route'] for row in rows))
    figure, axes = new_figure(title, len(panels), 3 + 2 * len(groups))
    for axis, field in zip(axes, panels, strict=True):
        label, unit = PANELS[field]
        first = {(row['name'], row['batch']): row[field] for row in reversed(rows)}
        for index, route in enumerate(routes):
            own = [row for row in rows if row['route'] == route]
            values = [row[field] / unit for row in own]
            places = [groups.index((row['name'], row['batch'])) + (index - (len(routes) - 1) / 2) * 0.27 for row in own]
            errors = None
            if field == 'ms':
                errors = [[abs(row['ms'] - row['quartiles_ms'][side]) for row in own] for side in (0, 1)]
            bars = axis.bar(places, values, 0.25, yerr=errors, capsize=3, label=route)
            if index:
                ratios = [f'x{row[field] / first[row["name"], row["batch"]]:.2f}' for row in own]
                axis.bar_label(bars, ratios, padding=3)
        axis.set(ylabel=label)
        axis.set_xticks(range(len(groups)), [f'{name}, batch {batch}'.replace(' ', '\n', 1) for name, batch in groups])
        axis.margins(y=0.12)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper')
    figure.savefig(path, dpi=120)


SIDES = (
    (1, 0, 'left', 'center'),
    (-1, 0, 'right', 'center'),
    (0, 1, 'center', 'bottom'),
    (0, -1, 'center', 'top'),
    (0.7, 0.7, 'left', 'bottom'),
    (0.7, -0.7, 'left', 'top'),
    (-0.7, 0.7, 'right', 'bottom'),
    (-0.7, -0.7, 'right', 'top'),
)
"""Where a label may stand beside its point: across and up, and which of its edges that is."""


def label_points(axis: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each point's label beside it, where it covers no point and no other label, if there is such a place.

    Args:
        axis: Of a figure whose limits and size are final.
        points: Place in the axis's units, label and colour.
    """
    from matplotlib.transforms import Bbox

    radius = axis.figure.dpi / 15
    taken = [Bbox([place - radius, place + radius]) for place in axis.transData.transform([p[:2] for p in points])]
    for x, y, label, colour in points:
        text = axis.annotate(label, (x, y), (0, 0), textcoords='offset points', fontsize='small', color=colour)
        text.set_bbox(dict(facecolor='white', edgecolor='none', alpha=0.7, pad=0.5))
        for distance, (across, up, edge, side) in product((7, 14, 21), SIDES):
            text.xyann = distance * across, distance * up
            text.set(ha=edge, va=side)
            box = text.get_window_extent()
            inside = axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def draw_road(path: Path, conditions: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy of each step against its latency, on the paper's phone and here; a step without one stands below."""
    figure, axes = new_figure('From MobileNetV3-L to RepViT', 2)
    known = [row for row in rows if row['top1'] is not None]
    floor = min(row['top1'] for row in known) - 1
    panels = {'phone_ms': "the paper's phone, an iPhone 12", 'ms': f'this machine: {conditions}'}
    for axis, (field, title) in zip(axes, panels.items(), strict=True):
        axis.plot([row[field] for row in known], [row['top1'] for row in known], color='lightgrey', zorder=0)
        points = []
        for number, row in enumerate(rows, 1):
            colour = f'C{number - 1}'
            height, face, note = (row['top1'], colour, '') if row in known else (floor, 'none', ' (accuracy not given)')
            axis.scatter(row[field], height, s=30, facecolor=face, edgecolor=colour, zorder=2)
            points.append((row[field], height, f'{number} {row["title"]}{note}', colour))
        axis.set(title=title, xlabel='latency, ms', ylabel="ImageNet top-1, % (the paper's)")
        axis.grid(alpha=0.3)
        axis.margins(x=0.15, y=0.12)
        figure.draw_without_rendering()
        label_points(axis, points)
    figure.savefig(path, dpi=120)
