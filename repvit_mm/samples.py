"""Samples of a data set that cannot be read: one line names the file, at whatever epoch it comes up."""

import os
from collections.abc import Mapping
from typing import Any

from .compat.openmmlab import watch_samples
from .deploy.sources import UnreadableError, read_image
from .messages import one_line


class SampleError(RuntimeError):
    """A sample cannot be read; the message is one line that names its file."""

    def __str__(self) -> str:
        # One from a data loader's worker carries the worker's traceback before the message.
        return super().__str__().rpartition(f'{type(self).__name__}: ')[2].strip()


def name_samples() -> None:
    """Let all data sets of MMEngine in this process name the file of a sample that they cannot read."""
    watch_samples(explain, check_label_map)


def explain(info: Mapping[str, Any], error: Exception) -> SampleError:
    """What to say where a pipeline fails.

    Args:
        info: What the data set knows of the sample.
        error: What the pipeline raised.
    """
    if isinstance(error, OSError) and error.filename:
        return SampleError(f'{error.filename} cannot be read: {error.strerror}')
    image, labels = str(info.get('img_path', 'a sample without img_path')), info.get('seg_map_path')
    if os.path.exists(image):
        try:
            read_image(image)
        except UnreadableError as unreadable:
            return SampleError(str(unreadable))
    files = f'{image} with {labels}' if labels else image
    return SampleError(f'{files} cannot be prepared: {one_line(error)}')


def check_label_map(packed: Any) -> None:
    """Check that a packed sample's label map has the size of its image, as it was read or as the model gets it.

    Raises:
        SampleError: if its size is neither one.
    """
    sample = packed.get('data_samples') if isinstance(packed, Mapping) else None
    labels = getattr(sample, 'gt_sem_seg', None)
    shape = getattr(packed['inputs'], 'shape', None) if labels is not None else None
    if shape is None:  # no label map, or several images for test-time augmentation
        return
    meta = sample.metainfo
    if labels.shape not in (shape[-2:], tuple(meta.get('ori_shape', ()))):
        (height, width), (its_height, its_width) = labels.shape, shape[-2:]
        raise SampleError(
            f'label map {meta.get("seg_map_path")} is of another size than {meta.get("img_path")}: '
            f'{width}x{height} for {its_width}x{its_height} pixels once they are prepared'
        )
