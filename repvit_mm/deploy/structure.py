"""Finds the layers, sums and gates of a graph that may compute in int8, for any file format.

A graph is read as a list of :class:`Node`. Nodes between the first and the last convolution, or product with weights,
may compute in int8. What is done to the image before them, and to boxes and scores after them, always stays in float.

Needs the standard library only.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal['conv', 'linear', 'add', 'mul', 'shape', 'barrier', 'other']
"""What a node computes, as far as it matters for int8.

``'conv'`` and ``'linear'`` (a matrix product) take most of the time. ``'shape'`` computes sizes. ``'barrier'`` selects
by value: suppression, top-k, pooling of regions. Everything behind a barrier depends on what it selects.
"""


@dataclass(frozen=True)
class Node:
    """An operator of a graph.

    Args:
        name: Its name, unique in the graph.
        kind: What it computes.
        module: Name of the torch module that it was made from, as far as the format keeps the name.
        inputs: Names of the nodes whose results it takes; constants are not among them.
        leaves: Whether one of its results is an output of the graph.
    """

    name: str
    kind: Kind
    module: str
    inputs: tuple[str, ...]
    leaves: bool = False


@dataclass(frozen=True)
class Layer:
    """A node whose arithmetic may be int8: a convolution, a matrix product, a sum or a product of two maps (a gate).

    Args:
        name: Name of the node.
        kind: ``'conv'``, ``'linear'``, ``'add'`` or ``'mul'``.
        module: Name of the torch module that it was made from.
        section: How many selections by value lie before it: 0 up to the proposals of a two-stage detector.
        end: Whether its result reaches an output or a barrier before it reaches another layer.
        takes: Names of the layers whose results it takes, directly or through nodes that are no layers.
    """

    name: str
    kind: Kind
    module: str
    section: int = 0
    end: bool = False
    takes: frozenset[str] = frozenset()

    def is_same_layer(self, module: str, kind: Kind) -> bool:
        """Whether a node of another format, given by its module and kind, is the same layer."""
        # A format keeps a module's full name or only the end of it.
        own_name, other_name = f'.{self.module}', f'.{module}'
        return kind == self.kind and (own_name.endswith(other_name) or other_name.endswith(own_name))


@dataclass(frozen=True)
class Structure:
    """The parts of a graph that may compute in int8.

    Args:
        layers: The layers in the order in which they run.
        between: Names of all nodes from the first to the last layer, including those that only pass maps on.
    """

    layers: tuple[Layer, ...]
    between: frozenset[str]


def find_structure(nodes: Sequence[Node]) -> Structure:
    """The structure of a graph.

    Args:
        nodes: Its nodes, each after those whose results it takes.
    """
    by_name = {node.name: node for node in nodes}
    users: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        for name in node.inputs:
            users[name].append(node)

    behind: set[str] = set()  # a layer, and no sizes
    section: dict[str, int] = {}
    for node in nodes:
        sources = [by_name[name] for name in node.inputs]
        section[node.name] = max((section[s.name] + (s.kind == 'barrier') for s in sources), default=0)
        if node.kind != 'shape' and any(_weighs(source) or source.name in behind for source in sources):
            behind.add(node.name)

    before: set[str] = set()  # a layer of the same section
    for node in reversed(nodes):
        passed_to = (user for user in users[node.name] if user.kind not in ('barrier', 'shape'))
        if any(_weighs(user) or user.name in before for user in passed_to):
            before.add(node.name)

    def is_layer(node: Node) -> bool:
        if _weighs(node):
            return True
        maps = {name for name in node.inputs if _weighs(by_name[name]) or name in behind}
        return node.kind in ('add', 'mul') and node.name in before and len(maps) == len(node.inputs) == 2

    chosen = {node.name for node in nodes if is_layer(node)}
    ends: set[str] = set()
    for node in reversed(nodes):
        if node.leaves or any(
            user.kind == 'barrier' or (user.name not in chosen and user.name in ends) for user in users[node.name]
        ):
            ends.add(node.name)
    takes: dict[str, frozenset[str]] = {}
    for node in nodes:
        takes[node.name] = frozenset().union(
            *(
                {name} if name in chosen else takes[name]
                for name in node.inputs
                if by_name[name].kind not in ('barrier', 'shape')
            )
        )
    layers = tuple(
        Layer(node.name, node.kind, node.module, section[node.name], node.name in ends, takes[node.name])
        for node in nodes
        if node.name in chosen
    )
    selecting = {node.name for node in nodes if node.kind == 'barrier'}
    return Structure(layers, frozenset(chosen | (behind & before) - selecting))


def _weighs(node: Node) -> bool:
    return node.kind in ('conv', 'linear')


def module_of(node: str, weights: Sequence[str]) -> str:
    """The torch module that an exported node was made from, without the graph's own ``model``.

    Args:
        node: Name of the node.
        weights: Name of its weight, if it has one.
    """
    for weight in weights:
        if weight.endswith('.weight'):
            return weight.removesuffix('.weight').removeprefix('model.')
    # '/backbone/stages.0/stages.0.1/token_mixer/Add': a child of a list repeats the list's name.
    parts: list[str] = []
    for part in node.split('/')[1:-1]:
        if parts and part.startswith(f'{parts[-1]}.'):
            parts.pop()
        parts.append(part)
    return '.'.join(parts)
