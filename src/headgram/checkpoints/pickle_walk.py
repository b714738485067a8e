"""The machine that reads pickles, without what makes them dangerous: nothing is imported, and no call is made.

Its stack and memo hold plain values. Where a pickle would call something, they hold a description of the call. A subclass says
what may be described. Opcodes that plain data do not need are refused.
"""

from __future__ import annotations

import math
import pickletools
from dataclasses import dataclass
from typing import Any

from headgram.checkpoints.dtypes import BYTES

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = (
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING", "BINSTRING",
)  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MOST_AXES = 16
#: More than any memory holds.
_MOST_NUMBERS = 2**48
_MARK = object()
#: A value that says nothing of tensors.
OTHER = object()


@dataclass(frozen=True)
class Global:
    """A name that a pickle refers to: `module name`."""

    name: str


def dtype_of(name: str) -> str | None:
    """What torch calls the type of numbers that a name in a pickle means; None if it is the name of anything else."""
    module, _, what = name.partition(" ")
    return what if module == "torch" and what in BYTES else None


def are_sizes(values: Any) -> bool:
    """Whether a tensor may have such offsets, strides or pieces: a whole number for each of a few axes."""
    plain = isinstance(values, tuple) and len(values) <= _MOST_AXES
    return plain and all(type(value) is int and 0 <= value < _MOST_NUMBERS for value in values)


def is_shape(values: Any) -> bool:
    """Whether a tensor may have such a shape; NumPy and torch multiply what lies beside an axis of none, too."""
    return are_sizes(values) and math.prod(filter(None, values)) < _MOST_NUMBERS


class Walk:
    """The stack and the memo of a pickle. Tables keep only what lies under a text: no other key is ever hashed."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def known(self, name: str) -> Global:
        """A name that the pickle may refer to.

        Raises
        ------
        ValueError
            If it may not.
        """
        raise NotImplementedError

    def call(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        """What stands for the result of a call."""
        raise NotImplementedError

    def persistent(self, identity: Any) -> Any:
        """What stands for something outside the pickle."""
        raise ValueError("a reference to something outside of it")

    def build(self, target: Any, state: Any) -> None:
        """Take an object's attributes, such as the versions of a state dict's modules."""

    def new_table(self) -> dict[str, Any]:
        """An empty table."""
        return {}

    def new_list(self) -> Any:
        """What stands for an empty list; the values of one that is no Python list are forgotten."""
        return OTHER

    def entry(self, table: dict[str, Any], key: Any, value: Any) -> None:
        """Take an entry of a table."""
        if isinstance(key, str):
            if key in table:
                raise ValueError(f"the name {key!r:.200} twice")
            table[key] = value

    def run(self, pickled: bytes) -> Any:
        """The value of a whole pickle.

        Raises
        ------
        ValueError
            Says what it holds that it should not.
        """
        for opcode, argument, _ in pickletools.genops(pickled):
            self._step(opcode.name, argument)
        if len(self._stack) != 1:
            raise ValueError("an unfinished pickle")
        return self._stack[0]

    def _step(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self._stack.append(_MARK)
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._top()
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top()
            case "BINGET" | "LONG_BINGET":
                if argument not in self._memo:
                    raise ValueError("a reference to nothing")
                self._stack.append(self._memo[argument])
            case "GLOBAL":
                self._stack.append(self.known(argument))
            case "STACK_GLOBAL":
                what, module = self._pop(), self._pop()
                if not isinstance(what, str) or not isinstance(module, str):
                    raise ValueError("a name that is no text")
                self._stack.append(self.known(f"{module} {what}"))
            case "EMPTY_DICT":
                self._stack.append(self.new_table())
            case "EMPTY_LIST":
                self._stack.append(self.new_list())
            case "EMPTY_SET":
                self._stack.append(OTHER)
            case "TUPLE":
                self._stack.append(tuple(self._pop_mark()))
            case "APPEND":
                self._extend([self._pop()])
            case "APPENDS" | "ADDITEMS":
                self._extend(self._pop_mark())
            case "SETITEM":
                value, key = self._pop(), self._pop()
                self._set([key, value])
            case "SETITEMS":
                self._set(self._pop_mark())
            case "BINPERSID":
                self._stack.append(self.persistent(self._pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self._pop(), self._pop()
                if not isinstance(function, Global) or not isinstance(arguments, tuple):
                    raise ValueError("a call of what is no function")
                self._stack.append(self.call(function, arguments))
            case "BUILD":
                state = self._pop()
                self.build(self._top(), state)
            case _ if name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            case _ if name in _VALUES:
                self._stack.append(argument)
            case _ if name in _TUPLES:
                self._stack.append(tuple(reversed([self._pop() for _ in range(_TUPLES[name])])))
            case _:
                raise ValueError(f"the instruction {name}, which no table of tensors needs")

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise ValueError("a pickle that takes more than it holds")
        return self._stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        items = []
        while self._stack and self._stack[-1] is not _MARK:
            items.append(self._stack.pop())
        if not self._stack:
            raise ValueError("a pickle that takes more than it holds")
        self._stack.pop()
        return items[::-1]

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self._top(), list):
            self._top().extend(items)

    def _set(self, pairs: list[Any]) -> None:
        table = self._top()
        if len(pairs) % 2 or not (isinstance(table, dict) or table is OTHER):
            raise ValueError("entries of what is no table")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(table, dict):
                self.entry(table, key, value)
