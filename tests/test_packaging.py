"""What `pip install` of this project brings, tried on wheels built from a copy of the checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata as distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import repvit_mm
from repvit_mm._versions import FRAMEWORKS
from repvit_mm.datasets.shapes import write_shapes

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    'setup.py',
    'pyproject.toml',
    'README.md',
    'model-index.yml',
    'configs',
    'tools',
    'repvit_mm',
    'repvit_mm_cli',
)
MIM = 'repvit_mm/.mim/'


def copy_checkout(destination: Path) -> Path:
    """Copy what the build needs, without what earlier builds and runs left."""
    destination.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, destination / name, ignore=shutil.ignore_patterns('.mim', '__pycache__'))
        else:
            shutil.copy2(ROOT / name, destination)
    return destination


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command; its output is the failure's message."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(hook: str, source: Path, destination: Path) -> Path:
    """Build a distribution with one of the backend's hooks, as pip does without build isolation."""
    destination.mkdir(exist_ok=True)
    program = f'import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])'
    run(sys.executable, '-c', program, destination, cwd=source)
    (distribution,) = destination.iterdir()
    return distribution


def files_of(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def resources(root: Path) -> dict[str, bytes]:
    """The files that belong under `.mim`, by their path there."""
    paths = [root / 'model-index.yml', *(root / 'configs').rglob('*'), *(root / 'tools').rglob('*')]
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in paths
        if path.is_file() and '__pycache__' not in path.parts and path.name != 'setup_env.py'
    }


@pytest.fixture(scope='module')
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp('packaging') / 'checkout')


@pytest.fixture(scope='module')
def wheel(checkout: Path) -> Path:
    return build('build_wheel', checkout, checkout.parent / 'wheel')


@pytest.fixture(scope='module')
def metadata(wheel: Path):
    (text,) = (content for name, content in files_of(wheel).items() if name.endswith('.dist-info/METADATA'))
    return Parser().parsestr(text.decode())


def test_wheel_carries_package_configs_tools_and_index(checkout, wheel):
    files = files_of(wheel)
    carried = {name.removeprefix(MIM): content for name, content in files.items() if name.startswith(MIM)}
    assert carried == resources(checkout)
    assert {'model-index.yml', 'tools/train.py', 'tools/test.py'} <= carried.keys()
    assert any(name.startswith('configs/det/') for name in carried)
    packages = (checkout / 'repvit_mm', checkout / 'repvit_mm_cli')
    modules = {str(path.relative_to(checkout)) for package in packages for path in package.rglob('*.py')}
    assert modules == {name for name in files if name.endswith('.py') and not name.startswith(MIM)}


def test_shell_launchers_stay_executable(wheel):
    with zipfile.ZipFile(wheel) as archive:
        modes = {
            info.filename: info.external_attr >> 16 for info in archive.infolist() if info.filename.endswith('.sh')
        }
    assert modes
    assert all(mode & 0o111 for mode in modes.values()), modes


@pytest.mark.slow
def test_command_of_an_installed_wheel_finds_its_tools_from_any_folder(installed, tmp_path):
    """And answers without importing torch."""
    script = installed / 'bin' / 'repvit-mm'
    (tmp_path / 'torch.py').write_text("raise OSError('broken')")
    variables = {'PYTHONPATH': f'{installed}:{tmp_path}'}
    assert run(script, '--version', cwd=tmp_path, **variables) == f'repvit-mm {repvit_mm.__version__}\n'
    told = run(script, '--help', cwd=tmp_path, **variables)
    names = {path.stem.replace('_', '-') for path in (installed / MIM / 'tools').glob('[!_]*.py')}
    assert {'train', 'test', 'export', 'predict', 'check-data', 'doctor', 'benchmark'} <= names
    assert all(f'\n  {name} ' in told for name in names)
    output = run(script, 'make-shapes', 'shapes', '--train', '1', '--val', '1', cwd=tmp_path, PYTHONPATH=str(installed))
    assert output.startswith('shapes: 1 training and 1 validation images') or 'shapes: 1 training' in output
    assert (tmp_path / 'shapes/shapes.json').is_file()


def test_wheel_leaves_no_copies_in_the_source_tree(checkout, wheel):
    assert not (checkout / MIM).exists()


def test_config_that_was_deleted_is_not_in_the_next_wheel(checkout, wheel, tmp_path):
    source = shutil.copytree(checkout, tmp_path / 'checkout')
    assert (source / 'build').is_dir(), 'there is no earlier build whose left-overs could be picked up'
    deleted = next((source / 'configs' / 'det').glob('*.py'))
    deleted.unlink()
    files = files_of(build('build_wheel', source, tmp_path / 'wheel'))
    assert f'{MIM}configs/det/{deleted.name}' not in files
    assert f'{MIM}model-index.yml' in files


def test_wheel_from_the_source_archive_is_the_same(checkout, wheel, tmp_path):
    archive = build('build_sdist', checkout, tmp_path / 'sdist')
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter='data')
    source = tmp_path / archive.name.removesuffix('.tar.gz')
    again = files_of(build('build_wheel', source, tmp_path / 'wheel'))
    assert again == files_of(wheel)


def test_editable_install_links_to_the_sources(tmp_path):
    source = copy_checkout(tmp_path / 'checkout')
    # Twice: the links of an earlier install are in the way of nothing.
    for name in ('first', 'second'):
        build('build_editable', source, tmp_path / name)
    assert resources(source / MIM) == resources(source)
    assert {path.name for path in (source / MIM).iterdir() if path.is_symlink()} == {
        'configs',
        'tools',
        'model-index.yml',
    }


def test_version_is_the_packages(metadata):
    assert metadata['Name'] == 'repvit_mm'
    assert metadata['Version'] == repvit_mm.__version__


def test_nothing_is_installed_beside_the_package(metadata):
    """A plain install must not replace the torch or the mm libraries that are there; only extras name any.

    safetensors needs nothing itself.
    """
    requirements = [Requirement(text) for text in metadata.get_all('Requires-Dist')]
    assert requirements
    assert [str(r) for r in requirements if r.marker is None or r.marker.evaluate({'extra': ''})] == ['safetensors']


@pytest.mark.slow
def test_plain_install_touches_nothing_that_is_there(checkout, tmp_path):
    """pip lists the same distributions in the same versions before and after, and this one beside them."""
    environment = tmp_path / 'environment'
    run(sys.executable, '-m', 'venv', '--without-pip', environment, cwd=tmp_path)
    (folder,) = environment.glob('lib/python*/site-packages')
    # All that is installed here, but for the checkout that it is tried from.
    there = tmp_path / 'there'
    there.mkdir()
    for path in Path(sysconfig.get_path('purelib')).iterdir():
        if 'repvit_mm' not in path.name:
            (there / path.name).symlink_to(path)
    (folder / 'there.pth').write_text(f'{there}\n')
    pip = (environment / 'bin/python', '-m', 'pip', '--disable-pip-version-check')
    before = run(*pip, 'list', '--format', 'freeze', cwd=tmp_path).splitlines()
    # Without an index nothing else can come along; the build needs setuptools, which is there.
    run(*pip, 'install', '--no-index', '--no-build-isolation', checkout, cwd=tmp_path)
    after = run(*pip, 'list', '--format', 'freeze', cwd=tmp_path).splitlines()
    assert len(before) > 20 and sorted([*before, f'repvit_mm=={repvit_mm.__version__}']) == sorted(after)
    assert 'RepViT' in run(
        environment / 'bin/python', '-c', 'from repvit_mm import RepViT; print(RepViT)', cwd=tmp_path
    )


def wanted_by(metadata, extra: str) -> dict[str, Requirement]:
    """What an extra asks for, and what the extras do that it names."""
    found = {}
    for requirement in map(Requirement, metadata.get_all('Requires-Dist')):
        if requirement.marker and requirement.marker.evaluate({'extra': extra}):
            found[requirement.name] = requirement
    for other in found.pop('repvit_mm', Requirement('repvit_mm')).extras:
        found |= wanted_by(metadata, other)
    return found


def test_no_extra_brings_a_torch_or_an_mmcv(metadata):
    """Nor does what it brings, as far as that is installed here: pip would replace or rebuild what is there."""
    extras = metadata.get_all('Provides-Extra')
    assert {'openmmlab', 'onedl', 'runtime'} <= set(extras)
    pending = {name for extra in extras for name in wanted_by(metadata, extra)}
    brought = set()
    while pending:
        name = pending.pop()
        brought.add(name)
        try:
            needs = map(Requirement, distributions.requires(name) or ())
        except distributions.PackageNotFoundError:
            continue
        pending |= {r.name for r in needs if r.marker is None or r.marker.evaluate({'extra': ''})} - brought
    assert len(brought) > 10
    assert brought.isdisjoint({'torchvision', *FRAMEWORKS['torch'][0], *FRAMEWORKS['mmcv'][0]})


@pytest.mark.parametrize(('extra', 'module'), [('det', 'mmdet'), ('seg', 'mmseg')])
def test_extras_want_the_versions_that_the_package_accepts(metadata, extra, module):
    wanted = wanted_by(metadata, extra)
    for framework in ('mmengine', module):
        (name, *_), first, beyond = FRAMEWORKS[framework]
        assert wanted[name].specifier == SpecifierSet(f'>={first},<{beyond}')


def test_openmmlab_is_both_tasks(metadata):
    both, det, seg = (
        {name: requirement.specifier for name, requirement in wanted_by(metadata, extra).items()}
        for extra in ('openmmlab', 'det', 'seg')
    )
    assert both == det | seg


def test_forks_are_wanted_from_the_versions_on_that_were_run(metadata):
    pins = dict(re.findall(r'^(onedl-\w+)==(\S+)', (ROOT / 'requirements/onedl.txt').read_text(), re.M))
    wanted = wanted_by(metadata, 'onedl')
    for framework in ('mmengine', 'mmdet', 'mmseg'):
        names, _, beyond = FRAMEWORKS[framework]
        (name,) = (name for name in names if name in pins)
        assert wanted.pop(name).specifier == SpecifierSet(f'>={pins[name]},<{beyond}')
    assert wanted == {}


PLAIN = 'plain install'
EDITABLE = 'editable install'


@pytest.fixture(scope='module')
def installed(wheel: Path) -> Path:
    """A folder into which the wheel was installed, and nothing else."""
    folder = wheel.parent.parent / 'installed'
    run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--target', folder, wheel, cwd=folder.parent)
    return folder


@pytest.fixture(params=[PLAIN, EDITABLE])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path):
    """Runs a program in a folder of its own, with the package installed in one way or the other."""
    if request.param == PLAIN:
        home = request.getfixturevalue('installed')
        variables = {'PYTHONPATH': str(home)}
    else:
        home = ROOT
        variables = {'PYTHONPATH': ''}

    def run_program(program: str) -> str:
        output = run(sys.executable, '-c', program + '\nprint(repvit_mm.__file__)', cwd=tmp_path, **variables)
        # Else the checkout would be tried in place of the install, or the other way round.
        assert output.splitlines()[-1] == str(home / 'repvit_mm' / '__init__.py')
        return output

    return run_program


@pytest.mark.slow
def test_custom_imports_find_the_backbone_from_any_folder(elsewhere, tmp_path):
    (tmp_path / 'mine.py').write_text(
        "custom_imports = dict(imports=['repvit_mm'])\nmodel = dict(type='RepViT', arch='m0_6')\n"
    )
    output = elsewhere(
        'import sys\n'
        'from mmengine.config import Config\n'
        'from mmengine.registry import MODELS\n'
        'assert "repvit_mm" not in sys.modules\n'
        'model = MODELS.build(Config.fromfile("mine.py").model)\n'
        'import repvit_mm\n'
        'assert type(model) is repvit_mm.RepViT\n'
        'print("channels", *model.out_channels)'
    )
    assert 'channels 40 80 160 320' in output


@pytest.mark.slow
@pytest.mark.needs_ops
def test_configs_can_be_built_upon_from_any_folder(elsewhere, tmp_path):
    """`_base_ = 'repvit_mm::...'` gives a Runner the very config that the file gives.

    MMEngine marks typed dictionaries of a package's base with that package's scope unless they name their own, and in
    the scope `repvit_mm` nothing is registered.
    """
    paths = sorted((ROOT / 'configs').glob('[ds]e[tg]/*.py'))
    paths = [path for path in paths if not path.stem.startswith('yolov5') or find_spec('mmyolo')]
    assert paths
    for path in paths:
        (tmp_path / path.name).write_text(f"_base_ = 'repvit_mm::{path.relative_to(ROOT / 'configs')}'\n")
    output = elsewhere(
        'import functools, inspect\n'
        'from pathlib import Path\n'
        'import repvit_mm\n'
        'from mmengine.config import Config, utils\n'
        'from mmengine.runner import Runner\n'
        '# For each of its bases a config reads all of a model index, a hundred files of MMDetection.\n'
        'utils.load = functools.cache(utils.load)\n'
        f'for path in map(Path, {[*map(str, paths)]}):\n'
        '    mine, theirs = (Config.fromfile(file).to_dict() for file in (path.name, path))\n'
        '    for key in theirs.keys() & inspect.signature(Runner).parameters:\n'
        '        assert mine[key] == theirs[key], (path.name, key, mine[key])\n'
        '    print("same")'
    )
    assert output.split().count('same') == len(paths)


@pytest.mark.slow
@pytest.mark.needs_ops
def test_mim_trains_and_tests_by_the_name_of_the_package(installed, tmp_path):
    """mim looks for a config of this name in the package, and hands it to the launcher that lies under ``.mim``."""
    package = installed / 'repvit_mm'
    (config,) = package.rglob('fpn_repvit_m0_6_shapes.py')
    assert not (package / 'tools').exists(), 'mim would look for launchers there'
    tools = package / '.mim' / 'tools'
    variables = {'PYTHONPATH': str(installed)}
    for tool in ('train', 'test'):  # else mim would add the option
        assert '--gpus' not in run(sys.executable, tools / f'{tool}.py', '--help', cwd=tmp_path, **variables)
    write_shapes(tmp_path / 'data/shapes', train=2, val=1, size=64)
    loaders = [f'{split}_dataloader' for split in ('train', 'val', 'test')]
    workers = [f'{loader}.{key}' for loader in loaders for key in ('num_workers=0', 'persistent_workers=False')]
    options = ('--launcher', 'none', '--work-dir', 'mim', '--cfg-options', 'train_dataloader.batch_size=2', *workers)
    short = ('train_cfg.max_iters=1', 'train_cfg.val_interval=1', 'default_hooks.checkpoint.interval=1')
    run(sys.executable, tools / 'train.py', config, *options, *short, cwd=tmp_path, **variables)
    tested = run(sys.executable, tools / 'test.py', config, 'mim/iter_1.pth', *options, cwd=tmp_path, **variables)
    assert re.search(r'mIoU: +\d', tested)
