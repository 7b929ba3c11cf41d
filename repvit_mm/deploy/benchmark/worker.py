"""One route of a whole model in a process of its own, whose memory is the route's alone.

The process reads one word a line and answers with one line of JSON: ``run`` runs the route once, ``memory`` tells what
it took. An ONNX or OpenVINO file runs there as where no torch is installed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...messages import one_line
from ..masks import pasted
from ..runtimes import open_file

PROGRAM = """
import sys
if {without_torch}:
    sys.modules['torch'] = None  # it then counts as not installed
from repvit_mm.deploy.benchmark.worker import serve
serve()
"""

STATUS = Path('/proc/self/status')
"""Where Linux tells what memory a process takes."""


class WorkerError(RuntimeError):
    """A route's process failed; the message is one line that says why."""


class Worker:
    """A route in a process of its own, ready to run. Calling it runs the route once.

    Args:
        task: What the process gets ready: either ``file``, the path of an exported file, or ``config``, ``weights``
            (paths), ``fuse`` and ``compile`` (bools), ``half`` (a name in :data:`~repvit_mm.precision.HALF`, or
            ``None``), ``device`` and the model's ``task``; in both cases ``threads`` and ``images``, the path of an
            ``.npy`` file ``(N, 3, H, W)``, RGB, from 0 to 255.

    Raises:
        WorkerError: if the route cannot be made ready.
    """

    def __init__(self, task: Mapping[str, Any]) -> None:
        without_torch = Path(task.get('file', '')).suffix in ('.onnx', '.xml')
        command = [sys.executable, '-c', PROGRAM.format(without_torch=without_torch), json.dumps(task)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def __call__(self) -> None:
        self._ask('run')

    def memory(self) -> dict[str, int]:
        """What the route took, in bytes.

        ``process_bytes`` is the most memory that the process had at once, libraries and loading included; it is
        missing where the system does not tell. A model in torch has ``peak_bytes``, too: the most that tensors took
        at once above weights and images.
        """
        return self._ask('memory')

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> 'Worker':
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, word: str) -> dict[str, Any]:
        try:
            self._process.stdin.write(f'{word}\n')
            self._process.stdin.flush()
        except BrokenPipeError:  # the reason is in the answer, or in the status
            pass
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f'its process ended with status {self._process.wait()}')
        answer = json.loads(line)
        if 'error' in answer:
            raise WorkerError(answer['error'])
        return answer


def serve() -> None:
    """What the process does: get the route of its command line ready, then what it is asked for."""
    # Libraries print: that goes to the error output, and the answers alone to the caller.
    with os.fdopen(os.dup(1), 'w', buffering=1) as caller:
        os.dup2(2, 1)

        def answer(**content: Any) -> None:
            caller.write(json.dumps(content) + '\n')

        try:
            task = json.loads(sys.argv[1])
            run, measure = file_route(task) if 'file' in task else torch_route(task)
            answer()
            for line in sys.stdin:
                if line == 'run\n':
                    run()
                    answer()
                else:
                    answer(**process_memory(), **measure())
        except Exception as error:  # whatever it is, the caller is told
            answer(error=one_line(error))


Ready = tuple[Callable[[], Any], Callable[[], dict[str, int]]]
"""What runs a route once, and what measures its memory."""


def file_route(task: Mapping[str, Any]) -> Ready:
    """An exported file, from images to masks."""
    images = np.load(task['images'])
    runtime = open_file(task['file'], task['threads'])
    return lambda: pasted(runtime.run(images), images.shape[2:], runtime.info.mask_threshold), dict


def torch_route(task: Mapping[str, Any]) -> Ready:
    """A model in torch, by its own framework from images to masks."""
    import torch
    from mmengine.config import Config

    from ...compilation import compile_networks
    from ...precision import HALF, compute_in
    from ..load import build_model, fuse_model
    from ..verify import framework_results
    from .measures import peak_bytes

    torch.set_num_threads(task['threads'])
    model = build_model(Config.fromfile(task['config']))
    model.load_state_dict(torch.load(task['weights'], weights_only=True))
    device = torch.device(task['device'])
    model = (fuse_model(model) if task['fuse'] else model).to(device)
    if task['half']:
        compute_in(model, HALF[task['half']])
    if task['compile']:
        compile_networks(model, dynamic=False)
    images = np.load(task['images'])

    def run() -> None:
        framework_results(model, task['task'], images)
        if device.type == 'cuda':
            torch.cuda.synchronize()

    return run, lambda: {'peak_bytes': peak_bytes(run, device)}


def process_memory() -> dict[str, int]:
    """The most memory that this process had at once, if the system tells; what its parent had does not count."""
    if not STATUS.exists():
        return {}
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith('VmHWM:'))
    return {'process_bytes': 1024 * int(line.split()[1])}
