"""Uses of private parts of coremltools, with the reason for each. Tried with coremltools 9.0."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coremltools.converters.mil import Builder
from coremltools.converters.mil.frontend.torch import ops
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY as REGISTRY


@contextmanager
def whole_number_division() -> Iterator[None]:
    """Within the context, integers are divided as integers. coremltools converts them to floats, which may be rounded.

    Its registry of operators has a public function to add an operator, but none to restore the one before.
    """

    def floor_divide(context: Any, node: Any) -> None:
        first, second = ops._get_inputs(context, node, expected=2)
        context.add(Builder.floor_div(x=first, y=second, name=node.name))

    original = REGISTRY.get_func('floor_divide')
    REGISTRY.set_func_by_name(floor_divide, 'floor_divide')
    try:
        yield
    finally:
        REGISTRY.set_func_by_name(original, 'floor_divide')
