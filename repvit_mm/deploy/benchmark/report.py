"""What was measured, as a table and as a JSON file."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..._versions import DISTRIBUTIONS
from ...files import write_whole
from ..load import versions
from ..timing import Spread

OTHERS = ('timm', 'onnx', 'onnxruntime', 'openvino', 'numpy')
"""Whose versions the JSON file holds beside those of the frameworks, as far as they are installed."""


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on: processor, threads, GPU, versions, and the load that there was before."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        processor = next(line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    # Of torch its own word, which names its CUDA too.
    found = {'python': platform.python_version()} | versions((*DISTRIBUTIONS, *OTHERS)) | {'torch': torch.__version__}
    machine: dict[str, Any] = {
        'processor': processor,
        'instructions': torch.backends.cpu.get_cpu_capability(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'load before': round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None,
        'system': platform.platform(),
        'versions': found,
    }
    if device.type == 'cuda':
        machine['gpu'] = torch.cuda.get_device_name()
        found |= {'cuda': torch.version.cuda, 'cudnn': torch.backends.cudnn.version()}
    return machine


def write_json(path: Path, machine: Mapping[str, Any], settings: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Everything that was measured, with the command, the settings and the machine it was measured on."""
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    everything = {'command': command, 'machine': machine, 'settings': settings, **content}
    write_whole(path, (json.dumps(everything, indent=2, default=str) + '\n').encode())


def times(measured: Spread, first: Spread, batch: int) -> dict[str, Any]:
    """The fields of a row that say how long it took, also in terms of the first candidate."""
    return {
        'ms': 1000 * measured.median,
        'quartiles_ms': [1000 * measured.lower, 1000 * measured.upper],
        'images_per_s': batch / measured.median,
        'times_first': measured.median / first.median,
    }


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    'variant': ('variant', str),
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
    'operations': ('operations', str),
    'elementwise_bytes': ('elementwise,\nMiB moved', lambda number: f'{number / 2**20:.1f}'),
    'times_plain': ('times\nplain', lambda value: f'{value:.2f}'),
    'bias_bytes': ('biases,\nMiB', lambda number: f'{number / 2**20:.1f}'),
    'drawn': ('distance,\ngradients drawn', '{:.4f}'.format),
    'drawn_times_plain': ('times\nplain', '{:.2f}'.format),
    'squares': ('distance,\nsquares of maps', '{:.4f}'.format),
    'squares_times_plain': ('times\nplain', '{:.2f}'.format),
    'saved_bytes': ('saved for\nbackward, MiB', lambda number: f'{number / 2**20:.1f}'),
    'process_bytes': ('peak of\nprocess, MiB', lambda number: f'{number / 2**20:.0f}'),
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
