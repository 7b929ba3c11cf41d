"""Uses of private parts of mmcv, with the reason for each. Tried with mmcv 2.1.0."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor


@contextmanager
def ties_in_order() -> Iterator[None]:
    """Within the context, detectors sort equal scores in the order of their indices, as ONNX's TopK promises to.

    MMDetection and mmcv sort by ``Tensor.sort``, which promises no order of equal elements. On CUDA it keeps the order
    of the indices if there are more than 32 elements (PyTorch's ``Sort.cu``). On a CPU it is the C++ library's
    ``std::sort``, which mixes equal elements if there are more than 16. This matters because scores behind a sigmoid
    are often equal in float32, and of two boxes that overlap only the first one is kept.
    """
    nms = importlib.import_module('mmcv.ops.nms')  # its package has a function of this name
    sort, extension = Tensor.sort, nms.ext_module

    def stable_sort(self: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
        return sort(self, dim=dim, descending=descending, stable=True)

    def ranked_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
        # The compiled operator sorts for itself: it gets numbers without ties.
        ranks = torch.empty_like(scores)
        ranks[stable_sort(scores, descending=True)[1]] = torch.arange(len(scores), 0, -1).to(scores)
        return extension.nms(boxes, ranks, iou_threshold=iou_threshold, offset=offset)

    names = {**vars(extension), 'nms': ranked_nms}
    with mock.patch.object(Tensor, 'sort', stable_sort), mock.patch.object(nms, 'ext_module', SimpleNamespace(**names)):
        yield
