"""What reaches into private parts of torch, each with its reason. Seen with torch 2.13.0."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

# Tensors compare element by element, so the weak dictionaries of the standard library cannot hold them as keys.
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    'WeakTensorKeyDictionary',
    'conv_backward',
    'gelu_',
    'tensors_of',
    'tree_of',
    'version',
]


def tree_of(module: nn.Module) -> list[nn.Module]:
    """A module and all below it.

    As ``modules()``, which takes several times as long. That counts where each block looks at itself in every pass.
    """
    tree = [module]
    for parent in tree:
        if parent._modules:
            tree.extend([child for child in parent._modules.values() if child is not None])
    return tree


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers of a module and of all below it, as fast as :func:`tree_of`."""
    for child in tree_of(module):
        for tensor in (*child._parameters.values(), *child._buffers.values()):
            if tensor is not None:
                yield tensor


def version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place, as far as autograd counts: the only public use is its error."""
    return tensor._version


def gelu_(x: Tensor) -> Tensor:
    """Exact GELU in place, which ``torch.nn.functional`` does not offer."""
    return torch.ops.aten.gelu_(x)


def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, groups: int, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a convolution's input, weight and bias, those that are ``needed``, in one operation.

    ``torch.nn.grad`` has one function for the input and one for the weight, and none for the bias.
    """
    bias_shape, strides, paddings = [len(weight)], [stride, stride], [padding, padding]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, bias_shape, strides, paddings, [1, 1], False, [0, 0], groups, needed
    )
