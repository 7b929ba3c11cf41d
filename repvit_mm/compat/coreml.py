"""What reaches into private parts of coremltools, each with its reason. Seen with coremltools 9.0."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coremltools.converters.mil import Builder
from coremltools.converters.mil.frontend.torch import ops
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY as REGISTRY


@contextmanager
def whole_number_division() -> Iterator[None]:
    """Within it, whole numbers are divided as such: coremltools makes floats of them, which may be rounded.

    Its registry of operators has a public way to add one, but none to put the old one back.
    """

    def floor_divide(context: Any, node: Any) -> None:
        first, second = ops._get_inputs(context, node, expected=2)
        context.add(Builder.floor_div(x=first, y=second, name=node.name))

    theirs = REGISTRY.get_func('floor_divide')
    REGISTRY.set_func_by_name(floor_divide, 'floor_divide')
    try:
        yield
    finally:
        REGISTRY.set_func_by_name(theirs, 'floor_divide')
