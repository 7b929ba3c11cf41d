"""The set-up program behind `make setup`, without downloading or compiling anything."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / 'tools' / 'setup_env.py'
FACTS = {
    'tag': 'cpython-311',
    'platform': 'linux-x86_64',
    'version': '3.11',
    'torch': True,
    'cuda': None,
    'gpu': False,
    'cuda_home': None,
}
KEY = 'mmcv2.1.0-torch2.13.0-cpython-311-linux-x86_64'


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location('setup_env', PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the files that decide what the environment holds."""
    root = tmp_path / 'checkout'
    (root / 'tools').mkdir(parents=True)
    for name in ('tools/setup_env.py', 'setup.py', 'pyproject.toml'):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture
def setup_env(checkout: Path, tmp_path: Path) -> ModuleType:
    """The program, at work in that folder, with a cache of its own and a folder for the log."""
    module = load()
    module.ROOT = checkout
    module.VENV = checkout / '.venv'
    module.PYTHON = module.VENV / 'bin' / 'python'
    module.STAMP = module.VENV / 'repvit_mm.stamp'
    module.LOG = tmp_path / 'setup.log'
    module.WHEELS = tmp_path / 'cache' / 'repvit_mm' / 'wheels'
    return module


@pytest.fixture
def environment(setup_env: ModuleType) -> Path:
    """A real environment in `.venv`, without pip, with one small package in it.

    Returns:
        The folder of its packages.
    """
    venv.create(setup_env.VENV, symlinks=True)
    packages = next(setup_env.VENV.glob('lib/python*/site-packages'))
    info = packages / 'thing-1.0.dist-info'
    info.mkdir()
    (packages / 'thing.py').touch()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n')
    (info / 'RECORD').write_text('thing.py,,\n__pycache__/thing.pyc,,\nthing-1.0.dist-info/METADATA,,\n')
    (setup_env.VENV / 'bin' / 'pip').write_text(f'#!{setup_env.PYTHON}\n')
    return packages


@pytest.fixture
def facts(tmp_path: Path) -> dict:
    """A machine on which mmcv can be built."""
    (tmp_path / 'include').mkdir()
    (tmp_path / 'include' / 'Python.h').touch()
    return {**FACTS, 'include': str(tmp_path / 'include')}


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only program on the PATH: a `c++`."""
    program = tmp_path / 'bin' / 'c++'
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv('PATH', str(program.parent))
    monkeypatch.delenv('CXX', raising=False)
    return program


def put_wheel(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / 'mmcv-2.1.0-cp311-cp311-linux_x86_64.whl'
    with zipfile.ZipFile(wheel, 'w') as archive:
        for name in names:
            archive.writestr(name, '')
    return wheel


# ----------------------------------------------------------------------------------------------------------- the wheel


@pytest.mark.parametrize(
    ('cuda', 'gpu', 'key'),
    [
        (None, False, KEY),
        ('12.8', True, KEY.replace('2.13.0', '2.13.0+cu128')),
        ('12.8', False, KEY.replace('2.13.0', '2.13.0+cu128.nogpu')),
    ],
)
def test_wheel_key_names_all_that_the_wheel_depends_on(setup_env, cuda, gpu, key):
    facts = {**FACTS, 'cuda': cuda, 'gpu': gpu}
    assert setup_env.wheel_key(facts, setup_env.cuda_suffix(facts)) == key


def test_facts_are_those_of_the_environments_python(setup_env):
    setup_env.PYTHON = Path(sys.executable)
    facts = setup_env.environment_facts()
    assert facts['tag'] == sys.implementation.cache_tag
    assert facts['platform'] == sysconfig.get_platform()
    assert facts['version'] == f'{sys.version_info.major}.{sys.version_info.minor}'
    assert facts['include'] == sysconfig.get_paths()['include']
    assert facts['torch'] is True
    assert (facts['cuda'], facts['gpu']) == (torch.version.cuda, torch.cuda.is_available())


def test_facts_of_a_broken_torch_are_refused(setup_env, environment):
    (environment / 'torch.py').write_text('raise ImportError("libtorch.so is missing")')
    (environment / 'thing-1.0.dist-info').rename(environment / 'torch-1.0.dist-info')
    (environment / 'torch-1.0.dist-info' / 'METADATA').write_text('Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n')
    with pytest.raises(setup_env.SetupError, match=r'libtorch\.so is missing'):
        setup_env.environment_facts()


def test_cached_wheel_is_used_without_a_build(setup_env, facts, monkeypatch):
    wheel = put_wheel(setup_env.WHEELS / KEY, 'mmcv/_ext.so')
    monkeypatch.setattr(setup_env, 'pip', lambda *args, **kwargs: pytest.fail('there is nothing to build'))
    assert setup_env.mmcv_wheel(facts) == wheel


def test_wheel_for_another_torch_is_not_used(setup_env, facts, compiler, monkeypatch):
    put_wheel(setup_env.WHEELS / KEY.replace('2.13.0', '2.12.0'), 'mmcv/_ext.so')

    def build(folder):
        put_wheel(folder, 'mmcv/_ext.so')

    monkeypatch.setattr(setup_env, 'build_wheel', build)
    assert setup_env.mmcv_wheel(facts).parent.name == KEY


def fake_pip(setup_env: ModuleType, *names: str, error: Exception | None = None) -> Callable[..., None]:
    """A `pip wheel` that writes a wheel with the given files and may then fail."""

    def pip(*arguments, environment, watch):
        assert arguments[0] == 'wheel'
        assert environment['MMCV_WITH_OPS'] == '1'
        target = Path(arguments[arguments.index('--wheel-dir') + 1])
        # The move into the cache is atomic within one file system only.
        assert target.parent == setup_env.WHEELS
        put_wheel(target, *names)
        assert not list(setup_env.WHEELS.glob('mmcv*/*.whl'))
        if error:
            raise error

    return pip


def test_built_wheel_lands_in_the_cache(setup_env, facts, compiler, monkeypatch):
    monkeypatch.setattr(setup_env, 'pip', fake_pip(setup_env, 'mmcv/__init__.py', 'mmcv/_ext.cpython-311.so'))
    wheel = setup_env.mmcv_wheel(facts)
    assert wheel.parent == setup_env.WHEELS / KEY
    assert list(setup_env.WHEELS.iterdir()) == [wheel.parent]


@pytest.mark.parametrize('interruption', [KeyboardInterrupt(), OSError('disk full')], ids=repr)
def test_interrupted_build_leaves_nothing_in_the_cache(setup_env, facts, compiler, monkeypatch, interruption):
    monkeypatch.setattr(setup_env, 'pip', fake_pip(setup_env, 'mmcv/_ext.so', error=interruption))
    with pytest.raises(type(interruption)):
        setup_env.mmcv_wheel(facts)
    assert not list(setup_env.WHEELS.iterdir())


def test_wheel_without_operators_is_refused(setup_env, facts, compiler, monkeypatch):
    monkeypatch.setattr(setup_env, 'pip', fake_pip(setup_env, 'mmcv/__init__.py'))
    with pytest.raises(setup_env.SetupError, match='without its compiled operators'):
        setup_env.mmcv_wheel(facts)
    assert not list(setup_env.WHEELS.iterdir())


def test_build_says_how_far_it_is(setup_env, capsys):
    watch = setup_env.progress_reporter(seconds=0)
    for line in ('Collecting mmcv==2.1.0\n', '  [37/101] c++ -MMD -MF nms.o.d\n', '[1, 2]\n'):
        watch(line)
    assert re.fullmatch(r'setup: building mmcv: 37 of 101 files after \d\.\d minutes\n', capsys.readouterr().out)


def test_build_does_not_say_so_with_every_file(setup_env, capsys):
    watch = setup_env.progress_reporter(seconds=3600)
    watch('[1/101] c++\n')
    assert not capsys.readouterr().out


# --------------------------------------------------------------------------------------------- is there nothing to do?


def test_finished_environment_is_taken_as_it_is(setup_env, environment):
    assert not setup_env.is_ready()
    setup_env.write_stamp()
    assert setup_env.is_ready()
    assert setup_env.STAMP.read_text().split()[1:] == ['thing==1.0']


def add_package(packages: Path) -> None:
    shutil.copytree(packages / 'thing-1.0.dist-info', packages / 'more-2.0.dist-info')
    (packages / 'more-2.0.dist-info' / 'METADATA').write_text('Metadata-Version: 2.1\nName: more\nVersion: 2.0\n')


def test_package_of_ones_own_does_no_harm(setup_env, environment):
    setup_env.write_stamp()
    add_package(environment)
    assert setup_env.installed() == ['more==2.0', 'thing==1.0']
    assert setup_env.is_ready()


@pytest.mark.parametrize(
    'damage',
    [
        pytest.param(lambda packages: (packages / 'thing.py').unlink(), id='lost file'),
        pytest.param(lambda packages: (packages / 'thing-1.0.dist-info/RECORD').unlink(), id='half installed'),
        pytest.param(lambda packages: (packages.parents[2] / 'bin/python').unlink(), id='no Python'),
    ],
)
def test_broken_environment_is_neither_trusted_nor_built_upon(setup_env, environment, damage):
    setup_env.write_stamp()
    assert setup_env.venv_is_usable()
    damage(environment)
    assert not setup_env.is_ready()
    assert not setup_env.venv_is_usable()


@pytest.mark.parametrize('name', ['tools/setup_env.py', 'setup.py', 'pyproject.toml'])
def test_changed_set_up_is_done_anew(setup_env, environment, checkout, name):
    setup_env.write_stamp()
    with (checkout / name).open('a') as file:
        file.write('\n')
    assert not setup_env.is_ready()
    assert setup_env.venv_is_usable()


def test_other_version_is_put_right(setup_env, environment):
    setup_env.write_stamp()
    metadata = environment / 'thing-1.0.dist-info' / 'METADATA'
    metadata.write_text(metadata.read_text().replace('1.0', '1.1'))
    assert not setup_env.is_ready()
    assert setup_env.venv_is_usable()


def test_environment_that_was_moved_is_not_built_upon(setup_env, environment, checkout):
    setup_env.write_stamp()
    setup_env.ROOT = checkout.rename(checkout.with_name('moved'))
    setup_env.VENV = setup_env.ROOT / '.venv'
    setup_env.PYTHON = setup_env.VENV / 'bin' / 'python'
    setup_env.STAMP = setup_env.VENV / 'repvit_mm.stamp'
    assert setup_env.installed() == ['thing==1.0']
    assert not setup_env.is_ready()
    assert not setup_env.venv_is_usable()


def test_environment_of_an_unsupported_python_is_not_built_upon(setup_env, environment):
    setup_env.OLDEST_PYTHON = setup_env.NEWEST_PYTHON = (3, 9)
    assert not setup_env.venv_is_usable()


def test_no_environment_is_not_built_upon(setup_env):
    assert not setup_env.is_ready()
    assert not setup_env.venv_is_usable()


@pytest.fixture
def steps(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The program's large steps, made to report what they were asked."""
    steps = SimpleNamespace(done=[], usable=True, problems=[])

    def install() -> str | None:
        steps.done.append('install')
        return steps.problems.pop(0)

    monkeypatch.setattr(setup_env, 'venv_is_usable', lambda: steps.usable)
    monkeypatch.setattr(setup_env, 'make_venv', lambda: steps.done.append('make'))
    monkeypatch.setattr(setup_env, 'install', install)
    monkeypatch.setattr(setup_env, 'write_stamp', lambda: steps.done.append('stamp'))
    return steps


@pytest.mark.parametrize(
    ('usable', 'problems', 'done'),
    [
        (True, [None], ['install', 'stamp']),
        (False, [None], ['make', 'install', 'stamp']),
        (True, ['no mmcv._ext', None], ['install', 'make', 'install', 'stamp']),
    ],
    ids=['usable', 'unusable', 'broken inside'],
)
def test_environment_is_kept_where_it_works_and_made_anew_where_not(setup_env, steps, usable, problems, done):
    steps.usable, steps.problems = usable, problems
    setup_env.main()
    assert steps.done == done


@pytest.mark.parametrize(
    ('usable', 'problems'), [(False, ['no cv2']), (True, ['no cv2', 'no cv2'])], ids=['new', 'made anew']
)
def test_new_environment_that_does_not_work_is_an_error(setup_env, steps, usable, problems):
    steps.usable, steps.problems = usable, problems
    with pytest.raises(setup_env.SetupError, match='no cv2'):
        setup_env.main()
    assert 'stamp' not in steps.done


def test_interrupted_repair_is_not_trusted(setup_env, environment, monkeypatch):
    setup_env.write_stamp()

    def refuse(facts):
        raise setup_env.SetupError('too little disk')

    monkeypatch.setattr(setup_env, 'preflight', refuse)
    with pytest.raises(setup_env.SetupError, match='too little disk'):
        setup_env.install()
    assert not setup_env.is_ready()


# ----------------------------------------------------------------------------------------------------------- preflight


def test_program_parses_on_old_pythons():
    ast.parse(PROGRAM.read_text(), feature_version=(3, 7))


@pytest.mark.parametrize(
    ('version', 'supported'), [((3, 9), False), ((3, 10), True), ((3, 12), True), ((3, 13), False)]
)
def test_unsupported_python_is_refused(setup_env, monkeypatch, version, supported):
    text = f'{version[0]}.{version[1]}.4'
    monkeypatch.setattr(
        setup_env, 'sys', SimpleNamespace(version_info=(*version, 4), version=f'{text} (main)', executable='/bin/py')
    )
    if supported:
        setup_env.check_python()
    else:
        with pytest.raises(setup_env.SetupError, match=rf'Python {text} \(/bin/py\) is not supported, 3\.10 to 3\.12 '):
            setup_env.check_python()


@pytest.mark.parametrize('module', ['venv', 'ensurepip'])
def test_python_that_cannot_make_environments_is_refused(setup_env, monkeypatch, module):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == module else find_spec(name))
    with pytest.raises(setup_env.SetupError, match=rf'has no module {module}: .*apt-get install python3\.\d+-venv'):
        setup_env.check_python()


def test_full_disk_is_refused(setup_env, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=int(7.9e9)))
    setup_env.check_disk(tmp_path, 7, 'the environment')
    # A folder that is yet to be made lies on the disk of its parent.
    with pytest.raises(setup_env.SetupError, match=rf'{tmp_path} has 7\.9 GB of free disk, the environment needs 8 GB'):
        setup_env.check_disk(tmp_path / 'not' / 'yet', 8, 'the environment')


def test_machine_that_can_build_is_accepted(setup_env, facts, compiler):
    setup_env.check_compiler(facts)


def test_missing_compiler_is_refused(setup_env, facts, compiler):
    compiler.unlink()
    with pytest.raises(setup_env.SetupError, match=r'no C\+\+ compiler \(c\+\+\).*apt-get install g\+\+'):
        setup_env.check_compiler(facts)


def test_missing_compiler_of_ones_own_is_refused(setup_env, facts, compiler, monkeypatch):
    monkeypatch.setenv('CXX', 'clang++-19')
    with pytest.raises(setup_env.SetupError, match=r'no C\+\+ compiler \(clang\+\+-19\)'):
        setup_env.check_compiler(facts)


def test_missing_headers_are_refused(setup_env, facts, compiler):
    Path(facts['include'], 'Python.h').unlink()
    with pytest.raises(setup_env.SetupError, match=r'include/Python\.h\) are missing.*apt-get install python3\.11-dev'):
        setup_env.check_compiler(facts)


def test_gpu_without_its_compiler_is_refused(setup_env, facts, compiler):
    facts.update(cuda='12.8', gpu=True)
    with pytest.raises(setup_env.SetupError, match=r'no CUDA compiler \(nvcc\).*CUDA toolkit 12\.8'):
        setup_env.check_compiler(facts)
    setup_env.check_compiler({**facts, 'cuda_home': '/usr/local/cuda'})


@pytest.mark.parametrize('key', [KEY, KEY.replace('2.13.0', '2.13.0+cu128')], ids=['cpu', 'cuda'])
def test_cached_wheel_needs_no_compiler(setup_env, facts, compiler, key):
    compiler.unlink()
    # Which of its builds torch will be is not known before it is there.
    facts['torch'] = False
    with pytest.raises(setup_env.SetupError, match='compiler'):
        setup_env.preflight(facts)
    put_wheel(setup_env.WHEELS / key, 'mmcv/_ext.so')
    setup_env.preflight(facts)


@pytest.mark.parametrize(
    ('gigabytes', 'torch_installed', 'wheel_cached', 'refused'),
    [
        (5, False, True, 'the environment'),
        (5, True, True, None),
        (1.5, True, False, 'building mmcv'),
        (5, True, False, None),
    ],
)
def test_disk_is_asked_for_what_is_to_come(
    setup_env, facts, compiler, monkeypatch, gigabytes, torch_installed, wheel_cached, refused
):
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=gigabytes * 1e9))
    facts['torch'] = torch_installed
    if wheel_cached:
        put_wheel(setup_env.WHEELS / KEY, 'mmcv/_ext.so')
    if refused:
        with pytest.raises(setup_env.SetupError, match=f'{refused} needs'):
            setup_env.preflight(facts)
    else:
        setup_env.preflight(facts)


# ---------------------------------------------------------------------------------------------------- failing commands


@pytest.mark.parametrize(
    ('output', 'words'),
    [
        ([], 'no output'),
        (['killed', ''], 'killed'),
        (['ERROR: no space left', '[notice] there is a new pip'], 'ERROR: no space left'),
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
            ['Traceback', 'RuntimeError: CUDA 12.8 mismatches 13.0', 'ERROR: Failed'],
            'RuntimeError: CUDA 12.8 mismatches 13.0',
        ),
    ],
)
def test_last_words_tell_why(setup_env, output, words):
    assert setup_env.last_words(output) == words


@pytest.fixture
def fake_python(setup_env: ModuleType) -> Callable[[str], None]:
    """Makes the environment's Python a program that ignores its arguments and runs the given code."""

    def write(code: str) -> None:
        setup_env.PYTHON.parent.mkdir(parents=True)
        setup_env.PYTHON.write_text(f'#!{sys.executable}\n{code}\n')
        setup_env.PYTHON.chmod(0o755)

    return write


def test_failed_pip_is_one_line_and_a_log(setup_env, fake_python):
    fake_python('import sys; print("Collecting torch"); sys.exit("ERROR: no such torch")')
    with pytest.raises(setup_env.SetupError) as error:
        setup_env.pip('install', 'torch==2.13.0')
    assert str(error.value) == f'pip install failed: ERROR: no such torch (log: {setup_env.LOG})'
    assert setup_env.LOG.read_text() == '$ pip install torch==2.13.0\nCollecting torch\nERROR: no such torch\n'


def test_pip_gets_its_variables_and_is_watched(setup_env, fake_python):
    fake_python('import os; print(os.environ["MAX_JOBS"])')
    lines = []
    setup_env.pip('wheel', environment={'MAX_JOBS': '3'}, watch=lines.append)
    assert lines == ['3\n']


def test_interrupted_pip_does_not_go_on(setup_env, fake_python):
    fake_python(
        'import os, signal, time\n'
        'signal.signal(signal.SIGINT, signal.SIG_DFL)\n'
        'print(os.getpid(), flush=True)\n'
        'time.sleep(60)'
    )
    started = []

    def interrupt(line: str) -> None:
        started.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setup_env.pip('wheel', watch=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_failure_is_one_line_and_no_traceback(checkout):
    (checkout / '.venv').write_text('not a folder')
    done = subprocess.run(
        [sys.executable, checkout / 'tools' / 'setup_env.py'], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f'setup: creating {checkout / ".venv"} failed: ')


# ---------------------------------------------------------------------------------------------------------------- pins


def test_pre_commit_checks_with_the_installed_ruff(setup_env):
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    (revision,) = (repo['rev'] for repo in hooks if 'ruff' in repo['repo'])
    assert f'ruff=={revision.removeprefix("v")}' in setup_env.REQUIREMENTS
