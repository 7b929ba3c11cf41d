"""The set-up program behind `make setup`, without downloading or compiling anything."""

import ast
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / 'tools' / 'setup_env.py'
REQUIREMENTS = [str(path.relative_to(ROOT)) for path in (ROOT / 'requirements').rglob('*.txt')]
STACKS = [path.stem for path in (ROOT / 'requirements').glob('*.txt')]
SUFFIX = '-cpython-311-linux-x86_64'
KEY = f'mmcv2.1.0-torch2.13.0{SUFFIX}'
WHEEL = 'mmcv-2.1.0-cp311-cp311-linux_x86_64.whl'


@pytest.fixture
def setup_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, with a cache of its own."""
    spec = importlib.util.spec_from_file_location('setup_env', PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.WHEELS = tmp_path / 'cache' / 'repvit_mm' / 'wheels'
    for name in ('CXX', 'MAX_JOBS', 'FORCE_CUDA'):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the files that decide what the environment holds."""
    root = tmp_path / 'checkout'
    for name in ('tools/setup_env.py', 'setup.py', 'pyproject.toml', *REQUIREMENTS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture
def environment(setup_env: ModuleType, checkout: Path, tmp_path: Path):
    """The environment of that checkout, which is yet to be made, with its log elsewhere."""
    environment = setup_env.Environment(checkout, 'openmmlab')
    environment.log = tmp_path / 'setup.log'
    return environment


@pytest.fixture
def packages(environment) -> Path:
    """The folder of packages of the environment, which is made, without pip, and has one small package."""
    venv.create(environment.folder, symlinks=True)
    packages = next(environment.folder.glob('lib/python*/site-packages'))
    info = packages / 'thing-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n')
    (info / 'RECORD').write_text('thing-1.0.dist-info/METADATA,,\n')
    (environment.folder / 'bin' / 'pip').write_text(f'#!{environment.python}\n')
    return packages


@pytest.fixture
def calls(environment, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What pip is asked from here on, in place of being run."""
    calls = []
    monkeypatch.setattr(environment, 'pip', lambda *arguments: calls.append(tuple(str(word) for word in arguments)))
    return calls


@pytest.fixture
def answers(environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str | Exception]:
    """Word -> what the environment's Python answers to a program with that word, where mmcv can be built."""
    (tmp_path / 'include/python3.11').mkdir(parents=True)
    (tmp_path / 'include/python3.11/Python.h').touch()
    answers = {
        'get_platform': SUFFIX,
        'print(sysconfig.get_paths': str(tmp_path / 'include/python3.11'),
        'include_paths': '-std=c++17 -D_GLIBCXX_USE_CXX11_ABI=0 -O3 -fPIC "-I/a folder"',
        'cv2': '',
        'mmcv.ops': '',
    }

    def ask(program: str) -> str:
        (answer,) = (answer for word, answer in answers.items() if word in program)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(environment, 'ask', ask)
    return answers


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only program on the PATH: a `c++` that is content with everything."""
    program = put(tmp_path / 'bin' / 'c++')
    program.write_text('#!/bin/sh\n')
    program.chmod(0o755)
    monkeypatch.setenv('PATH', str(program.parent))
    return program


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


# ----------------------------------------------------------------------------------------------------------- the stacks


@pytest.mark.parametrize(
    ('stack', 'folder', 'mmcv', 'wheel'),
    [
        ('openmmlab', '.venv', 'mmcv==2.1.0', 'mmcv2.1.0-torch2.13.0'),
        ('onedl', '.venv-onedl', 'onedl-mmcv==2.3.6', 'onedl-mmcv2.3.6-torch2.13.0'),
        ('wheels', '.venv-wheels', 'mmcv==2.1.0', 'mmcv2.1.0-torch2.1.2'),
        ('oldest', '.venv-oldest', 'mmcv==2.0.1', 'mmcv2.0.1-torch2.0.1'),
        ('newest', '.venv-newest', 'onedl-mmcv==2.3.6', 'onedl-mmcv2.3.6-torch2.15.0'),
    ],
)
def test_each_stack_has_a_file_and_a_folder(setup_env, checkout, stack, folder, mmcv, wheel):
    environment = setup_env.Environment(checkout, stack)
    assert environment.folder == checkout / folder
    assert environment.mmcv == mmcv
    assert environment.wheel_prefix == wheel


def test_files_that_a_stack_takes_in_are_read(setup_env, checkout):
    assert 'pytest' in setup_env.Environment(checkout, 'onedl').pins
    (checkout / 'requirements/common/tools.txt').write_text('-r more.txt\n')
    (checkout / 'requirements/common/more.txt').write_text('thing==1.2  # a thing\n')
    pins = setup_env.Environment(checkout, 'onedl').pins
    assert pins['thing'] == '1.2' and 'pytest' not in pins


def test_unknown_stack_is_refused(checkout):
    done = subprocess.run(
        [sys.executable, checkout / 'tools/setup_env.py', 'mmlab'], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "invalid choice: 'mmlab' (choose from" in done.stderr.splitlines()[-1]
    assert all(stack in done.stderr.splitlines()[-1] for stack in STACKS)


def test_pre_commit_checks_with_the_installed_ruff(setup_env):
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    (revision,) = (repo['rev'] for repo in hooks if 'ruff' in repo['repo'])
    assert setup_env.Environment(ROOT, 'openmmlab').pins['ruff'] == revision.removeprefix('v')


# -------------------------------------------------------------------------------------------------------- installation


def test_pip_reads_the_stack(setup_env, environment, packages, calls, answers):
    wheel = put(setup_env.WHEELS / KEY / WHEEL)
    environment.install()
    file = str(environment.requirements)
    assert calls == [
        ('install', 'torch==2.13.0', '-r', str(environment.root / 'requirements/common/build.txt')),
        ('install', '--no-build-isolation', str(wheel), '-r', file, '-e', str(environment.root)),
        ('install', '--no-deps', '--force-reinstall', f'opencv-python-headless=={environment.pins["opencv-python"]}'),
    ]
    assert environment.is_ready()


@pytest.mark.parametrize(('module', 'broken'), [('cv2', 'not the headless build'), ('mmcv.ops', 'no mmcv._ext')])
def test_what_does_not_work_is_not_ready(setup_env, environment, packages, calls, answers, module, broken):
    put(setup_env.WHEELS / KEY / WHEEL)
    answers[module] = setup_env.BrokenEnvironment(broken)
    with pytest.raises(setup_env.BrokenEnvironment, match=broken):
        environment.install()
    assert not environment.is_ready()


# ----------------------------------------------------------------------------------------------------------- the wheel


@pytest.mark.parametrize(
    ('cuda', 'gpu', 'forced', 'suffix'),
    [
        (None, False, '0', ''),
        ('12.8', True, '0', '+cu128'),
        ('12.8', False, '0', '+cu128.nogpu'),
        ('12.8', False, '1', '+cu128'),
    ],
)
def test_wheel_key_names_all_that_the_wheel_depends_on(
    setup_env, environment, packages, monkeypatch, cuda, gpu, forced, suffix
):
    """Asked of a Python in which torch is a file of two values. mmcv reads FORCE_CUDA."""
    monkeypatch.setenv('FORCE_CUDA', forced)
    (packages / 'torch.py').write_text(
        'from types import SimpleNamespace\n'
        f'version = SimpleNamespace(cuda={cuda!r})\n'
        f'cuda = SimpleNamespace(is_available=lambda: {gpu})\n'
    )
    tag = f'{sys.implementation.cache_tag}-{sysconfig.get_platform()}'
    assert environment.ask(setup_env.WHEEL_SUFFIX) == f'{suffix}-{tag}'


def test_broken_torch_is_named(setup_env, environment, packages):
    (packages / 'torch.py').write_text('raise ImportError("libtorch.so is missing")')
    with pytest.raises(
        setup_env.BrokenEnvironment, match=r'\.venv does not work: ImportError: libtorch\.so is missing'
    ):
        environment.ask(setup_env.WHEEL_SUFFIX)


def test_cached_wheel_is_used_without_a_build(setup_env, environment, calls, answers):
    wheel = put(setup_env.WHEELS / KEY / WHEEL)
    assert environment.mmcv_wheel() == wheel
    assert not calls


@pytest.fixture
def build(
    setup_env: ModuleType, environment, answers, compiler, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Builds the wheel with a pip that writes one of the given name and may then fail."""

    def build(name: str, error: Exception | None = None) -> Path:
        def pip(*arguments, **variables):
            assert arguments[0] == 'wheel' and arguments[-1] == 'mmcv==2.1.0'
            assert variables['MMCV_WITH_OPS'] == '1'
            assert int(variables['MAX_JOBS']) >= 1
            assert ('CXX' in variables) == ('+cu128-' not in answers['get_platform'])
            target = Path(arguments[arguments.index('--wheel-dir') + 1])
            # The move into the cache is atomic within one file system only.
            assert target.parent == setup_env.WHEELS
            put(target / name)
            assert not (setup_env.WHEELS / KEY).exists()
            if error:
                raise error

        monkeypatch.setattr(environment, 'pip', pip)
        return environment.mmcv_wheel()

    return build


def test_built_wheel_lands_in_the_cache_of_its_torch(setup_env, build):
    other = put(setup_env.WHEELS / KEY.replace('2.13.0', '2.12.0') / WHEEL)
    assert build(WHEEL) == setup_env.WHEELS / KEY / WHEEL
    assert {path.name for path in setup_env.WHEELS.iterdir()} == {other.parent.name, KEY}


def test_operators_for_a_gpu_are_compiled_by_the_compiler_itself(setup_env, build, answers):
    answers['get_platform'] = f'+cu128{SUFFIX}'
    assert build(WHEEL).parent.name == f'mmcv2.1.0-torch2.13.0+cu128{SUFFIX}'


@pytest.mark.parametrize(
    ('failure', 'last'),
    [
        ('exit 0', '-g0 -w -std=c++17 -D_GLIBCXX_USE_CXX11_ABI=0 -include {folder}/torch.h'),
        ('case $* in *c++-header*) exit 1; esac', '-g0 -w -std=c++17 -D_GLIBCXX_USE_CXX11_ABI=0'),
    ],
    ids=['header', 'no header'],
)
def test_compiler_is_called_with_options_that_save_time(environment, answers, compiler, tmp_path, failure, last):
    """The compiler is a program that writes down how it is called."""
    compiler.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/commands\n{failure}\n')
    program = environment.fast_compiler(tmp_path)
    subprocess.run([program, '-c', 'nms.cpp', '-DX=a b'], check=True)
    header, file = (tmp_path / 'commands').read_text().splitlines()
    assert header == (
        '-O3 -fPIC -I/a folder -g0 -w -std=c++17 -D_GLIBCXX_USE_CXX11_ABI=0 '
        f'-x c++-header {tmp_path}/torch.h -o {tmp_path}/torch.h.gch'
    )
    assert file == f'-c nms.cpp -DX=a b {last.format(folder=tmp_path)}'


def test_options_are_those_that_torch_was_built_with(setup_env, environment, packages):
    """Asked of a Python in which torch is little more than the header that tells its C++."""
    put(packages / 'torch/utils/cpp_extension.py').write_text(f'def include_paths():\n    return [{str(packages)!r}]\n')
    (packages / 'torch/__init__.py').write_text(
        'from types import SimpleNamespace\n_C = SimpleNamespace(_GLIBCXX_USE_CXX11_ABI=False)\n'
    )
    header = put(packages / 'ATen/ATen.h')
    for text, standard in (('#error C++20 or later compatible', 20), ('C++14 or later', 14), ('', 20)):
        header.write_text(text)
        words = environment.ask(setup_env.COMPILER_OPTIONS).split()
        assert words[:2] == [f'-std=c++{standard}', '-D_GLIBCXX_USE_CXX11_ABI=0']
        assert {'-fPIC', f'-I{packages}'} <= set(words)


@pytest.mark.skipif(not shutil.which('g++'), reason='needs GCC')
def test_compiled_header_is_taken(environment, answers, monkeypatch, tmp_path):
    """By GCC, which reads it in place of the header that it was made from."""
    (tmp_path / 'torch').mkdir()
    (tmp_path / 'torch/types.h').write_text('inline int one() { return 1; }\n')
    answers['include_paths'] = f'-std=c++17 -D_GLIBCXX_USE_CXX11_ABI=0 -O3 -fPIC -I{tmp_path}'
    monkeypatch.setenv('CXX', 'g++')
    program = environment.fast_compiler(tmp_path)
    (tmp_path / 'torch/types.h').unlink()
    (tmp_path / 'nms.cpp').write_text('int two() { return one() + 1; }\n')
    options = ['-std=c++14', '-O3', '-g', '-fPIC', '-Wall']
    subprocess.run([program, *options, '-c', tmp_path / 'nms.cpp', '-o', tmp_path / 'nms.o'], check=True)
    assert (tmp_path / 'nms.o').is_file()


@pytest.mark.parametrize('interruption', [KeyboardInterrupt(), OSError('disk full')], ids=repr)
def test_interrupted_build_leaves_nothing_in_the_cache(setup_env, build, interruption):
    with pytest.raises(type(interruption)):
        build(WHEEL, interruption)
    assert not list(setup_env.WHEELS.iterdir())


def test_wheel_without_operators_is_refused(setup_env, build):
    with pytest.raises(setup_env.SetupError, match='without its compiled operators'):
        build('mmcv-2.1.0-py2.py3-none-any.whl')
    assert not list(setup_env.WHEELS.iterdir())


# --------------------------------------------------------------------------------------------- is there nothing to do?


@pytest.fixture
def finished(environment, packages) -> Path:
    """The folder of packages of an environment that was finished."""
    assert not environment.is_ready()
    environment.stamp.write_text('\n'.join(environment.contents()))
    assert environment.is_ready()
    return packages


def test_package_of_ones_own_does_no_harm(environment, finished):
    shutil.copytree(finished / 'thing-1.0.dist-info', finished / 'more-2.0.dist-info')
    assert environment.is_ready()


@pytest.mark.parametrize(
    'change',
    [
        pytest.param(lambda info: info.rename(info.with_name('thing-1.1.dist-info')), id='other version'),
        pytest.param(lambda info: shutil.rmtree(info), id='lost package'),
        pytest.param(lambda info: (info / 'RECORD').unlink(), id='half installed'),
    ],
)
def test_environment_that_was_changed_is_put_right(environment, finished, change):
    change(finished / 'thing-1.0.dist-info')
    assert not environment.is_ready()
    assert environment.is_usable()


@pytest.mark.parametrize(
    'name',
    [
        'tools/setup_env.py',
        'setup.py',
        'pyproject.toml',
        'requirements/openmmlab.txt',
        'requirements/common/tools.txt',
    ],
)
def test_changed_set_up_is_done_anew(environment, finished, checkout, name):
    with (checkout / name).open('a') as file:
        file.write('\n')
    assert not environment.is_ready()
    assert environment.is_usable()


@pytest.mark.parametrize('lost', ['bin/python', 'bin/pip', 'pyvenv.cfg', ''])
def test_environment_without_python_or_pip_is_not_built_upon(environment, finished, lost):
    if lost:
        (environment.folder / lost).unlink()
    else:
        shutil.rmtree(environment.folder)
    assert not environment.is_ready()
    assert not environment.is_usable()


def test_environment_that_was_cleared_in_part_is_not_built_upon(setup_env, environment, finished, monkeypatch):
    """Its Python would install into the one that it was made with."""

    def clear(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_env, 'run', clear)
    monkeypatch.setattr(setup_env.shutil, 'disk_usage', lambda path: SimpleNamespace(free=1e12))
    assert environment.is_usable()
    with pytest.raises(KeyboardInterrupt):
        environment.make()
    assert not environment.is_usable()


def test_environment_that_was_moved_is_not_built_upon(setup_env, finished, checkout):
    moved = setup_env.Environment(checkout.rename(checkout.with_name('moved')), 'openmmlab')
    assert moved.python.exists()
    assert not moved.is_ready()
    assert not moved.is_usable()


def test_environment_of_an_unsupported_python_is_not_built_upon(setup_env, environment, finished):
    setup_env.PYTHONS = ('3.8', '3.9')
    assert not environment.is_usable()


@pytest.mark.parametrize(
    ('usable', 'problems', 'done'),
    [
        (True, [None], ['install']),
        (False, [None], ['make', 'install']),
        (True, ['no mmcv._ext', None], ['install', 'make', 'install']),
    ],
    ids=['usable', 'unusable', 'broken inside'],
)
def test_environment_is_kept_where_it_works_and_made_anew_where_not(
    setup_env, environment, monkeypatch, usable, problems, done
):
    steps = []

    def install():
        steps.append('install')
        problem = problems.pop(0)
        if problem:
            raise setup_env.BrokenEnvironment(problem)

    monkeypatch.setattr(environment, 'is_usable', lambda: usable)
    monkeypatch.setattr(environment, 'make', lambda: steps.append('make'))
    monkeypatch.setattr(environment, 'install', install)
    setup_env.main(environment)
    assert steps == done
    problems[:] = ['no cv2', 'no cv2']
    with pytest.raises(setup_env.BrokenEnvironment, match='no cv2'):
        setup_env.main(environment)


def test_unreachable_index_does_not_cost_the_environment(setup_env, environment, finished, monkeypatch):
    def install():
        raise setup_env.SetupError('pip install failed')

    environment.stamp.unlink()
    monkeypatch.setattr(environment, 'install', install)
    monkeypatch.setattr(environment, 'make', lambda: pytest.fail('the environment was wiped'))
    with pytest.raises(setup_env.SetupError, match='pip install failed'):
        setup_env.main(environment)


def test_interrupted_repair_is_not_trusted(environment, finished, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, 'check_compiler', lambda: None)
    monkeypatch.setattr(environment, 'pip', interrupt)
    with pytest.raises(KeyboardInterrupt):
        environment.install()
    assert not environment.is_ready()


# ----------------------------------------------------------------------------------------------------------- preflight


def test_program_parses_on_old_pythons():
    ast.parse(PROGRAM.read_text(), feature_version=(3, 7))


@pytest.mark.parametrize(
    ('version', 'supported'), [((3, 9), False), ((3, 10), True), ((3, 12), True), ((3, 13), False)]
)
def test_unsupported_python_is_refused(setup_env, environment, monkeypatch, version, supported):
    monkeypatch.setattr(setup_env, 'sys', SimpleNamespace(version_info=(*version, 4), executable='/bin/py'))
    commands = []
    monkeypatch.setattr(setup_env, 'run', lambda failure, *command: commands.append(command))
    if supported:
        environment.make()
        assert commands == [('/bin/py', '-m', 'venv', '--clear', environment.folder)]
    else:
        text = rf'Python {version[0]}\.{version[1]} \(/bin/py\) is not supported, 3\.10 to 3\.12 are'
        with pytest.raises(setup_env.SetupError, match=text):
            environment.make()
        assert not commands


def test_python_that_cannot_make_environments_is_refused(setup_env, environment, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(setup_env.SetupError, match=r'has no module ensurepip: .*apt-get install python3\.\d+-venv'):
        environment.make()


def test_full_disk_is_refused(setup_env, environment, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=int(7.9e9)))
    with pytest.raises(setup_env.SetupError, match=rf'{environment.root} has 7\.9 GB of free disk, .* needs 8'):
        environment.make()


def test_machine_that_cannot_build_is_refused(setup_env, environment, answers, compiler, monkeypatch):
    environment.check_compiler()
    Path(answers['print(sysconfig.get_paths'], 'Python.h').unlink()
    with pytest.raises(setup_env.SetupError, match=r'no .*/Python\.h, .*apt-get install python3\.11-dev'):
        environment.check_compiler()
    compiler.unlink()
    with pytest.raises(setup_env.SetupError, match=r'no C\+\+ compiler \(c\+\+\).*apt-get install g\+\+'):
        environment.check_compiler()
    monkeypatch.setenv('CXX', 'clang++-19')
    with pytest.raises(setup_env.SetupError, match=r'no C\+\+ compiler \(clang\+\+-19\)'):
        environment.check_compiler()


@pytest.mark.parametrize('key', [KEY, KEY.replace('2.13.0', '2.13.0+cu128')], ids=['cpu', 'cuda'])
def test_cached_wheel_needs_no_compiler(setup_env, environment, packages, calls, answers, compiler, key):
    compiler.unlink()
    with pytest.raises(setup_env.SetupError, match='compiler'):
        environment.install()
    assert not calls, 'something was downloaded before the compiler was missed'
    # Which of its builds torch will be is not known before it is there.
    put(setup_env.WHEELS / key / WHEEL)
    answers['get_platform'] = key.split('2.13.0')[1]
    environment.install()
    assert len(calls) == 3


# ---------------------------------------------------------------------------------------------------- failing commands


@pytest.mark.parametrize(
    ('output', 'words'),
    [
        ([], 'no output'),
        (['killed', ''], 'killed'),
        (['ERROR: no space left', '[notice] there is a new pip'], 'ERROR: no space left'),
        (['ERROR: Cannot install a and b', 'ERROR: ResolutionImpossible: see'], 'ERROR: Cannot install a and b'),
        (
            [
                "WARNING: Retrying after connection broken by 'NewConnectionError'",
                'ERROR: No matching distribution found for torch==2.13.0',
            ],
            'ERROR: No matching distribution found for torch==2.13.0 (the package index could not be reached)',
        ),
        (
            ['nms.cpp:1:10: fatal error: x.h: No such file', 'RuntimeError: Error compiling', 'ERROR: Failed to build'],
            'nms.cpp:1:10: fatal error: x.h: No such file',
        ),
        (
            ['Traceback', '  OSError: CUDA_HOME environment variable is not set.', 'ERROR: Failed'],
            'OSError: CUDA_HOME environment variable is not set.',
        ),
    ],
)
def test_last_words_tell_why(setup_env, output, words):
    assert setup_env.last_words(output) == words


@pytest.fixture
def fake_python(environment) -> Callable[[str], None]:
    """Makes the environment's Python a program that ignores its arguments and runs the given code."""

    def write(code: str) -> None:
        environment.python.parent.mkdir(parents=True, exist_ok=True)
        environment.python.write_text(f'#!{sys.executable}\n{code}\n')
        environment.python.chmod(0o755)

    return write


def test_failed_pip_is_one_line_and_a_log(setup_env, environment, fake_python):
    fake_python('import sys; print("Collecting torch", flush=True); sys.exit("ERROR: no such torch")')
    with pytest.raises(setup_env.SetupError) as error:
        environment.pip('install', 'torch==2.13.0')
    assert str(error.value) == f'pip install failed: ERROR: no such torch (log: {environment.log})'
    command, *output = environment.log.read_text().splitlines()
    assert command == f'$ {environment.python} -m pip install torch==2.13.0'
    assert output == ['Collecting torch', 'ERROR: no such torch']


@pytest.mark.parametrize(('seconds', 'said'), [(0, 'setup: compiled 37 of 101 files\n'), (3600, '')])
def test_build_says_from_time_to_time_how_far_it_is(setup_env, environment, fake_python, capsys, seconds, said):
    setup_env.SECONDS_BETWEEN_REPORTS = seconds
    fake_python('print("Collecting mmcv", "  [37/101] c++ -MMD -MF nms.o.d", "[1, 2]", sep="\\n")')
    environment.pip('wheel', 'mmcv')
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    'number',
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
    ids=lambda number: number.name,
)
def test_interrupted_build_does_not_go_on(environment, fake_python, packages, checkout, tmp_path, number):
    """The program is stopped while pip, and a compiler that pip started, are at work."""
    started = tmp_path / 'started'
    environment.python.unlink()
    fake_python(
        'import subprocess, sys\n'
        'if "pip" not in sys.argv:\n'
        f'    sys.exit(print({str(tmp_path)!r}))\n'
        'compiler = subprocess.Popen(["sleep", "60"])\n'
        f'open({str(started)!r}, "w").write(str(compiler.pid))\n'
        'compiler.wait()'
    )
    put(tmp_path / 'Python.h')
    program = subprocess.Popen(
        [sys.executable, checkout / 'tools/setup_env.py'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'XDG_CACHE_HOME': str(tmp_path), 'CXX': sys.executable},
        # A shell has jobs in the background ignore an interrupt, and what they start inherits that.
        preexec_fn=lambda: [signal.signal(default, signal.SIG_DFL) for default in (number, signal.SIGINT)],
    )
    deadline = time.monotonic() + 60
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    program.send_signal(number)
    assert program.communicate(timeout=60)[1] == 'setup: interrupted; run it again to go on from here\n'
    assert program.returncode == 1
    # The compiler is killed, which a busy system may take a moment to carry out.
    while runs(int(started.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(int(started.read_text()))


def runs(process: int) -> bool:
    """Whether a process is there and is not just waiting for its parent to ask how it ended."""
    try:
        return Path(f'/proc/{process}/stat').read_text().split()[2] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_failure_is_one_line_and_no_traceback(checkout):
    (checkout / '.venv').write_text('not a folder')
    done = subprocess.run(
        [sys.executable, checkout / 'tools' / 'setup_env.py'], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f'setup: creating {checkout / ".venv"} failed: ')
