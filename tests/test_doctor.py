"""The doctor in installations made of stubs: whatever is broken in them is named, and nothing breaks the doctor."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from repvit_mm import _versions
from repvit_mm_cli import doctor

ROOT = Path(__file__).parents[1]
ALL = tuple(doctor.OPTIONAL)
BUILD = doctor.build_command(doctor.names_for_pip(_versions).get('mmcv', 'mmcv'))
MODULES = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'safetensors', 'pkg_resources', 'ftfy', 'regex')

TORCH = """
__version__ = '2.13.0'
class version:
    cuda = {cuda!r}
class Tensor:
    device = None
    def mm(self, other): return self
    def sum(self): return 8
    def to(self, device): return self
def ones(*shape): return Tensor()
def tensor(values): return Tensor()
def get_num_threads(): return 3
class cuda:
    is_available = staticmethod(lambda: False)
class backends:
    class mps:
        is_available = staticmethod(lambda: False)
"""

OPERATORS = """
def get_compiling_cuda_version(): return {cuda!r}
class Kept:
    def tolist(self): return {kept}
def nms(boxes, scores, threshold): return None, Kept()
"""


def stub(folder: Path, name: str, content: str = "__version__ = '1.0'\n") -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / '__init__.py').write_text(content)


@pytest.fixture
def stubs(tmp_path, monkeypatch) -> Path:
    """Stand-ins for all that the doctor looks at; every one works."""
    # Four stand for all: each is a process.
    monkeypatch.setattr(doctor, 'OPTIONAL', dict(openvino='files', onnx='files', rich='tables', cv2='images'))
    folder = tmp_path / 'stubs'
    for name in (*MODULES, *doctor.OPTIONAL):
        stub(folder, name)
    stub(folder, 'torch', TORCH.format(cuda=None))
    stub(folder, 'repvit_mm')
    stub(folder, 'mmcv/ops', OPERATORS.format(cuda='not available', kept=[0, 2]))
    return folder


def examine(stubs: Path, monkeypatch, config: str | None = None) -> dict[str, doctor.Line]:
    """What the doctor says, by name. The probes' processes see the stubs."""
    monkeypatch.setenv('PYTHONPATH', str(stubs))
    return {line.name: line for line in doctor.examine(config)}


def test_nothing_is_wrong_with_stubs_that_work(stubs, monkeypatch):
    lines = examine(stubs, monkeypatch)
    assert {line.mark for line in lines.values()} == {'ok'}
    assert {'Python', 'torch', 'devices', 'mmcv operators', *MODULES, *doctor.OPTIONAL} <= lines.keys()
    assert lines['devices'].text == 'CPU, 3 threads'


@pytest.mark.parametrize(
    ('flags', 'expected'),
    [
        ('fpu avx512f avx512_bf16 avx512_vnni', 'bfloat16 by AVX512-BF16; int8 by AVX512-VNNI'),
        ('amx_bf16 amx_int8 avx512_bf16', 'bfloat16 by AMX-BF16 and AVX512-BF16; int8 by AMX-INT8'),
        ('fpu avx2', 'bfloat16 by nothing; int8 by nothing'),
        (None, None),
    ],
)
def test_instructions_of_the_processor(tmp_path, monkeypatch, flags, expected):
    monkeypatch.setattr(doctor, 'CPUINFO', tmp_path / 'cpuinfo')
    if flags is not None:
        doctor.CPUINFO.write_text(f'processor\t: 0\nflags\t\t: {flags}\nbugs\t: none\n')
    assert [line.text for line in doctor.processor_lines()] == ([] if expected is None else [expected])


BROKEN = {
    'ImportError': ("raise ImportError('libfoo.so.3: cannot open')", 'ImportError: libfoo.so.3'),
    'OSError': ("raise OSError('libcudart.so.12: cannot open shared object file')", 'OSError: libcudart.so.12'),
    'missing part': ('import a_part_that_is_missing', "No module named 'a_part_that_is_missing'"),
    'assertion': ("raise AssertionError('MMCV==2.2.0 is used but incompatible')", 'MMCV==2.2.0 is used'),
    'syntax': ('def', 'SyntaxError'),
    'exit': ('raise SystemExit(3)', 'SystemExit: 3'),
    'killed': ('import os, signal\nos.kill(os.getpid(), signal.SIGKILL)', 'ended with status -9'),
    'noise': ("print('hello')\nraise ValueError('two\\nlines')", 'ValueError: two lines'),
}


def test_what_is_broken_is_named_in_one_line(stubs, monkeypatch):
    """Eight libraries, each broken in its own way."""
    names = dict(
        zip(('mmengine', 'mmdet', 'mmseg', 'safetensors', 'openvino', 'onnx', 'rich', 'cv2'), BROKEN, strict=True)
    )
    for name, case in names.items():
        stub(stubs, name, BROKEN[case][0])
    lines = examine(stubs, monkeypatch)
    for name, case in names.items():
        line = lines[name]
        assert line.mark == 'broken' and BROKEN[case][1] in line.text and line.cure and '\n' not in str(line)
    assert {line.name for line in lines.values() if line.mark == 'broken'} == set(names)


@pytest.mark.parametrize('case', ['OSError', 'killed'])
def test_what_stands_on_torch_breaks_with_it(stubs, monkeypatch, case):
    stub(stubs, 'torch', BROKEN[case][0])
    lines = examine(stubs, monkeypatch)
    assert BROKEN[case][1] in lines['torch'].text and BROKEN[case][1] in lines['mmcv operators'].text
    assert {line.name for line in lines.values() if line.mark == 'broken'} == {'torch', 'mmcv operators'}


@pytest.mark.parametrize(
    ('cuda', 'torch_cuda', 'kept', 'expected'),
    [
        ('12.1', '13.0', [0, 2], 'built for CUDA 12.1, torch for CUDA 13.0'),
        ('not available', '13.0', [0, 2], 'built for CUDA not available, torch for CUDA 13.0'),
        ('not available', None, [0, 1, 2], 'nms on cpu keeps [0, 1, 2], expected [0, 2]'),
    ],
)
def test_operators_that_do_not_fit_torch(stubs, monkeypatch, cuda, torch_cuda, kept, expected):
    stub(stubs, 'torch', TORCH.format(cuda=torch_cuda))
    stub(stubs, 'mmcv/ops', OPERATORS.format(cuda=cuda, kept=kept))
    line = examine(stubs, monkeypatch)['mmcv operators']
    assert line.mark == 'broken' and expected in line.text and line.cure.endswith(BUILD)


def test_operators_of_another_torch(stubs, monkeypatch):
    stub(stubs, 'mmcv/ops', "raise ImportError('_ext.so: undefined symbol: _ZN3c10')")
    line = examine(stubs, monkeypatch)['mmcv operators']
    assert 'mmcv was built for another torch' in line.text and line.cure.endswith(BUILD)


def test_absent_is_broken_only_where_it_is_needed():
    absent = {'error': "ModuleNotFoundError: No module named 'x'", 'absent': 'x'}
    assert doctor.module_line('x', absent, needed=True).mark == 'broken'
    assert doctor.module_line('x', absent, needed=False).mark == 'absent'
    # What only some commands need is named with its purpose.
    line = doctor.module_line('shtab', dict(absent, absent='shtab'), needed=False)
    assert line.mark == 'absent' and line.cure == 'for repvit-mm completion: pip install shtab'
    # A part of it, or what it imports, is missing: it is there, and broken.
    assert doctor.module_line('x', dict(absent, absent='x.y'), needed=False).mark == 'broken'


@pytest.mark.parametrize(
    ('found', 'cure'),
    [
        ({'error': "ModuleNotFoundError: No module named 'mmcv'", 'absent': 'mmcv'}, 'install mmcv, which it needs'),
        ({'error': "ModuleNotFoundError: No module named 'mmdet.x'", 'absent': 'mmdet.x'}, '--force-reinstall'),
        ({'error': 'AssertionError: MMCV==2.2.0 is used but incompatible.', 'absent': None}, '"mmcv<2.2"'),
    ],
)
def test_the_cure_is_for_what_is_at_fault(found, cure):
    assert doctor.module_line('mmdet', found, needed=True, command=BUILD).cure.endswith(cure)


def pretend_installed(monkeypatch, distributions: dict[str, str]) -> None:
    def version(name):
        if name not in distributions:
            raise doctor.metadata.PackageNotFoundError(name)
        return distributions[name]

    monkeypatch.setattr(doctor.metadata, 'version', version)


@pytest.mark.parametrize(
    ('installed', 'expected'),
    [
        ({'torch': '1.13.1'}, {'torch': 'pip install "torch>=2.0.0,<3.0.0"'}),
        ({'torch': '2.13.0', 'mmcv': '2.2.0'}, {}),
        ({'mmcv': '1.7.0'}, {'mmcv': 'pip install "mmcv>=2.0.0,<3.0.0"'}),
        ({'mmengine': '0.10.7', 'onedl-mmengine': '0.10.12'}, {'mmengine': 'pip uninstall mmengine onedl-mmengine'}),
    ],
)
def test_versions(monkeypatch, installed, expected):
    pretend_installed(monkeypatch, installed)
    lines = {line.name: line for line in doctor.distribution_lines(doctor.version_table(ROOT / 'repvit_mm'))}
    assert lines.keys() == expected.keys()
    assert all(lines[name].mark == 'broken' and cure in lines[name].cure for name, cure in expected.items())


@pytest.mark.parametrize(
    ('installed', 'expected'),
    [
        ({'mmcv': '2.1.0', 'mmdet': '3.2.0', 'mmsegmentation': '1.2.2', 'torch': '2.1.2', 'numpy': '1.26.4'}, {}),
        ({'mmcv': '2.0.1', 'mmdet': '3.0.0', 'mmyolo': '0.6.0', 'mmengine': '0.7.4', 'yapf': '0.40.1'}, {}),
        ({'mmcv': '2.2.0', 'mmdet': '3.3.0'}, {'mmcv': ('2.2.0 is too new for mmdet 3.3.0', 'COMMAND')}),
        ({'mmcv': '2.1.0', 'mmdet': '3.1.0'}, {'mmcv': ('too new for mmdet 3.1.0', 'pip install "mmdet>=3.2.0"')}),
        ({'mmcv': '2.1.0', 'mmyolo': '0.6.0'}, {'mmcv': ('too new for mmyolo 0.6.0', 'COMMAND')}),
        ({'mmcv': '2.2.0', 'onedl-mmdetection': '3.5.1'}, {}),
        ({'numpy': '2.2.0', 'torch': '2.1.2+cu121'}, {'numpy': ('for torch 2.1.2+cu121', 'pip install "numpy<2.0.0"')}),
        ({'numpy': '2.2.0', 'torch': '2.3.0'}, {}),
        ({'yapf': '0.43.0', 'mmengine': '0.10.0'}, {'yapf': ('for mmengine 0.10.0', 'pip install "yapf<0.40.2"')}),
    ],
    ids=str,
)
def test_what_is_too_new_for_what(monkeypatch, installed, expected):
    pretend_installed(monkeypatch, installed)
    lines = {line.name: line for line in doctor.misfits(_versions, 'COMMAND')}
    assert lines.keys() == expected.keys()
    for name, (text, cure) in expected.items():
        assert lines[name].mark == 'broken' and lines[name].text.endswith(text) and lines[name].cure == cure


@pytest.mark.parametrize(
    ('torch', 'installed', 'expected'),
    [
        (('2.1.2+cu121', '12.1'), {}, 'mmcv==2.1.0 -f https://download.openmmlab.com/mmcv/dist/cu121/torch2.1.0/'),
        (
            ('2.1.0', None),
            {'mmdet': '3.3.0'},
            'mmcv==2.1.0 -f https://download.openmmlab.com/mmcv/dist/cpu/torch2.1.0/',
        ),
        (
            ('2.0.1', '11.7'),
            {'mmdet': '3.2.0'},
            'mmcv==2.1.0 -f https://download.openmmlab.com/mmcv/dist/cu117/torch2.0',
        ),
        (
            ('2.0.1', '11.8'),
            {'mmdet': '3.0.0'},
            'mmcv==2.0.1 -f https://download.openmmlab.com/mmcv/dist/cu118/torch2.0',
        ),
        (('2.0.1', '11.8'), {'mmyolo': '0.6.0'}, 'mmcv==2.0.1 -f '),
        (('2.1.2', '12.6'), {}, BUILD),
        (('2.2.0', '12.1'), {}, BUILD),
        (('2.13.0', None), {}, BUILD),
    ],
    ids=str,
)
def test_wheels_of_mmcv(monkeypatch, torch, installed, expected):
    pretend_installed(monkeypatch, installed)
    monkeypatch.setattr(doctor.sys, 'version_info', (3, 11, 7))
    found = dict(zip(('version', 'cuda'), torch, strict=True))
    assert expected in doctor.mmcv_command(_versions, found)
    assert doctor.mmcv_command(_versions, found, 'onedl-mmcv') == doctor.build_command('onedl-mmcv')
    monkeypatch.setattr(doctor.sys, 'version_info', (3, 12, 1))
    assert doctor.mmcv_command(_versions, found) == BUILD


def test_among_forks_the_cure_is_a_fork(stubs, monkeypatch):
    shutil.copy(ROOT / 'repvit_mm/_versions.py', stubs / 'repvit_mm/_versions.py')
    monkeypatch.setattr(doctor, 'package_folder', lambda: stubs / 'repvit_mm')
    for name in ('mmdet', 'mmseg', 'mmcv/ops'):
        stub(stubs, name, "raise ImportError('a part is missing')")
    broken = ('mmdet', 'mmseg', 'mmcv operators')
    for installed, names in (
        ({'mmengine': '0.10.7'}, ('mmdet', 'mmsegmentation', 'mmcv')),
        ({'onedl-mmengine': '0.10.12'}, ('onedl-mmdetection', 'onedl-mmsegmentation', 'onedl-mmcv')),
    ):
        pretend_installed(monkeypatch, installed)
        lines = examine(stubs, monkeypatch)
        assert {name for name, line in lines.items() if line.mark == 'broken'} == set(broken)
        for line, name in zip((lines[name] for name in broken), names, strict=True):
            assert f' {name} ' in f'{line.cure} '


def test_a_config_s_data_and_weights():
    found = dict(scope='mmdet', paths=3, missing={'data/x': 'train'}, weights=['w.pth', 'https://a/b'], absent={})
    found['absent'] = {'w.pth': 'w.pth', 'https://a/b': '/cache/b'}
    data, local, remote = doctor.config_lines('c.py', found)
    assert data.mark == local.mark == 'broken' and 'data/x not found (train' in data.text
    assert remote.mark == 'absent' and '/cache/b' in remote.cure
    (line,) = doctor.config_lines('c.py', {'error': 'SyntaxError: invalid'})
    assert line.mark == 'broken' and 'SyntaxError' in line.text


def launch(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / 'tools/doctor.py'), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables)


def test_exit_status_and_marks(stubs):
    """The launcher looks at everything, on a terminal without Unicode too."""
    for name in ALL:
        stub(stubs, name)
    versions = stubs / 'repvit_mm/_versions.py'
    shutil.copy(ROOT / 'repvit_mm/_versions.py', versions)
    done = launch(PYTHONPATH=str(stubs), PYTHONIOENCODING='ascii')
    assert done.returncode == 0 and done.stdout.endswith('nothing needed is broken\n'), done.stdout
    assert '+ torch: 2.13.0\n' in done.stdout
    stub(stubs, 'torch', "raise OSError('libcudart.so.12')")
    versions.unlink()
    done = launch('absent.py', PYTHONPATH=str(stubs), PYTHONIOENCODING='utf-8')
    assert done.returncode == 1 and not done.stderr
    assert '✗ torch: installed, but cannot be imported: OSError: libcudart.so.12' in done.stdout
    assert f'✗ versions: {versions.parent} is not whole: FileNotFoundError' in done.stdout
    assert '✗ absent.py: not found' in done.stdout and done.stdout.endswith(' broken\n')


@pytest.mark.slow
@pytest.mark.needs_ops
def test_this_installation_and_a_config(tmp_path):
    config = ROOT / 'configs/det/mask_rcnn_repvit_m0_6_fpn_shapes.py'
    found = doctor.probe('config', str(config))
    assert found['scope'] == 'mmdet' and found['paths'] == 4 and found['weights'] == []
    assert 'cuda' in doctor.probe('operators')
    assert doctor.probe('torch')['devices'][0].startswith('CPU')
