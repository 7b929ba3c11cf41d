"""A machine for pickle's opcodes, which makes nothing but what it was given a maker for.

Python's ``Unpickler`` with a ``find_class`` of one's own is not enough: its other opcodes set attributes on any class
or function that was found, and reach around ``find_class``. Here an opcode without a method ends the reading.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pickletools import genops
from typing import IO, Any

from torch import Tensor

PYTHON_2 = '__builtin__.'
"""How protocol 2, which ``torch.save`` writes, begins the names of builtins."""


class RefusedError(pickle.UnpicklingError):
    """A file refers to something that is not listed."""

    def __init__(self, what: str) -> None:
        self.what = what.encode('unicode_escape').decode()[:120]
        super().__init__(f'it refers to {self.what}')


@dataclass(frozen=True, eq=False)
class Maker:
    """What stands for a class or function that a file may call.

    Args:
        make: Called with the arguments that the file gives, which may be anything.
    """

    make: Callable[..., Any]


@dataclass(frozen=True)
class Listing:
    """All that a file may refer to.

    Args:
        globals: For each full name a :class:`Maker`, or a harmless value.
        states: For each type of which a file may set an object's state, the function that checks and sets it.
    """

    globals: Mapping[str, Any]
    states: Mapping[type, Callable[[Any, Any], None]]


ACTIONS: dict[str, Callable[['Machine', Any], None]] = {}
"""What each opcode does, with the argument that stands behind it in the file."""


def opcode(*names: str) -> Callable:
    """The method below does what these opcodes say."""
    return lambda method: ACTIONS.update(dict.fromkeys(names, method)) or method


@dataclass
class Machine:
    """Makes the object of one pickle.

    Args:
        listing: What the pickle may refer to.
        persistent_load: Gives an object that is kept outside the pickle, for what the pickle calls it.
        budget: How many items and bytes the pickle's calls may copy in all. A short pickle could have one long list
            copied a million times.
    """

    listing: Listing
    persistent_load: Callable[[Any], Any]
    budget: int
    stack: list = field(default_factory=list)
    outer: list[list] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def load(self, stream: IO[bytes]) -> Any:
        """Read a stream up to the pickle's end.

        Raises:
            pickle.UnpicklingError: if the pickle asks for what no checkpoint needs.
            Exception: of any kind, if it is damaged.
        """
        for code, argument, _ in genops(stream):
            if code.name not in ACTIONS:
                raise pickle.UnpicklingError(f'no checkpoint needs the opcode {code.name}')
            ACTIONS[code.name](self, argument)
        return self.stack.pop()

    def spend(self, given: Any) -> None:
        """Count what a call may copy."""
        values = given if isinstance(given, tuple) else (given,)
        self.budget -= sum(len(value) for value in values if hasattr(value, '__len__') and type(value) is not Tensor)
        if self.budget < 0:
            raise pickle.UnpicklingError('it grows as it is read')

    @opcode('PROTO', 'STOP')
    def nothing(self, _: Any) -> None:
        pass

    # ------------------------------------------------------------------------------------------------- plain values
    @opcode('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINSTRING')
    def push(self, value: Any) -> None:
        self.stack.append(value)

    @opcode('NONE')
    def none(self, _: None) -> None:
        self.push(None)

    @opcode('NEWTRUE')
    def true(self, _: None) -> None:
        self.push(True)

    @opcode('NEWFALSE')
    def false(self, _: None) -> None:
        self.push(False)

    @opcode('BINPUT', 'LONG_BINPUT')
    def remember(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    @opcode('BINGET', 'LONG_BINGET')
    def recall(self, number: int) -> None:
        self.push(self.memo[number])

    # --------------------------------------------------------------------------------------------------- containers
    @opcode('MARK')
    def mark(self, _: None) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def filled(self, *types: type) -> Any:
        """The container that is being filled. Other types than these might do anything then."""
        if type(self.stack[-1]) not in types:
            raise pickle.UnpicklingError(f'it fills a {type(self.stack[-1]).__name__}')
        return self.stack[-1]

    @opcode('EMPTY_TUPLE')
    def empty_tuple(self, _: None) -> None:
        self.push(())

    @opcode('TUPLE')
    def tuple(self, _: None) -> None:
        items = self.since_mark()
        self.push((*items,))

    @opcode('TUPLE1')
    def tuple_1(self, _: None) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    @opcode('TUPLE2')
    def tuple_2(self, _: None) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    @opcode('TUPLE3')
    def tuple_3(self, _: None) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    @opcode('EMPTY_LIST')
    def empty_list(self, _: None) -> None:
        self.push([])

    @opcode('APPEND')
    def append(self, _: None) -> None:
        value = self.stack.pop()
        self.filled(list).append(value)

    @opcode('APPENDS')
    def extend(self, _: None) -> None:
        values = self.since_mark()
        self.filled(list).extend(values)

    @opcode('EMPTY_DICT')
    def empty_dict(self, _: None) -> None:
        self.push({})

    @opcode('SETITEM')
    def set_item(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.filled(dict, OrderedDict)[key] = value

    @opcode('SETITEMS')
    def set_items(self, _: None) -> None:
        items = self.since_mark()
        target = self.filled(dict, OrderedDict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key] = value

    # ------------------------------------------------------------------------------------- what could run something
    @opcode('GLOBAL')
    def look_up(self, name: str) -> None:
        name = name.replace(' ', '.', 1)  # a module and a name in it
        if name.startswith(PYTHON_2):
            name = f'builtins.{name.removeprefix(PYTHON_2)}'
        if name not in self.listing.globals:
            raise RefusedError(name)
        self.push(self.listing.globals[name])

    @opcode('REDUCE', 'NEWOBJ')
    def call(self, _: None) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        if type(maker) is not Maker or type(arguments) is not tuple:
            raise pickle.UnpicklingError(f'it calls a {type(maker).__name__}')
        self.spend(arguments)
        self.push(maker.make(*arguments))

    @opcode('BUILD')
    def set_state(self, _: None) -> None:
        state, value = self.stack.pop(), self.stack[-1]
        if type(value) not in self.listing.states:
            raise pickle.UnpicklingError(f'it sets the state of a {type(value).__name__}')
        self.spend(state)
        self.listing.states[type(value)](value, state)

    @opcode('BINPERSID')
    def load_persistent(self, _: None) -> None:
        self.push(self.persistent_load(self.stack.pop()))
