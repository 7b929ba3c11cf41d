"""Looks at one part of an installation and prints what it finds as JSON. The doctor runs it in a separate process.

A broken library may raise anything or crash the process; the doctor goes on in both cases.
"""

import importlib
import json
import sys
from typing import Any


def look_at_module(name: str) -> dict[str, Any]:
    """Import a module."""
    module = importlib.import_module(name)
    return {'version': str(getattr(module, '__version__', ''))}


def look_at_torch() -> dict[str, Any]:
    """Import torch and multiply with it; which devices does it see?"""
    import torch

    assert torch.ones(2, 2).mm(torch.ones(2, 2)).sum() == 8
    devices = [f'CPU, {torch.get_num_threads()} threads']
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            devices.append(f'cuda:{index} {found.name}, {found.total_memory / 2**30:.0f} GiB')
            torch.ones(2, device=f'cuda:{index}').sum().item()
    if torch.backends.mps.is_available():
        devices.append('mps')
    return {'version': torch.__version__, 'cuda': torch.version.cuda, 'devices': devices}


def look_at_operators() -> dict[str, Any]:
    """Load mmcv's compiled operators and run one on each kind of device."""
    import torch
    from mmcv.ops import get_compiling_cuda_version, nms

    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    for device in ('cpu', *(['cuda'] if torch.cuda.is_available() else [])):
        _, kept = nms(boxes.to(device), scores.to(device), 0.5)
        assert kept.tolist() == [0, 2], f'nms on {device} keeps {kept.tolist()}, expected [0, 2]'
    return {'cuda': get_compiling_cuda_version(), 'torch_cuda': torch.version.cuda}


def look_at_config(path: str) -> dict[str, Any]:
    """Read a config: where does it look for data and for pretrained weights?"""
    from pathlib import Path

    from mmengine.config import Config

    from repvit_mm.checkpoint import cached
    from repvit_mm.data_check.paths import SPLITS, is_there, wanted_paths

    cfg = Config.fromfile(path)
    missing = {where: name for name, where in wanted_paths(cfg, *SPLITS) if not is_there(where)}
    count = len({where for _, where in wanted_paths(cfg, *SPLITS)})
    init_cfg = (cfg.get('model', {}).get('backbone') or {}).get('init_cfg') or {}
    checkpoint = init_cfg.get('checkpoint') if isinstance(init_cfg, dict) else None
    weights = [where for where in (checkpoint, cfg.get('load_from')) if where]
    files = {where: str(cached(where)) if where.startswith('http') else where for where in weights}
    absent = {
        where: file for where, file in files.items() if '://' not in file and not Path(file).expanduser().exists()
    }
    return {
        'scope': cfg.get('default_scope'),
        'paths': count,
        'missing': missing,
        'weights': weights,
        'absent': absent,
    }


def main() -> None:
    """Run the probe, and print one line of JSON after whatever else is printed."""
    what, *arguments = sys.argv[1:]
    look = {'torch': look_at_torch, 'operators': look_at_operators, 'config': look_at_config, 'module': look_at_module}
    try:
        found: dict[str, Any] = look[what](*arguments)
    except BaseException as error:  # SystemExit too
        found = {'error': f'{type(error).__name__}: {error}', 'absent': getattr(error, 'name', None)}
    print('\n' + json.dumps(found))


if __name__ == '__main__':
    main()
