"""Programs of the project, run in processes of their own.

Most of the time of a short run goes into importing the frameworks. A server that has imported them forks a process for
each run; nothing that a run does reaches another one, or the tests.
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import mmengine.config.config
import mmengine.runner.runner
import torch
from mmengine.runner import Runner

TOOLS = Path(__file__).parents[1] / 'tools'
STAND_INS = Path(__file__).parent / 'stand_ins'

PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload(
    [
        'matplotlib.figure',
        'pytest',
        'torch._dynamo',
        'repvit_mm.deploy.load',
        'repvit_mm.resume',
        'mmdet.apis',
        'mmdet.evaluation',
        'mmseg.apis',
        'mmseg.evaluation',
    ]
)


def launch(
    folder: Path,
    tool: str | Path,
    *arguments: object,
    first: Callable[[], None] | None = None,
    meanwhile: Callable[[int], None] | None = None,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Run a tool in a folder as ``python tools/TOOL ARGUMENTS`` does, without its slow imports.

    A negative status is the signal that ended it.

    Args:
        folder: The folder.
        tool: The tool's file name, or the path of somebody else's launcher.
        arguments: Of the tool.
        first: Called in the process before the tool; has to be picklable.
        meanwhile: Called here while the tool runs, with its process's id.
        environment: Further variables.
    """
    with tempfile.TemporaryDirectory() as streams:
        process = PROCESSES.Process(
            target=_run,
            args=(folder, tool, [*map(str, arguments)], {**os.environ, **environment}, Path(streams), first),
        )
        process.start()
        if meanwhile:
            meanwhile(process.pid)
        process.join()
        return subprocess.CompletedProcess(
            [tool, *arguments], process.exitcode, *(Path(streams, name).read_text() for name in ('stdout', 'stderr'))
        )


def _run(
    folder: Path,
    tool: str | Path,
    arguments: list[str],
    environment: Mapping[str, str],
    streams: Path,
    first: Callable[[], None] | None,
) -> None:
    """Become the tool, as Python would start it; multiprocessing turns what it raises into an exit status."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        with open(streams / name, 'wb') as file:
            os.dup2(file.fileno(), number)
    be_quick()
    if first:
        first()
    path = TOOLS / tool
    sys.path[:0] = [str(path.parent), *filter(None, environment.get('PYTHONPATH', '').split(os.pathsep))]
    sys.argv = [str(path), *arguments]
    runpy.run_path(sys.argv[0], run_name='__main__')


def be_quick() -> None:
    """Spare this process what is slow and says nothing of the run."""
    gc.freeze()  # what the server imported stays: the data sets collect garbage as they are built
    torch.set_num_threads(1)
    spare_mmengine()


def spare_mmengine() -> None:
    """Spare this process what MMEngine does in vain.

    For each ``mmdet::`` or ``mmseg::`` in a config it reads the library's whole model index, a hundred files, in which
    it looks for a name without its suffix; then it joins paths. It lays out the config's text five times in a run, asks
    compilers and drivers for their versions, and for each checkpoint git for its own commit, where there is none.
    """
    module = mmengine.config.config
    module._get_external_cfg_path = module._get_external_cfg_base_path
    module.FormatCode = lambda text, **_: (text, True)
    Runner._log_env = lambda *_: None
    mmengine.runner.runner.get_git_hash = lambda *_: 'unknown'


def launch_anew(folder: Path, tool: str | Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run ``python tools/TOOL ARGUMENTS`` in a folder, with a Python that imports all anew."""
    return run(folder, sys.executable, TOOLS / tool, *arguments, **environment)


def run(folder: Path, *command: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in a folder."""
    return subprocess.run(
        [*map(str, command)], cwd=folder, capture_output=True, text=True, env=variables(**environment)
    )


def variables(*folders: Path, **environment: str) -> dict[str, str]:
    """The variables of a process that imports all anew: from these folders too, and a stand-in for yapf."""
    paths = filter(None, (STAND_INS, *folders, os.environ.get('PYTHONPATH')))
    path = os.pathsep.join(map(str, paths))
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path, **environment}
