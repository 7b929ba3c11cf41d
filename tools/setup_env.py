"""Make the environment of a stack: what `requirements/STACK.txt` names and this project, editable.

`make setup` calls it. The stack `openmmlab` lies in `.venv`, any other in `.venv-STACK`. pip installs what it can. This
program does the rest: it makes the environment on a bare machine with the standard library alone, builds mmcv's
compiled operators once for a machine and keeps them in `~/.cache/repvit_mm/wheels`, and installs the headless cv2. If
nothing has to be done, it ends at once. An environment that is half made or has other versions is repaired; if it still
does not work, it is made anew.

The file must parse on Python 3.7, so that it can say that such a Python is too old.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'repvit_mm' / 'wheels'
PYTHONS = ('3.10', '3.11', '3.12')
SECONDS_BETWEEN_REPORTS = 30

# What a wheel of mmcv depends on besides the versions: torch's CUDA, whether mmcv compiles operators for a GPU, Python
# and the platform.
WHEEL_SUFFIX = """
import os, sys, sysconfig, torch
cuda, gpu = torch.version.cuda, torch.cuda.is_available() or os.environ.get('FORCE_CUDA') == '1'
cuda = '+cu' + cuda.replace('.', '') + ('' if gpu else '.nogpu') if cuda else ''
print(cuda, sys.implementation.cache_tag, sysconfig.get_platform(), sep='-')
"""

# What torch's headers have to be compiled with, and the other options that an extension's files are compiled with.
COMPILER_OPTIONS = """
import re, shlex, sysconfig, torch
from torch.utils.cpp_extension import include_paths
folders = [*include_paths(), sysconfig.get_paths()['include']]
with open(folders[0] + '/ATen/ATen.h') as file:
    standard = max(re.findall(r'C[+][+]([0-9]+) or later', file.read()), default='20')
print(
    '-std=c++' + standard,
    '-D_GLIBCXX_USE_CXX11_ABI=%d' % torch._C._GLIBCXX_USE_CXX11_ABI,
    sysconfig.get_config_var('CFLAGS'),
    sysconfig.get_config_var('CCSHARED'),
    '-DTORCH_API_INCLUDE_EXTENSION_H -DTORCH_EXTENSION_NAME=_ext',
    *(shlex.quote('-I' + folder) for folder in folders),
)
"""

# What nearly all of mmcv's files begin with. If a file's options are not the header's, GCC reads the header anew; clang
# would refuse to go on.
HEADER = """
#ifdef __clang__
#error "only GCC has the header compiled once"
#endif
#include <torch/types.h>
"""


class SetupError(Exception):
    """What is wrong and what to do about it, in one line."""


class BrokenEnvironment(SetupError):
    """What is installed does not work."""


def say(message: str) -> None:
    print(f'setup: {message}', flush=True)


def need(condition: object, message: str) -> None:
    if not condition:
        raise SetupError(message)


def last_words(lines: list[str]) -> str:
    """The line of a failed command's output that says most about why it failed."""
    unreachable = any('connection broken by' in line for line in lines)
    for pattern in (r'.*: (fatal )?error: ', r'[\w.]+Error: ', r'ERROR: (?!ResolutionImpossible)', '.'):
        matching = [line.strip() for line in lines if re.match(pattern, line.strip())]
        if matching:
            return matching[-1] + (' (the package index could not be reached)' if unreachable else '')
    return 'no output'


def run(
    failure: str,
    *command: str | Path,
    log: Path | None = None,
    error: type = SetupError,
    variables: dict[str, str] | None = None,
) -> list[str]:
    """Run a command, with some environment variables of its own, and say from time to time how far ninja is in it.

    Returns:
        The lines of its output, which go to the log, too.

    Raises:
        SetupError: if it fails, with the telling line of its output.
    """
    words, lines, said = [str(word) for word in command], [], time.monotonic()
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding='utf-8',
        errors='replace',
        start_new_session=True,
        env={**os.environ, **(variables or {})},
    )
    with process, open(str(log or os.devnull), 'a', encoding='utf-8') as file:
        try:
            file.write(f'$ {" ".join(words)}\n')
            for line in process.stdout:
                file.write(line)
                lines.append(line)
                step = re.match(r'\s*\[(\d+)/(\d+)\]', line)
                if step and time.monotonic() - said >= SECONDS_BETWEEN_REPORTS:
                    said = time.monotonic()
                    say(f'compiled {step.group(1)} of {step.group(2)} files')
        except BaseException:
            # An interrupted build must not go on compiling in the background.
            os.killpg(process.pid, signal.SIGINT)
            raise
    if process.returncode != 0:
        raise error(f'{failure}: {last_words(lines)}' + (f' (log: {log})' if log else ''))
    return lines


def read_requirements(path: Path) -> str:
    """The text of a requirements file, followed by the files that it includes."""
    text = path.read_text()
    included = (path.parent / name for name in re.findall(r'^-r (\S+)', text, re.M))
    return '\n'.join([text, *map(read_requirements, included)])


class Environment:
    """The environment of a stack, which is a file in the checkout's ``requirements/``."""

    def __init__(self, root: Path, stack: str) -> None:
        self.root, self.requirements = root, root / 'requirements' / f'{stack}.txt'
        self.folder = root / ('.venv' if stack == 'openmmlab' else f'.venv-{stack}')
        self.python, self.log = self.folder / 'bin' / 'python', self.folder / 'setup.log'
        self.stamp, self.configuration = self.folder / 'repvit_mm.stamp', self.folder / 'pyvenv.cfg'
        self.build_requirements = root / 'requirements' / 'common' / 'build.txt'
        self.pins = dict(re.findall(r'^([\w-]+)==([^\s;]+)', read_requirements(self.requirements), re.M))
        # A fork gives it another name.
        self.mmcv = next(f'{name}=={self.pins[name]}' for name in self.pins if re.fullmatch(r'(\w+-)?mmcv', name))
        self.wheel_prefix = f'{self.mmcv.replace("==", "")}-torch{self.pins["torch"]}'

    def contents(self) -> set[str]:
        """A digest of what decides on the environment, and the folder of each distribution in it."""
        digest = hashlib.sha256(f'{self.root}{read_requirements(self.requirements)}'.encode())
        for name in ('tools/setup_env.py', 'setup.py', 'pyproject.toml'):
            digest.update((self.root / name).read_bytes())
        # An installation that was cut off has no RECORD.
        return {digest.hexdigest(), *(record.parent.name for record in self.folder.glob('lib/*/*/*.dist-info/RECORD'))}

    def is_usable(self) -> bool:
        """Whether there is something to build upon: a supported Python, with scripts that were made for this place."""
        pip = self.folder / 'bin' / 'pip'
        supported = any((self.folder / 'lib' / f'python{version}').is_dir() for version in PYTHONS)
        # Without its configuration the environment's Python is the one that it was made with, and installs there.
        there = all(path.is_file() for path in (self.configuration, self.python, pip))
        return there and supported and str(self.folder) in pip.read_text()

    def is_ready(self) -> bool:
        """Whether this very program finished the environment, and it holds all that it held then."""
        return self.is_usable() and self.stamp.is_file() and set(self.stamp.read_text().split()) <= self.contents()

    def make(self) -> None:
        """Make the environment, with nothing but pip in it."""
        version, this = '{}.{}'.format(*sys.version_info), sys.executable
        need(
            version in PYTHONS,
            f'Python {version} ({this}) is not supported, {PYTHONS[0]} to {PYTHONS[-1]} are: '
            'name another, as in `make setup PYTHON=python3.11`.',
        )
        venv = f'on Debian and Ubuntu: apt-get install python{version}-venv'
        need(importlib.util.find_spec('ensurepip'), f'{this} has no module ensurepip: install it ({venv}).')
        free = shutil.disk_usage(str(self.root)).free / 1e9
        need(free >= 8, f'{self.root} has {free:.1f} GB of free disk, the environment needs 8: make room there.')
        say(f'creating {self.folder} with Python {version}')
        if self.configuration.exists():
            self.configuration.unlink()  # first: what is cleared in part is not usable
        run(f'creating {self.folder} failed', this, '-m', 'venv', '--clear', self.folder)

    def ask(self, program: str) -> str:
        """The last line that a program prints, run by the environment's Python apart from the caller's variables."""
        command = (self.python, '-I', '-W', 'ignore', '-c', program)
        return ''.join(run(f'{self.folder} does not work', *command, error=BrokenEnvironment)[-1:]).strip()

    def pip(self, *arguments: str | Path, **variables: str) -> None:
        command = (self.python, '-m', 'pip', *arguments)
        run(f'pip {arguments[0]} failed', *command, log=self.log, variables=variables)

    def install(self) -> None:
        """Install what is missing.

        Raises:
            BrokenEnvironment: if the environment does not work after that.
        """
        if self.stamp.exists():
            self.stamp.unlink()
        if not any(WHEELS.glob(f'{self.wheel_prefix}*/*.whl')):
            self.check_compiler()
        torch = f'torch=={self.pins["torch"]}'
        say(f'installing {torch}')
        self.pip('install', torch, '-r', self.build_requirements)
        wheel = self.mmcv_wheel()
        say(f'installing the rest of {self.requirements.name}')
        self.pip('install', '--no-build-isolation', wheel, '-r', self.requirements, '-e', self.root)
        # The same files as the desktop's build, without its need of libGL: on top of it, both requirements are met. A
        # package may have brought it along already, below the other one.
        headless = f'opencv-python-headless=={self.pins["opencv-python"]}'
        self.pip('install', '--no-deps', '--force-reinstall', headless)
        self.ask('import cv2, mmengine; assert cv2.version.headless, "cv2 is not the headless build"')
        self.ask('import mmcv.ops, mmdet, mmseg')
        unfinished = self.stamp.with_suffix('.part')
        unfinished.write_text('\n'.join(self.contents()))
        os.replace(str(unfinished), str(self.stamp))
        say(f'{self.folder} is ready')

    def check_compiler(self) -> None:
        """Refuse to build mmcv where its operators cannot be compiled."""
        compiler = os.environ.get('CXX') or 'c++'
        header = Path(self.ask('import sysconfig; print(sysconfig.get_paths()["include"])'), 'Python.h')
        for found, what, package in (
            (shutil.which(compiler), f'C++ compiler ({compiler})', 'g++'),
            (header.is_file(), header, f'{header.parent.name}-dev'),
        ):
            remedy = f'install it (on Debian and Ubuntu: apt-get install {package})'
            need(found, f'there is no {what}, which mmcv needs to be built: {remedy}.')

    def fast_compiler(self, folder: Path) -> Path:
        """Make a program in a folder that calls the compiler so that mmcv is built in a fraction of the time.

        It compiles without debug information, with torch's header compiled once, and as the C++ that torch asks for,
        which may be a later one than mmcv's.
        """
        compiler = os.environ.get('CXX') or 'c++'
        standard, abi, *others = shlex.split(self.ask(COMPILER_OPTIONS))
        last = ['-g0', '-w', standard, abi]
        header, program = folder / 'torch.h', folder / 'c++'
        header.write_text(HEADER)
        try:
            command = (compiler, *others, *last, '-x', 'c++-header', header, '-o', f'{header}.gch')
            run('compiling the header failed', *command, log=self.log)
            last += ['-include', str(header)]
        except SetupError:
            say("torch's header is compiled again with each file, which takes longer")
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(compiler)} "$@" {" ".join(map(shlex.quote, last))}\n')
        program.chmod(0o755)
        return program

    def mmcv_wheel(self) -> Path:
        """The wheel of mmcv with compiled operators that fits the environment, from the cache or else built into it."""
        suffix = self.ask(WHEEL_SUFFIX)
        folder = WHEELS / f'{self.wheel_prefix}{suffix}'
        if not any(folder.glob('*.whl')):
            self.check_compiler()
            cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
            # A compiler process takes up to 2 GB.
            by_memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 2**31
            jobs = os.environ.get('MAX_JOBS') or str(max(1, min(cores, by_memory)))
            variables = {'MMCV_WITH_OPS': '1', 'MAX_JOBS': jobs}
            say(f'building {self.mmcv} with its operators, once (3 to 5 minutes on two cores); {self.log} shows more')
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Built beside the folder, and moved there when it is whole.
            with tempfile.TemporaryDirectory(prefix='.building-', dir=str(folder.parent)) as building:
                if not re.match(r'\+cu\d+-', suffix):  # no operators for a GPU
                    variables['CXX'] = shlex.quote(str(self.fast_compiler(Path(building))))
                # pip's own cache knows nothing of the torch that a wheel was built against.
                options = ('--verbose', '--no-deps', '--no-build-isolation', '--no-cache-dir', '--no-binary', ':all:')
                self.pip('wheel', *options, '--wheel-dir', building, self.mmcv, **variables)
                (wheel,) = Path(building).glob('*.whl')
                need('-none-any' not in wheel.name, f'mmcv was built without its compiled operators (log: {self.log})')
                folder.mkdir(exist_ok=True)
                os.replace(str(wheel), str(folder / wheel.name))
        return next(folder.glob('*.whl'))


def main(environment: Environment) -> None:
    if environment.is_ready():
        return
    if environment.is_usable():
        try:
            return environment.install()
        except BrokenEnvironment as error:
            say(f'{error}; making it anew')
    environment.make()
    environment.install()


if __name__ == '__main__':
    # A closed terminal and a time limit are interruptions like Ctrl-C.
    for number in (signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stacks = sorted(path.stem for path in ROOT.glob('requirements/*.txt'))
    parser.add_argument('stack', nargs='?', default='openmmlab', choices=stacks)
    try:
        main(Environment(ROOT, parser.parse_args().stack))
    except (SetupError, OSError) as error:
        sys.exit(f'setup: {error}')
    except KeyboardInterrupt:
        sys.exit('setup: interrupted; run it again to go on from here')
