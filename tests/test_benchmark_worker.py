"""Routes in processes of their own: what they answer, and what becomes of one that fails."""

import sys

import numpy as np
import pytest

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
from files import strongest_channel

from repvit_mm.deploy.benchmark import worker
from repvit_mm.deploy.benchmark.worker import Worker, WorkerError


@pytest.fixture
def task(tmp_path):
    np.save(tmp_path / 'images.npy', np.zeros((1, 3, 32, 32), np.float32))
    file = strongest_channel(tmp_path / 'file.onnx')
    return {'file': str(file), 'images': str(tmp_path / 'images.npy'), 'threads': 1}


def test_file_runs_without_torch_and_tells_its_memory(task, monkeypatch):
    checked = worker.PROGRAM.replace('\nserve()', '\nassert sys.modules["torch"] is None\nserve()')
    monkeypatch.setattr(worker, 'PROGRAM', checked)
    with Worker(task) as route:
        route()
        memory = route.memory()
        assert set(memory) <= {'process_bytes'}
        if sys.platform == 'linux':
            assert 2**24 < memory['process_bytes'] < 2**30


def test_failure_is_told_in_one_line(task):
    with pytest.raises(WorkerError, match=r'^absent\.onnx not found$'):
        Worker(task | {'file': 'absent.onnx'})
    np.save(task['images'], np.zeros((1, 4, 32, 32), np.float32))
    with Worker(task) as route, pytest.raises(WorkerError, match=r'takes images \(N, 3, H, W\)'):
        route()


def test_process_that_dies(task, monkeypatch):
    monkeypatch.setattr(worker, 'PROGRAM', 'raise SystemExit({without_torch} + 2)')
    with pytest.raises(WorkerError, match=r'^its process ended with status 3$'):
        Worker(task)
