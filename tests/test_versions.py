"""Frameworks of another era are refused, by what is imported already or else by what is installed."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import slow_but

import repvit_mm
from repvit_mm._versions import FRAMEWORKS, _release, check_frameworks, missing_frameworks

REQUIREMENTS = Path(__file__).parents[1] / 'requirements'
GOOD = {'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0', 'mmsegmentation': '1.2.2'}


@pytest.fixture
def install(monkeypatch):
    """Pretend that these distributions, and no others, are installed, and that no framework is imported."""

    def install(distributions: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in distributions:
                raise metadata.PackageNotFoundError(name)
            return distributions[name]

        monkeypatch.setattr(metadata, 'version', version)
        for module in FRAMEWORKS:
            monkeypatch.delitem(sys.modules, module, raising=False)

    return install


@pytest.mark.parametrize(
    ('version', 'release'),
    [
        ('2.1.0', (2, 1, 0)),
        ('2.1.0rc4', (2, 1, 0)),
        ('2.1.0+cu118', (2, 1, 0)),
        ('0.10.7.dev3', (0, 10, 7)),
        ('1.7', (1, 7, 0)),
        ('2', (2, 0, 0)),
    ],
)
def test_release_has_three_numbers(version, release):
    assert _release(version) == release


@pytest.mark.parametrize(
    'distributions',
    [
        GOOD,
        {'mmengine': '0.7.0', 'torch': '2.0.0'},
        {'mmengine-lite': '0.10.7', 'mmcv-lite': '2.1.0'},
        {
            'onedl-mmengine': '0.10.12',
            'onedl-mmcv': '2.3.6',
            'onedl-mmdetection': '3.5.1',
            'onedl-mmsegmentation': '1.4.2',
        },
        {**GOOD, 'mmcv': '2.1'},
        {**GOOD, 'mmcv': '2.1.0rc1'},
    ],
    ids=str,
)
def test_frameworks_of_the_era_are_accepted(install, distributions):
    install(distributions)
    check_frameworks()


WRONG = [
    ({'mmcv': '1.7.2'}, 'mmcv>=2.0.0,<3.0.0', 'mmcv 1.7.2'),
    ({'mmcv': '3.0'}, 'mmcv>=2.0.0,<3.0.0', 'mmcv 3.0'),
    ({'mmdet': '2.28.2'}, 'mmdet>=3.0.0,<4.0.0', 'mmdet 2.28.2'),
    ({'mmsegmentation': '0.30.0'}, 'mmseg>=1.0.0,<2.0.0', 'mmseg 0.30.0'),
    ({'torch': '1.13.1+cu117'}, 'torch>=2.0.0,<3.0.0', 'torch 1.13.1+cu117'),
    ({'mmengine': '0.6.0'}, 'mmengine>=0.7.0,<1.0.0', 'mmengine 0.6.0'),
]


@pytest.mark.parametrize(('wrong', 'wanted', 'found'), WRONG, ids=str)
def test_framework_of_another_era_is_refused(install, wrong, wanted, found):
    install({**GOOD, **wrong})
    with pytest.raises(ImportError) as error:
        check_frameworks()
    assert wanted in str(error.value) and found in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('module', FRAMEWORKS)
def test_first_version_is_one_that_a_stack_installs(module):
    """Or a later release of the same: else nobody would have run it."""
    names, first, _ = FRAMEWORKS[module]
    pins = [line.partition('#')[0].strip() for path in REQUIREMENTS.glob('*.txt') for line in path.open()]
    assert any(pin.startswith(f'{name}=={first.rpartition(".")[0]}.') for name in names for pin in pins)


def test_mmcv_full_is_mmcv(install):
    install({'mmengine': '0.10.7', 'mmcv-full': '1.7.2'})
    with pytest.raises(ImportError, match=r'mmcv>=2\.0\.0,<3\.0\.0 but finds mmcv 1\.7\.2'):
        check_frameworks()


def test_imported_module_decides(install, monkeypatch):
    install(GOOD)
    monkeypatch.setitem(sys.modules, 'mmdet', SimpleNamespace(__version__='2.28.2'))
    with pytest.raises(ImportError, match=r'finds mmdet 2\.28\.2'):
        check_frameworks()
    monkeypatch.setitem(sys.modules, 'mmdet', SimpleNamespace(__version__='3.3.0'))
    check_frameworks()


def test_frameworks_that_are_missing_are_named(monkeypatch):
    assert missing_frameworks() == []
    monkeypatch.setitem(sys.modules, 'mmengine', None)
    assert missing_frameworks() == ['mmengine>=0.7.0,<1.0.0']
    monkeypatch.setitem(sys.modules, 'torch', None)
    assert missing_frameworks() == ['torch>=2.0.0,<3.0.0', 'mmengine>=0.7.0,<1.0.0']


FAKE_METADATA = """
from importlib import metadata
def version(name, installed={0!r}):
    if name not in installed:
        raise metadata.PackageNotFoundError(name)
    return installed[name]
metadata.version = version
"""
FAKE_MODULES = """
import sys, types
for name, version in {0!r}.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__version__ = version
"""


@pytest.mark.parametrize(
    ('fake', 'versions', 'message'),
    [
        (FAKE_METADATA, {'mmengine': '0.10.7', 'mmcv-full': '1.7.2'}, 'needs mmcv>=2.0.0,<3.0.0 but finds mmcv 1.7.2'),
        (FAKE_METADATA, {**GOOD, 'mmdet': '2.28.2'}, 'needs mmdet>=3.0.0,<4.0.0 but finds mmdet 2.28.2'),
        (FAKE_MODULES, {'mmcv': '1.7.0'}, 'needs mmcv>=2.0.0,<3.0.0 but finds mmcv 1.7.0'),
        (FAKE_MODULES, {'mmdet': '2.28.0'}, 'needs mmdet>=3.0.0,<4.0.0 but finds mmdet 2.28.0'),
    ],
)
def test_import_ends_with_one_line(fake, versions, message):
    code = fake.format(versions) + 'import repvit_mm'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(f'ImportError: repvit_mm {message}')


WITHOUT = """
import sys
for module in {0!r}:
    sys.modules[module] = None
import repvit_mm
import repvit_mm.deploy.predict, repvit_mm.deploy.results, repvit_mm.deploy.runtimes
print(repvit_mm.__version__)
for name in ('RepViT', 'switch_to_deploy'):
    try:
        getattr(repvit_mm, name)
    except ImportError as error:
        print(error)
from repvit_mm import RepViT
"""


@pytest.mark.parametrize(
    'missing', slow_but([['torch']], [['torch'], ['mmengine'], ['torch', 'torchvision', 'mmengine', 'mmcv']])
)
def test_package_without_frameworks_says_what_is_missing(missing):
    """It is imported, and what exported files need with it; only what needs a framework asks for it, in one line."""
    code = WITHOUT.format(missing)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=False)
    version, *messages = done.stdout.splitlines()
    assert version == repvit_mm.__version__
    assert done.returncode != 0 and done.stderr.splitlines()[-1] == f'ImportError: {messages[0]}'
    for name, message in zip(('RepViT', 'switch_to_deploy'), messages, strict=True):
        assert message.startswith(f'repvit_mm.{name} needs what is not installed here: pip install ')
        assert 'exported files' in message
        for framework in ('torch', 'mmengine'):
            assert (f"'{framework}>=" in message) == (framework in missing)


def test_package_without_frameworks_has_no_other_names():
    code = "import sys; sys.modules['mmengine'] = None; import repvit_mm; print(hasattr(repvit_mm, 'RepVit'))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == 'False\n'
