"""The runtimes of exported files: one small class for each, all with the same interface.

    runtime = open_file('retinanet.onnx')
    outputs = runtime.run(images)  # float32 (N, 3, H, W), RGB, 0 to 255

Importing this module needs numpy only. A file needs only the library of its runtime: an ONNX file needs
onnxruntime and no torch.
"""

import importlib
import logging
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from ..compat.openvino import openvino_core
from ..messages import one_line
from .metadata import KEY, FileInfo, MetadataError
from .saturation import ONNX_PRECISE, compile_probe, onnxruntime_saturates, openvino_saturates

INFO_FILE = f'{KEY}.json'
"""Name of the description among the extra files of TorchScript and torch.export."""


class RuntimeFileError(RuntimeError):
    """An exported file cannot be opened or run; the message is one line that says why and what to do."""


class Runtime(ABC):
    """An exported file, ready to run on the CPU.

    Args:
        path: The file.
        threads: How many threads it computes in; ``None`` leaves that to the library.

    Raises:
        RuntimeFileError: if the file's library is missing, or if this package did not make the file.
    """

    suffix: ClassVar[str]
    library: ClassVar[str]
    """The module that runs it."""

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        self.path = Path(path)
        self.threads = threads
        library = import_library(self.library, self.path)
        try:
            description = self._load(library)
            if description is None:
                raise RuntimeFileError(
                    f'{path} says nothing of its classes and its input: only files of tools/export.py can be run'
                )
            self.info = FileInfo.from_json(description)
            self._check_products()
        except RuntimeFileError:
            raise
        except MetadataError as error:
            raise RuntimeFileError(f'{path} cannot be used: {error}') from None
        except Exception as error:  # for a damaged file libraries may raise anything
            raise RuntimeFileError(f'{path} cannot be opened by {self.library}: {one_line(error, 200)}') from None

    @abstractmethod
    def _load(self, library: ModuleType) -> str | None:
        """Open the file; returns its :class:`FileInfo` as JSON, ``None`` if it has none."""

    @abstractmethod
    def _run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        """The outputs in the file's order for as many images as it takes at once."""

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name, as :class:`~repvit_mm.deploy.metadata.FileInfo` describes them.

        Args:
            images: ``(N, 3, H, W)``, RGB, values from 0 to 255, of a size that the file takes.

        Raises:
            RuntimeFileError: if the images have another shape, or if the library fails.
        """
        images = np.ascontiguousarray(images, np.float32)
        self._check(images)
        if not self.info.preprocessing_inside:
            images = preprocess(images, self.info)
        batch = self.info.batch or len(images)
        try:
            parts = [self._run(images[start : start + batch]) for start in range(0, len(images), batch)]
        except Exception as error:
            raise RuntimeFileError(f'{self.library} fails on {self.path}: {one_line(error, 200)}') from error
        return {name: join(name, part) for name, part in zip(self.info.outputs, zip(*parts, strict=True), strict=True)}

    @classmethod
    def saturates(cls) -> bool:
        """Whether products of 8-bit numbers saturate in this runtime on this processor."""
        return False

    def _saturates_even_so(self) -> bool:
        """Whether they do in a file that was made for processors with VNNI."""
        return self.saturates()

    def _check_products(self) -> None:
        if self.info.exact_products and self._saturates_even_so():
            _tell_saturation(self.path)

    def _check(self, images: np.ndarray) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise RuntimeFileError(f'{self.path} takes images (N, 3, H, W), not an array of shape {images.shape}')
        sizes = self.info.sizes
        if sizes and images.shape[2:] not in sizes:
            taken = ' or '.join(f'{height}x{width}' for height, width in sizes)
            raise RuntimeFileError(
                f'{self.path} takes images of {taken} pixels (height x width), not {images.shape[2]}x{images.shape[3]}'
            )
        if self.info.batch and len(images) % self.info.batch:
            raise RuntimeFileError(f'{self.path} takes {self.info.batch} images at once, not {len(images)}')


class OnnxRuntime(Runtime):
    """An ``.onnx`` file in ONNX Runtime."""

    suffix = '.onnx'
    library = 'onnxruntime'

    @classmethod
    def saturates(cls) -> bool:
        return onnxruntime_saturates()

    def _saturates_even_so(self) -> bool:
        return onnxruntime_saturates(precise=True)

    def _load(self, library: ModuleType) -> str | None:
        description = self._open(library)
        if description is not None and FileInfo.from_json(description).exact_products and self.saturates():
            # Any other file runs as it was measured.
            self._open(library, ONNX_PRECISE)
        return description

    def _open(self, library: ModuleType, *entries: tuple[str, str]) -> str | None:
        """Make a session with further entries in its options; what the file says of itself."""
        options = library.SessionOptions()
        options.intra_op_num_threads = self.threads or 0
        # Otherwise its threads keep spinning after a run and slow down what runs next.
        for entry in (('session.force_spinning_stop', '1'), *entries):
            options.add_session_config_entry(*entry)
        options.log_severity_level = 3  # errors
        self._session = library.InferenceSession(str(self.path), options, providers=['CPUExecutionProvider'])
        return self._session.get_modelmeta().custom_metadata_map.get(KEY)

    def _run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        return self._session.run(None, {'images': images})


class OpenVino(Runtime):
    """An OpenVINO model: an ``.xml`` file with its ``.bin`` beside it."""

    suffix = '.xml'
    library = 'openvino'

    @classmethod
    def saturates(cls) -> bool:
        return openvino_saturates()

    def _load(self, library: ModuleType) -> str | None:
        if not self.path.with_suffix('.bin').is_file():
            raise RuntimeFileError(f'{self.path} has no {self.path.with_suffix(".bin").name} beside it')
        core = openvino_core()
        model = core.read_model(self.path)
        description = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else None
        # Its default would be bfloat16 on processors that have it.
        wanted = description is not None and FileInfo.from_json(description).precision == 'bfloat16'
        hint = 'bf16' if wanted and has_bfloat16() else 'f32'
        options: dict[str, Any] = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': hint}
        if self.threads:
            options['INFERENCE_NUM_THREADS'] = self.threads
        self._network = core.compile_model(model, 'CPU', options)
        return description

    def _run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        outputs = self._network(images)
        return [outputs[port] for port in self._network.outputs]


class TorchScript(Runtime):
    """A ``.pt`` file of ``torch.jit.save``."""

    suffix = '.pt'
    library = 'torch'

    def _load(self, library: ModuleType) -> str | None:
        files = {INFO_FILE: ''}
        self._torch = library
        self._network = library.jit.load(str(self.path), map_location='cpu', _extra_files=files)
        return _text(files[INFO_FILE])

    def _run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        with self._torch.inference_mode():
            return _arrays(self._network(self._torch.from_numpy(images)))


class TorchExport(Runtime):
    """A ``.pt2`` file of ``torch.export.save``."""

    suffix = '.pt2'
    library = 'torch'

    def _load(self, library: ModuleType) -> str | None:
        files = {INFO_FILE: ''}
        self._torch = library
        self._network = library.export.load(str(self.path), extra_files=files).module()
        return _text(files[INFO_FILE])

    def _run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        with self._torch.inference_mode():
            return _arrays(self._network(self._torch.from_numpy(images)))


class ExecuTorch(Runtime):
    """A ``.pte`` file in ExecuTorch's own runtime, which hands over torch tensors."""

    suffix = '.pte'
    library = 'executorch.runtime'

    def _load(self, library: ModuleType) -> str | None:
        self._torch = import_library('torch', self.path)
        self._program = library.Runtime.get().load_program(self.path)
        self._method = self._program.load_method('forward')
        if KEY not in self._program.method_names:
            return None
        return self._program.load_method(KEY).execute([])[0]

    def _run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        # The runtime owns the memory of its outputs and writes the next ones over them.
        return [array.copy() for array in _arrays(self._method.execute([self._torch.from_numpy(images)]))]


RUNTIMES: dict[str, type[Runtime]] = {
    runtime.suffix: runtime for runtime in (OnnxRuntime, OpenVino, TorchScript, TorchExport, ExecuTorch)
}
"""Suffix of an exported file -> its runtime."""


def open_file(path: str | Path, threads: int | None = None) -> Runtime:
    """An exported file in the runtime of its suffix.

    Args:
        path: The file.
        threads: How many threads it computes in; ``None`` leaves that to the library.

    Raises:
        RuntimeFileError: if there is no such file, if its suffix is none of ``RUNTIMES``, or if it cannot be opened.
    """
    path = Path(path)
    if path.suffix == '.mlpackage':
        raise RuntimeFileError(f'{path} is for Core ML, which runs on macOS and iOS only')
    if path.suffix not in RUNTIMES:
        raise RuntimeFileError(f'{path} is no exported file: expected a name that ends in {", ".join(RUNTIMES)}')
    if not path.is_file():
        raise RuntimeFileError(f'{path} not found')
    return RUNTIMES[path.suffix](path, threads)


def is_exported(path: str | Path) -> bool:
    """Whether a path names an exported file, not a checkpoint. A ``.pt`` file may be either: programs are exported."""
    path = Path(path)
    if path.suffix == '.pt' and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any('/code/' in name for name in archive.namelist())
    return path.suffix in RUNTIMES and path.suffix != '.pt'


def import_library(name: str, path: Path) -> ModuleType:
    """The library that runs a file.

    Raises:
        RuntimeFileError: if it is not installed, or broken.
    """
    package = name.partition('.')[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise RuntimeFileError(f'{path} needs the package {package}: pip install {package}') from None
    except Exception as error:  # a library whose versions do not fit together may fail in any way
        raise RuntimeFileError(f'{path} needs the package {package}, which fails: {one_line(error, 200)}') from None


def has_bfloat16() -> bool:
    """Whether OpenVINO multiplies bfloat16 on this processor, and may do so.

    Its list of capabilities tells what the processor has, not what the environment (``ONEDNN_MAX_CPU_ISA``) leaves it.
    """
    if 'BF16' not in openvino_core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
        return False
    try:
        compile_probe('bf16')
    except Exception:  # OpenVINO raises its own kinds
        return False
    return True


def preprocess(images: np.ndarray, info: FileInfo) -> np.ndarray:
    """Normalize and pad images for a file that does neither itself.

    Args:
        images: ``(N, 3, H, W)``, RGB, values from 0 to 255.
        info: The file's description.

    Returns:
        Float32 ``(N, 3, H', W')`` with sides that are multiples of ``info.divisor``.
    """
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (info.mean, info.std))
    more = [-side % info.divisor for side in images.shape[2:]]
    return np.pad((images - mean) / std, ((0, 0), (0, 0), (0, more[0]), (0, more[1])))


def join(name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """One output of all images. Shorter lists of detections are filled up: no score, no class.

    Args:
        name: The output's name.
        parts: What was given for some images each, ``(N_i, ...)``.
    """
    if len(parts) == 1:
        return parts[0]
    if name in ('boxes', 'scores', 'labels', 'masks') and len({part.shape[1:] for part in parts}) > 1:
        longest = max(part.shape[1] for part in parts)
        filling = -1 if name == 'labels' else 0
        parts = [
            np.pad(
                part,
                [(0, 0), (0, longest - part.shape[1]), *[(0, 0)] * (part.ndim - 2)],
                constant_values=part.dtype.type(filling),
            )
            for part in parts
        ]
    return np.concatenate(parts)


@cache
def _tell_saturation(path: Path) -> None:
    """Warn of a file that was made for other processors, once however often it is opened."""
    logging.getLogger(__name__).warning(
        '%s was made for processors with VNNI: on this one its int8 products saturate, so it may predict worse; '
        'export it here, or with --reduce-range',
        path,
    )


def _arrays(outputs: Any) -> list[np.ndarray]:
    """What a torch program returns, one tensor or several, as arrays."""
    outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
    return [output.numpy() for output in outputs]


def _text(content: str | bytes) -> str | None:
    """An extra file's content, ``None`` if the file was not there."""
    return (content.decode() if isinstance(content, bytes) else content) or None
