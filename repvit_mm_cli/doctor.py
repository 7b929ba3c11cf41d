"""What is installed, and whether it fits together. Imports nothing but the standard library.

Every library is imported in a separate process, see :mod:`repvit_mm_cli.probe`, so a broken one can be reported.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

SECONDS = 180
"""Seconds after which importing a library is given up."""

OPTIONAL = {
    'onnx': 'ONNX and OpenVINO files, int8',
    'onnxruntime': 'ONNX files, int8',
    'openvino': 'OpenVINO files',
    'nncf': 'int8 in OpenVINO',
    'coremltools': 'Core ML files',
    'executorch': 'ExecuTorch files',
    'torchao': 'int8 in ExecuTorch',
    'supervision': 'repvit-mm predict',
    'cv2': 'reading and drawing images',
    'rich': 'progress and tables',
    'pycocotools': "COCO's metric",
    'tensorboard': '--vis-backend tensorboard',
    'shtab': 'repvit-mm completion',
}
"""Module that only some commands need -> what it is for."""
PIP = {'cv2': 'opencv-python-headless', 'mmseg': 'mmsegmentation', 'pkg_resources': '"setuptools<81"'}
"""Module -> its name for pip, where the two differ."""
FORK = 'onedl-'
"""Prefix of the names of the maintained forks, which are distributions of the same modules."""


CPUINFO = Path('/proc/cpuinfo')
"""Where Linux tells of the processor."""

INSTRUCTIONS = {
    'bfloat16': {'amx_bf16': 'AMX-BF16', 'avx512_bf16': 'AVX512-BF16'},
    'int8': {'amx_int8': 'AMX-INT8', 'avx512_vnni': 'AVX512-VNNI', 'avx_vnni': 'AVX-VNNI'},
}
"""What is multiplied faster than float32 -> Linux's flag of an instruction set for it, and that set's name."""


@dataclass(frozen=True)
class Line:
    """The result of one check.

    Args:
        mark: ``'ok'``; ``'absent'`` is missing and not needed; ``'broken'`` is needed, or there and does not work.
        name: The thing.
        text: What was found.
        cure: What to do about it.
    """

    mark: Literal['ok', 'absent', 'broken']
    name: str
    text: str
    cure: str = ''

    def __str__(self) -> str:
        return f'{self.name}: {self.text}' + (f' -> {self.cure}' if self.cure else '')


def package_folder() -> Path | None:
    """Where repvit_mm is installed; ``None`` if it is not. It is not imported."""
    try:
        spec = importlib.util.find_spec('repvit_mm')
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec and spec.origin else None


def version_table(folder: Path) -> ModuleType:
    """The package's module with the versions that it works with, loaded without importing the package."""
    spec = importlib.util.spec_from_file_location('repvit_mm_versions', folder / '_versions.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def probe(what: str, *arguments: str) -> dict[str, Any]:
    """Run one probe in a separate process; an ``error`` in the result says what went wrong."""
    command = [sys.executable, '-W', 'ignore', str(Path(__file__).with_name('probe.py')), what, *arguments]
    # Python puts a program's folder first on its path, and this one holds modules of the package.
    environment = {**os.environ, 'PYTHONSAFEPATH': '1'}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors='replace', timeout=SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return {'error': f'no answer within {SECONDS} s'}
    except OSError as error:
        return {'error': str(error)}
    try:
        return json.loads(done.stdout.rstrip().rpartition('\n')[2])
    except ValueError:
        last = done.stderr.strip().rpartition('\n')[2]
        return {'error': f'the process ended with status {done.returncode}' + (f': {last}' if last else '')}


def reason(found: dict[str, Any], longest: int = 200) -> str:
    """An error of a probe on one line."""
    text = ' '.join(str(found['error']).split())
    return text if len(text) <= longest else f'{text[:longest]} ...'


def is_absent(found: dict[str, Any], module: str) -> bool:
    """Whether a probe failed because the module itself is not installed."""
    return 'error' in found and found['error'].startswith('ModuleNotFoundError') and found.get('absent') == module


def names_for_pip(table: ModuleType | None) -> dict[str, str]:
    """Module -> its name for pip, where the two differ: beside one of the forks, each framework is a fork."""
    frameworks = table.FRAMEWORKS if table else {}
    forks = {module: name for module, (names, *_) in frameworks.items() for name in names if name.startswith(FORK)}
    return {**PIP, **forks} if any(map(has_distribution, forks.values())) else PIP


def build_command(mmcv: str = 'mmcv') -> str:
    """What builds mmcv with its compiled operators for the torch that is there; ``mmcv`` is its name for pip."""
    # MMDetection 3.3 and MMSegmentation 1.2.2 refuse mmcv 2.2.
    requirement = '"mmcv<2.2"' if mmcv == 'mmcv' else mmcv
    return f'MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps {requirement}'


def mmcv_command(table: ModuleType | None, torch: Mapping[str, Any], mmcv: str = 'mmcv') -> str:
    """What installs mmcv with operators for the torch that is there: a published wheel, or else a build.

    Args:
        table: The package's table of versions.
        torch: What the probe of torch found.
        mmcv: mmcv's name for pip.
    """
    version, cuda = str(torch.get('version', '')), torch.get('cuda')
    release = '.'.join(version.split('.')[:2])
    build = f'cu{cuda.replace(".", "")}' if cuda else 'cpu'
    published = table.MMCV_WHEELS if table and mmcv == 'mmcv' and sys.version_info < (3, 12) else {}
    if build not in published.get(release, ()):
        return build_command(mmcv)
    # Libraries that want an older one. For torch 2.1 there is none.
    old = any(
        other == 'mmcv' and beyond == '2.1.0' and has_distribution(name) and not accepts(table, name, first)
        for other, beyond, name, first in table.TOO_NEW
    )
    number = '2.0.1' if old and release == '2.0' else '2.1.0'
    return f'pip install mmcv=={number} -f https://download.openmmlab.com/mmcv/dist/{build}/torch{release}.0/index.html'


def accepts(table: ModuleType, name: str, first: str | None) -> bool:
    """Whether an installed distribution is of a version from ``first`` on."""
    return first is not None and table.is_between(metadata.version(name), first, '999')


def misfits(table: ModuleType, command: str) -> Iterable[Line]:
    """Check that no distribution is too new for another.

    Args:
        table: The package's table of versions.
        command: What installs an mmcv that fits.
    """
    told = set()
    for name, version, other, first in table.TOO_NEW:
        if name in told or not (has_distribution(name) and has_distribution(other)):
            continue
        if table.is_between(metadata.version(name), version, '999') and not accepts(table, other, first):
            told.add(name)
            cure = command if name == 'mmcv' else f'pip install "{name}<{version}"'
            if name == 'mmcv' and first:
                cure = f'pip install "{other}>={first}"'
            text = f'{metadata.version(name)} is too new for {other} {metadata.version(other)}'
            yield Line('broken', name, text, cure)


def module_line(
    module: str, found: dict[str, Any], needed: bool, names: Mapping[str, str] = PIP, command: str = ''
) -> Line:
    """The check of a module that was imported; ``names`` are pip's, ``command`` installs an mmcv that fits."""
    install = f'pip install {names.get(module, module)}'
    if is_absent(found, module):
        if not needed and module not in OPTIONAL:
            return Line('absent', module, 'not installed')
        purpose = f'for {OPTIONAL[module]}: ' if module in OPTIONAL else ''
        return Line('broken' if needed else 'absent', module, 'not installed', purpose + install)
    if 'error' in found:
        cure = f'{install} --force-reinstall'
        if 'MMCV==' in found['error']:
            cure = command
        elif (other := found.get('absent') or module).partition('.')[0] != module:
            cure = f'install {other}, which it needs'
        return Line('broken', module, f'installed, but cannot be imported: {reason(found)}', cure)
    return Line('ok', module, found.get('version') or 'works')


def distribution_lines(table: ModuleType) -> Iterable[Line]:
    """Check that versions are supported and that no two stacks overwrite each other."""
    for module, (names, first, beyond) in table.FRAMEWORKS.items():
        installed = {}
        for name in names:
            try:
                installed[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
            except Exception as error:  # a broken record of an installation
                yield Line(
                    'broken', name, f'its record cannot be read: {error}', f'pip install --force-reinstall {name}'
                )
        if len(installed) > 1:
            several = ' and '.join(f'{name} {version}' for name, version in installed.items())
            yield Line(
                'broken', module, f'{several} overwrite each other', f'pip uninstall {" ".join(installed)}; install one'
            )
        for name, version in installed.items():
            try:
                fits = table.is_between(version, first, beyond)
            except ValueError:
                fits = False
            if not fits:
                yield Line('broken', module, f'{name} {version}', f'pip install "{name}>={first},<{beyond}"')


def processor_lines() -> Iterable[Line]:
    """Which instructions an x86 processor has for numbers smaller than float32, where Linux tells."""
    try:
        found = next(line for line in CPUINFO.read_text().splitlines() if line.startswith('flags'))
    except (OSError, StopIteration):
        return
    flags = set(found.partition(':')[2].split())
    sets = {kind: [name for flag, name in known.items() if flag in flags] for kind, known in INSTRUCTIONS.items()}
    text = '; '.join(f'{kind} by {" and ".join(names) or "nothing"}' for kind, names in sets.items())
    yield Line('ok', 'instructions', text)


def operator_line(found: dict[str, Any], command: str) -> Line:
    """What to say of mmcv's compiled operators; the command installs them."""
    name, rebuild = 'mmcv operators', f'install mmcv for this torch: {command}'
    if 'error' in found:
        text = reason(found)
        if "No module named 'mmcv._ext'" in found['error']:
            text = 'mmcv was installed without them'
        elif 'undefined symbol' in found['error']:
            text = f'mmcv was built for another torch: {text}'
        return Line('broken', name, text, rebuild)
    built, torch_cuda = str(found['cuda']), found['torch_cuda']
    if torch_cuda and built.split('.')[0] != torch_cuda.split('.')[0]:
        return Line('broken', name, f'built for CUDA {built}, torch for CUDA {torch_cuda}', rebuild)
    return Line('ok', name, 'load and run' + (f', CUDA {built}' if torch_cuda else ' on the CPU'))


def config_lines(path: str, found: dict[str, Any]) -> Iterable[Line]:
    """The checks of a config."""
    if 'error' in found:
        yield Line('broken', path, f'cannot be read: {reason(found)}', 'correct it, or what is broken above first')
        return
    for where, name in found['missing'].items():
        cure = f'put it there, or set --cfg-options {name}=PATH'
        yield Line('broken', 'data', f'{where} not found ({name}, from {Path.cwd()})', cure)
    if not found['missing']:
        yield Line('ok', 'data', f'{found["paths"]} files and folders of the config are there')
    for where in found['weights']:
        if where not in found['absent']:
            yield Line('ok', 'weights', where)
        elif where.startswith('http'):
            yield Line(
                'absent',
                'weights',
                f'{where} is not downloaded yet',
                f'training does, or put it at {found["absent"][where]}',
            )
        else:
            yield Line('broken', 'weights', f'{where} not found', 'tools/train.py --pretrained PATH, or none')


def examine(config: str | None = None) -> Iterable[Line]:
    """Run all checks.

    Args:
        config: Path of a config whose data and weights are looked for.

    Yields:
        The results; what others depend on comes first.
    """
    version = sys.version_info
    text = f'{version.major}.{version.minor}.{version.micro} ({sys.executable})'
    if version >= (3, 10):
        yield Line('ok', 'Python', text)
    else:
        yield Line('broken', 'Python', text, 'install Python 3.10 or later')
    folder = package_folder()
    frameworks = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg')
    others = ('repvit_mm', 'safetensors', 'pkg_resources', 'ftfy', 'regex', *OPTIONAL)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = {name: (name,) if name == 'torch' else ('module', name) for name in frameworks}
        looks |= {'operators': ('operators',), 'config': ('config', str(config))}
        looks |= {name: ('module', name) for name in others}
        if config is None or not Path(config).is_file():
            del looks['config']
        jobs = {name: pool.submit(probe, *look) for name, look in looks.items()}

        def found(name: str) -> dict[str, Any]:
            return jobs[name].result()

        def line(name: str, needed: bool) -> Line:
            return module_line(name, found(name), needed, names, mmcv)

        table = None
        if folder:
            try:
                table = version_table(folder)
            except (Exception, SystemExit) as error:
                cure = 'pip install --force-reinstall repvit_mm'
                yield Line('broken', 'versions', f'{folder} is not whole: {type(error).__name__}: {error}', cure)
            else:
                yield from distribution_lines(table)
        names = names_for_pip(table)
        mmcv = mmcv_command(table, found('torch'), names.get('mmcv', 'mmcv'))
        if table:
            yield from misfits(table, mmcv)
        yield line('torch', needed=True)
        if 'devices' in found('torch'):
            yield Line('ok', 'devices', '; '.join(found('torch')['devices']))
        yield from processor_lines()
        yield line('mmengine', needed=True)
        there = {name: not is_absent(found(name), name) for name in ('mmcv', 'mmdet', 'mmseg')}
        tasks = there['mmdet'] or there['mmseg']
        if there['mmcv']:
            yield line('mmcv', needed=tasks)
            yield operator_line(found('operators'), mmcv)
        else:
            yield Line('broken' if tasks else 'absent', 'mmcv', 'not installed', mmcv)
        scope = found('config').get('scope') if 'config' in jobs else None
        for name in ('mmdet', 'mmseg'):
            yield line(name, needed=name == scope)
        if not tasks:
            yield Line(
                'absent',
                'tasks',
                'neither mmdet nor mmseg is installed',
                "pip install 'repvit_mm[openmmlab]', or 'repvit_mm[onedl]' for the maintained forks",
            )
        yield line('repvit_mm', needed=True)
        yield line('safetensors', needed=True)
        # The forks of MMEngine do without it.
        yield line('pkg_resources', needed=has_distribution('mmengine'))
        for name in ('ftfy', 'regex'):
            yield line(name, needed=there['mmseg'])
        for name in OPTIONAL:
            yield line(name, needed=False)
        if 'config' in jobs:
            yield from config_lines(config, found('config'))
        elif config is not None:
            yield Line('broken', config, 'not found', 'name a config file')


def has_distribution(name: str) -> bool:
    """Whether pip knows a distribution."""
    try:
        return bool(metadata.version(name))
    except Exception:  # absent, or a broken record
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found; returns the exit status."""
    parser = argparse.ArgumentParser(
        description='Say what is installed, whether it fits together, and what to do about what does not. The exit '
        'status is 1 if something needed is broken.'
    )
    parser.add_argument('config', nargs='?', help='look for the data and the pretrained weights of this config too')
    args = parser.parse_args(arguments)
    marks = {'ok': '✓', 'absent': '·', 'broken': '✗'}
    try:
        ''.join(marks.values()).encode(sys.stdout.encoding or 'ascii')
    except (UnicodeEncodeError, LookupError):
        marks = {'ok': '+', 'absent': '-', 'broken': 'x'}
    broken = 0
    for line in examine(args.config):
        broken += line.mark == 'broken'
        print(marks[line.mark], line, flush=True)
    print(f'{broken} broken' if broken else 'nothing needed is broken')
    return 1 if broken else 0
