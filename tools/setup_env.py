"""Make `.venv`: the pinned stack that this project is developed and tested on, and the project itself, editable.

Runs on a bare machine with the standard library alone; `make setup` calls it. With nothing to do it takes a second; an
environment that is broken, half made or of other versions is repaired. The compiled operators of mmcv are built once
for a machine: the wheel is kept in `~/.cache/repvit_mm/wheels`, for other checkouts too.

The file must parse on Python 3.7, to be able to say that such a Python is too old.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / '.venv'
PYTHON = VENV / 'bin' / 'python'
STAMP = VENV / 'repvit_mm.stamp'
LOG = VENV / 'setup.log'
WHEELS = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'repvit_mm' / 'wheels'

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 12)
TORCH = '2.13.0'
MMCV = '2.1.0'
OPENCV = '5.0.0.93'
# mmengine imports pkg_resources at run time and mmcv's build does too; setuptools 81 dropped it.
BUILD_TOOLS = ('setuptools>=70.1,<81', 'wheel', 'ninja', 'psutil')
REQUIREMENTS = (
    'mmengine==0.10.7',
    'mmdet==3.3.0',
    'mmsegmentation==1.2.2',
    # mmsegmentation needs these two without declaring them.
    'ftfy',
    'regex',
    'numpy>=2,<2.5',
    f'opencv-python=={OPENCV}',
    'pytest==9.2.0',
    'pytest-xdist',
    'hypothesis',
    'safetensors',
    # The benchmark's route through an exported graph.
    'onnx',
    'onnxruntime',
    'ruff==0.17.6',
)
# What is run to see that the environment works.
SMOKE_TEST = 'import cv2, mmcv.ops, mmdet, mmseg; assert cv2.version.headless, "cv2 is not the headless build"'


class SetupError(Exception):
    """What is wrong and what to do about it, in one line."""


def say(message: str) -> None:
    print(f'setup: {message}', flush=True)


# ---------------------------------------------------------------------------------------------- is there nothing to do?


def fingerprint() -> str:
    """Digest of all that decides what the environment holds."""
    digest = hashlib.sha256(str(ROOT).encode())
    for name in ('tools/setup_env.py', 'setup.py', 'pyproject.toml'):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def run_python(program: str) -> subprocess.CompletedProcess:
    """Run a program with the environment's Python, apart from the caller's folder and variables."""
    return subprocess.run(
        [str(PYTHON), '-I', '-W', 'ignore', '-c', program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )


def installed() -> list[str]:
    """`name==version` of each distribution in the environment; nothing if its Python will not do or files are lost."""
    program = (
        'import csv, sys\n'
        'from importlib import metadata\n'
        f'assert {OLDEST_PYTHON} <= sys.version_info[:2] <= {NEWEST_PYTHON}\n'
        'for found in metadata.distributions():\n'
        # An installation that was cut off has no RECORD.
        '    for name, *_ in csv.reader((found.read_text("RECORD") or "RECORD").splitlines()):\n'
        '        assert name.endswith(".pyc") or found.locate_file(name).exists(), name\n'
        '    print(found.metadata["Name"], found.version, sep="==")'
    )
    try:
        result = run_python(program)
    except OSError:
        return []
    return sorted(result.stdout.split()) if result.returncode == 0 else []


def is_ready() -> bool:
    """Whether the environment was finished by this very program and still holds all that it held then."""
    try:
        digest, *packages = STAMP.read_text().split()
    except (OSError, ValueError):
        return False
    return digest == fingerprint() and set(packages) <= set(installed())


def write_stamp() -> None:
    unfinished = STAMP.with_suffix('.part')
    unfinished.write_text('\n'.join([fingerprint(), *installed()]))
    os.replace(str(unfinished), str(STAMP))


# ----------------------------------------------------------------------------------------------------------- preflight


def check_python() -> None:
    """Refuse to make an environment from a Python that cannot carry it."""
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        raise SetupError(
            f'Python {sys.version.split()[0]} ({sys.executable}) is not supported, 3.10 to 3.12 are: '
            'name another, as in `make setup PYTHON=python3.11`.'
        )
    for module in ('venv', 'ensurepip'):
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f'{sys.executable} has no module {module}: install it '
                f'(on Debian and Ubuntu: apt-get install python3.{sys.version_info[1]}-venv).'
            )


def check_disk(folder: Path, gigabytes: int, purpose: str) -> None:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(str(folder)).free / 1e9
    if free < gigabytes:
        raise SetupError(f'{folder} has {free:.1f} GB of free disk, {purpose} needs {gigabytes} GB: make room there.')


def check_compiler(facts: dict) -> None:
    """Refuse to build mmcv where its operators cannot be compiled."""
    compiler = os.environ.get('CXX') or 'c++'
    if shutil.which(compiler) is None:
        raise SetupError(
            f'there is no C++ compiler ({compiler}), which mmcv needs to be built: install one '
            '(on Debian and Ubuntu: apt-get install g++).'
        )
    if not Path(facts['include'], 'Python.h').is_file():
        raise SetupError(
            f'the Python headers ({facts["include"]}/Python.h) are missing, which mmcv needs to be built: install them '
            f'(on Debian and Ubuntu: apt-get install python{facts["version"]}-dev).'
        )
    if facts['gpu'] and not facts['cuda_home']:
        raise SetupError(
            f'there is no CUDA compiler (nvcc), which mmcv needs to be built for this GPU: install the CUDA toolkit '
            f'{facts["cuda"]}, or set CUDA_VISIBLE_DEVICES= to do without the GPU.'
        )


def preflight(facts: dict) -> None:
    """Check what can be checked before anything large is downloaded or built."""
    temporary = Path(tempfile.gettempdir())
    if not facts['torch']:
        check_disk(VENV, 8, 'the environment')
        check_disk(temporary, 4, 'downloading torch')
    # Before torch is there, which of its builds it will be is not known: any wheel gives the benefit of the doubt.
    if not any(WHEELS.glob(wheel_key(facts, cuda='*') + '/*.whl')):
        check_compiler(facts)
        check_disk(temporary, 2, 'building mmcv')
        check_disk(WHEELS, 1, 'the built mmcv')


# ------------------------------------------------------------------------------------------------------------ the steps


def last_words(output: list[str]) -> str:
    """The line of a failed command's output that says most about why it failed."""
    lines = [line.strip() for line in output if line.strip()]
    for pattern in (r'.*: (fatal )?error: ', r'[\w.]+Error: ', r'ERROR: ', ''):
        matching = [line for line in lines if re.match(pattern, line)]
        if matching:
            break
    else:
        return 'no output'
    unreachable = any('connection broken by' in line for line in lines)
    return matching[-1] + (' (the package index could not be reached)' if unreachable else '')


def pip(*arguments: str, environment: dict | None = None, watch: Callable[[str], None] = lambda line: None) -> None:
    """Run pip in the environment; its output goes to the log and, line by line, to `watch`.

    Raises:
        SetupError: if pip fails, with the telling line of its output and the log's path.
    """
    output = []
    with LOG.open('a', encoding='utf-8') as log:
        log.write(f'$ pip {" ".join(arguments)}\n')
        process = subprocess.Popen(
            [str(PYTHON), '-m', 'pip', *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            encoding='utf-8',
            errors='replace',
            env={**os.environ, 'PIP_DISABLE_PIP_VERSION_CHECK': '1', **(environment or {})},
            start_new_session=True,
        )
        try:
            for line in process.stdout:
                log.write(line)
                output.append(line)
                watch(line)
        except BaseException:
            # An interrupted build must not go on compiling in the background.
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
            raise
    if process.wait() != 0:
        raise SetupError(f'pip {arguments[0]} failed: {last_words(output)} (log: {LOG})')


def venv_is_usable() -> bool:
    """Whether `.venv` can be built upon: whole, of a supported Python, with scripts that were made for this place."""
    try:
        made_here = str(VENV) in (VENV / 'bin' / 'pip').read_text()
    except OSError:
        return False
    return made_here and bool(installed())


def make_venv() -> None:
    check_python()
    say(f'creating {VENV} with Python {sys.version.split()[0]}')
    result = subprocess.run(
        [sys.executable, '-m', 'venv', '--clear', str(VENV)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    )
    if result.returncode != 0:
        raise SetupError(f'creating {VENV} failed: {last_words(result.stdout.splitlines())}')


def environment_facts() -> dict:
    """What a wheel for the environment depends on and its build needs: Python's build, torch's CUDA, headers, nvcc."""
    program = (
        'import json, sys, sysconfig\n'
        'from importlib import metadata\n'
        'facts = dict(tag=sys.implementation.cache_tag, platform=sysconfig.get_platform(), torch=False,\n'
        '             version="{}.{}".format(*sys.version_info), include=sysconfig.get_paths()["include"],\n'
        '             cuda=None, gpu=False, cuda_home=None)\n'
        'if any(metadata.distributions(name="torch")):\n'
        '    import torch\n'
        '    from torch.utils.cpp_extension import CUDA_HOME\n'
        '    facts.update(torch=True, cuda=torch.version.cuda, gpu=torch.cuda.is_available(), cuda_home=CUDA_HOME)\n'
        'print(json.dumps(facts))'
    )
    result = run_python(program)
    if result.returncode != 0:
        raise SetupError(f'{PYTHON} does not work: {last_words(result.stderr.splitlines())}; delete {VENV}.')
    return json.loads(result.stdout)


def wheel_key(facts: dict, cuda: str) -> str:
    return f'mmcv{MMCV}-torch{TORCH}{cuda}-{facts["tag"]}-{facts["platform"]}'


def cuda_suffix(facts: dict) -> str:
    """Part of the key: a wheel for a CUDA build of torch is another than for a CPU build, and mmcv compiles its CUDA
    operators only where it sees a GPU."""
    if not facts['cuda']:
        return ''
    return '+cu' + facts['cuda'].replace('.', '') + ('' if facts['gpu'] else '.nogpu')


def mmcv_wheel(facts: dict) -> Path:
    """The wheel of mmcv with compiled operators that fits the environment, from the cache or else built into it."""
    folder = WHEELS / wheel_key(facts, cuda_suffix(facts))
    if not any(folder.glob('*.whl')):
        check_compiler(facts)
        build_wheel(folder)
    return next(folder.glob('*.whl'))


def build_wheel(folder: Path) -> None:
    """Build the wheel beside `folder` and move it there when it is whole."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    # A compiler process takes up to 2 GB.
    by_memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 2**31
    jobs = os.environ.get('MAX_JOBS') or str(max(1, min(cores, by_memory)))
    say(
        f'building mmcv {MMCV} with its compiled operators, {jobs} files at a time (about 25 minutes on two cores). '
        f'The wheel is kept in {folder}: this happens once. Log: {LOG}'
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.building-', dir=str(folder.parent)) as building:
        # pip's own cache knows nothing of the torch that a wheel was built against.
        pip(
            *('wheel', '--verbose', '--no-deps', '--no-build-isolation', '--no-cache-dir', '--no-binary', 'mmcv'),
            *('--wheel-dir', building, f'mmcv=={MMCV}'),
            environment={'MMCV_WITH_OPS': '1', 'MAX_JOBS': jobs},
            watch=progress_reporter(),
        )
        (wheel,) = Path(building).glob('*.whl')
        with zipfile.ZipFile(str(wheel)) as archive:
            if not any(name.startswith('mmcv/_ext.') for name in archive.namelist()):
                raise SetupError(f'mmcv was built without its compiled operators (log: {LOG})')
        folder.mkdir(exist_ok=True)
        os.replace(str(wheel), str(folder / wheel.name))


def progress_reporter(seconds: float = 30) -> Callable[[str], None]:
    """A watcher of ninja's `[37/101] c++ ...` lines that says every so often how far the build is."""
    start = last = time.monotonic()

    def watch(line: str) -> None:
        nonlocal last
        now = time.monotonic()
        step = re.match(r'\s*\[(\d+)/(\d+)\]', line)
        if step and now - last >= seconds:
            last = now
            say(f'building mmcv: {step.group(1)} of {step.group(2)} files after {(now - start) / 60:.1f} minutes')

    return watch


def install() -> str | None:
    """Install what is missing in the environment.

    Returns:
        What is wrong with the environment after that, if anything.
    """
    if STAMP.exists():
        STAMP.unlink()
    preflight(environment_facts())
    torch = f'torch=={TORCH}'
    say(f'installing {torch}')
    pip('install', *BUILD_TOOLS)
    pip('install', torch)
    wheel = mmcv_wheel(environment_facts())
    say('installing the mm libraries and what the tests need')
    pip('install', *BUILD_TOOLS, torch, str(wheel), *REQUIREMENTS)
    # The mm libraries require opencv-python, which needs the libraries of a desktop (libGL) to be imported. The
    # headless build has the same files without that need: on top of the other, both requirements are met.
    pip('install', '--no-deps', f'opencv-python-headless=={OPENCV}')
    pip('install', '--no-deps', '--no-build-isolation', '--editable', str(ROOT))
    result = run_python(SMOKE_TEST)
    return None if result.returncode == 0 else last_words(result.stderr.splitlines())


def main() -> None:
    if is_ready():
        return
    adopted = venv_is_usable()
    if not adopted:
        make_venv()
    problem = install()
    if problem and adopted:
        say(f'{VENV} does not work ({problem}): making it anew')
        make_venv()
        problem = install()
    if problem:
        raise SetupError(f'{VENV} does not work: {problem} (log: {LOG}; mmcv comes from {WHEELS})')
    write_stamp()
    say(f'{VENV} is ready')


if __name__ == '__main__':
    try:
        main()
    except (SetupError, OSError) as error:
        sys.exit(f'setup: {error}')
    except KeyboardInterrupt:
        sys.exit('setup: interrupted; run it again to go on from here')
