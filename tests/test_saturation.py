"""Sums of 8-bit products: which ones saturate, and whether that is noticed."""

import base64
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from repvit_mm.deploy import runtimes, saturation
from repvit_mm.deploy.metadata import KEY, FileInfo

INT16 = 2**15 - 1


def saturating_sum(activations: np.ndarray, weights: np.ndarray) -> int:
    """A dot product as processors without VNNI add it up: neighbours in 16 bits, with saturation, then all in 32."""
    products = activations.astype(np.int64) * weights.astype(np.int64)
    return int(np.clip(products.reshape(-1, 2).sum(1), -INT16 - 1, INT16).sum())


def exact_sum(activations: np.ndarray, weights: np.ndarray) -> int:
    return int(activations.astype(np.int64) @ weights.astype(np.int64))


@pytest.mark.parametrize(('highest', 'is_exact'), [(64, True), (127, False)])
def test_half_of_the_range_never_saturates(highest, is_exact):
    rng = np.random.default_rng(0)
    drawn = [(rng.integers(0, 256, 64), rng.integers(-highest, highest + 1, 64)) for _ in range(1000)]
    extreme = [(np.full(64, 255), np.full(64, sign * highest)) for sign in (1, -1)]
    same = [saturating_sum(*pair) == exact_sum(*pair) for pair in drawn + extreme]
    assert all(same) == is_exact and all(same[-2:]) == is_exact
    assert 2 * 255 * 64 <= INT16 < 2 * 255 * 127


def test_network_that_is_tried_is_what_it_is_said_to_be():
    onnx = pytest.importorskip('onnx')
    model = onnx.load_model_from_string(zlib.decompress(base64.b85decode(''.join(saturation.ONNX_NETWORK))))
    onnx.checker.check_model(model)
    (node,) = model.graph.node
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = tensors[node.input[3]]
    assert node.op_type == 'QLinearConv' and weights.dtype == np.int8 and (weights == 127).all()
    scale = tensors[node.input[6]]
    row = weights[0].ravel()
    activations = np.full(len(row), 255)
    assert exact_sum(activations, row) == saturation.EXACT == pytest.approx(saturation.ONNX_EXACT * scale, rel=1e-6)
    # What a processor without VNNI gives is far enough from it to be told apart.
    assert saturating_sum(activations, row) < 0.6 * saturation.EXACT


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('onnxruntime') is None, reason='needs onnxruntime')
@pytest.mark.skipif(shutil.which('qemu-x86_64') is None, reason='needs qemu-x86_64')
def test_without_vnni_onnxruntime_saturates():
    """On an emulated processor, and not if it is told to be right."""
    code = (
        'import sys; sys.modules["torch"] = None  # as if it were not installed: it takes long to emulate\n'
        'from repvit_mm.deploy.saturation import onnxruntime_saturates as saturates\n'
        'print(saturates(), saturates(precise=True))'
    )
    command = ['qemu-x86_64', '-cpu', 'Haswell', sys.executable, '-c', code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'True False'


@pytest.mark.parametrize('name', ['onnxruntime', 'openvino'])
def test_it_is_tried_once(name, monkeypatch):
    library = pytest.importorskip(name)
    saturates = getattr(saturation, f'{name}_saturates')
    assert isinstance(saturates(), bool)
    tried = saturates.cache_info().misses
    assert saturates() is saturates() and saturates.cache_info().misses == tried
    # A runtime that cannot be tried is taken to be right.
    if name == 'onnxruntime':
        monkeypatch.delattr(library, 'InferenceSession')
    else:
        monkeypatch.delattr(saturation, 'openvino_core')
    assert saturates.__wrapped__() is False


@pytest.mark.skipif(importlib.util.find_spec('openvino') is None, reason='needs openvino')
@pytest.mark.skipif(platform.machine() != 'x86_64', reason='needs a processor of this kind')
def test_without_vnni_openvino_saturates():
    """oneDNN may be told to leave newer instructions alone, and OpenVINO computes with oneDNN."""
    code = 'from repvit_mm.deploy.saturation import openvino_saturates; print(openvino_saturates())'
    environment = {**os.environ, 'ONEDNN_MAX_CPU_ISA': 'AVX2'}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'True'


class File(runtimes.Runtime):
    """A file of which only the description matters."""

    library = 'numpy'
    info = FileInfo('segmentation', ('labels',))

    def _load(self, library):
        return self.described.to_json()

    def _run(self, images):
        return []


@pytest.mark.parametrize('saturates', [False, True])
@pytest.mark.parametrize('exact', [False, True])
def test_file_for_other_processors_is_told(saturates, exact, monkeypatch, caplog):
    monkeypatch.setattr(File, 'saturates', classmethod(lambda cls: saturates))
    monkeypatch.setattr(File, 'described', replace(File.info, precision='int8', exact_products=exact), raising=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            File('model.onnx')
    expected = exact and saturates
    assert [record.levelname for record in caplog.records] == ['WARNING'] * expected
    assert not expected or 'model.onnx was made for processors with VNNI' in caplog.text


class Options:
    """What a session is told."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str]] = []

    def add_session_config_entry(self, *entry: str) -> None:
        self.entries.append(entry)


class Session:
    """A session of which only its options and the file's description matter."""

    info = File.info

    def __init__(self, path: str, options: Options, providers: list[str]) -> None:
        self.options = options

    def get_modelmeta(self) -> SimpleNamespace:
        return SimpleNamespace(custom_metadata_map={KEY: self.info.to_json()})


@pytest.mark.parametrize('saturates', [False, True])
@pytest.mark.parametrize('exact', [False, True])
def test_onnxruntime_is_told_to_be_right(saturates, exact, monkeypatch, caplog):
    """Any other file runs as it was measured. One that an ONNX Runtime without this option runs is told."""
    library = SimpleNamespace(SessionOptions=Options, InferenceSession=Session)
    monkeypatch.setattr(Session, 'info', replace(File.info, precision='int8', exact_products=exact))
    monkeypatch.setattr(runtimes, 'import_library', lambda *arguments: library)
    for knows in (True, False):
        monkeypatch.setattr(
            runtimes, 'onnxruntime_saturates', lambda precise=False, knows=knows: saturates and not (precise and knows)
        )
        with caplog.at_level(logging.WARNING):
            runtime = runtimes.OnnxRuntime('session.onnx')
        assert (saturation.ONNX_PRECISE in runtime._session.options.entries) == (exact and saturates)
        assert bool(caplog.records) == (exact and saturates and not knows)


def test_older_descriptions_say_nothing_of_it():
    values = File.info.to_dict()
    del values['exact_products']
    assert FileInfo.from_dict(values).exact_products is False
