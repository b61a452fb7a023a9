"""The pickles of the Python archives of CIFAR: dicts of bytes, numbers, lists and uint8 arrays, and nothing else.

They are read by a machine of our own. `pickle.Unpickler` is no choice, whatever its `find_class` lets through: NumPy's
`dtype` and `ndarray` can be told to take bytes of the file for object pointers, and opcodes as LONG_BINPUT allocate
what they claim. Here no code is called that a pickle names, an opcode makes at most one small object or a copy of its
own argument, and their number is limited, so memory stays in proportion to the file.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

OPCODES = 300_000  # an official batch of 10,000 images of CIFAR-10 has about 40,000


class PickleError(Exception):
    """What a pickle has that none of these archives has."""


class _Name(Enum):
    """What a pickle may ask for, and the one type of numbers that arrays may have."""

    RECONSTRUCT = "numpy.core.multiarray _reconstruct"
    NDARRAY = "numpy ndarray"
    DTYPE = "numpy dtype"
    UINT8 = "dtype('uint8')"


_NAMES = {name.value: name for name in (_Name.RECONSTRUCT, _Name.NDARRAY, _Name.DTYPE)} | {
    "numpy._core.multiarray _reconstruct": _Name.RECONSTRUCT
}


@dataclass
class _Array:
    """An array that is being rebuilt: BUILD fills it in."""

    values: np.ndarray | None = None


_MARK = object()


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if not self.stack:
            raise PickleError("it takes more from the stack than there is")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise PickleError(f"it adds to a {kind.__name__.strip('_').lower()} where there is none")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.pop()) is not _MARK:
            items.append(item)
        items.reverse()
        return items

    def tuple_of(self, n: int) -> None:
        items = [self.pop() for _ in range(n)]
        self.stack.append(tuple(reversed(items)))

    def add(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2 or not all(type(key) is bytes for key in items[::2]):
            raise PickleError("its keys are not all bytes, as Python 2 wrote them")
        target.update(zip(items[::2], items[1::2], strict=True))

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise PickleError(f"it recalls object {index}, which it never kept")
        self.stack.append(self.memo[index])

    def keep(self, index: int) -> None:
        self.memo[index] = self.stack[-1] if self.stack else self.pop()

    def name(self, name: str) -> None:
        if name not in _NAMES:
            raise PickleError(f"it asks for {name.replace(' ', '.')[:80]}")
        self.stack.append(_NAMES[name])

    def stack_name(self, _: None) -> None:
        name, module = self.pop(), self.pop()
        self.name(f"{module} {name}" if type(name) is type(module) is str else "something that is no name")

    def reduce(self, _: None) -> None:
        arguments, called = self.pop(), self.pop()
        first = arguments[0] if type(arguments) is tuple and arguments else None
        if called is _Name.RECONSTRUCT and first is _Name.NDARRAY:
            self.stack.append(_Array())
        elif called is _Name.DTYPE and type(first) in (bytes, str) and first in (b"u1", "u1"):
            self.stack.append(_Name.UINT8)
        else:
            raise PickleError("it makes something else than a uint8 array")

    def build(self, _: None) -> None:
        state = self.pop()
        if self.stack and self.stack[-1] is _Name.UINT8 and type(state) is tuple:
            return  # byte order and alignment: one byte has neither
        array = self.top(_Array)
        if type(state) is not tuple or len(state) != 5:
            raise PickleError("the state of its array is none that NumPy writes")
        _, shape, dtype, columns_first, data = state
        sizes_are_plain = type(shape) is tuple and all(type(n) is int and n > 0 for n in shape[:4])
        if dtype is not _Name.UINT8 or type(data) is not bytes or not sizes_are_plain or not 1 <= len(shape) <= 4:
            raise PickleError("its array is not one of uint8 with one to four dimensions")
        if math.prod(shape) != len(data):
            raise PickleError(f"its array has {len(data):,} bytes, which is not what its shape says")
        array.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if columns_first is True else "C")


_PLAIN = ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OPCODES: dict[str, Callable[[_Machine, Any], object]] = (
    {name: lambda machine, argument: machine.stack.append(argument) for name in _PLAIN}
    | {name: lambda machine, _, value=value: machine.stack.append(value) for name, value in _CONSTANTS.items()}
    | {name: lambda machine, _, n=n: machine.tuple_of(n) for name, n in _TUPLES.items()}
    | {
        "PROTO": lambda machine, _: None,
        "FRAME": lambda machine, _: None,
        # Text of Python 2 is bytes; `pickletools` reads it as Latin-1, in which every byte is a character.
        "BINSTRING": lambda machine, text: machine.stack.append(text.encode("latin-1")),
        "SHORT_BINSTRING": lambda machine, text: machine.stack.append(text.encode("latin-1")),
        "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
        "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
        "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
        "APPEND": lambda machine, _: machine.add([machine.pop()]),
        "APPENDS": lambda machine, _: machine.add(machine.since_mark()),
        "SETITEM": lambda machine, _: machine.set([machine.pop(), machine.pop()][::-1]),
        "SETITEMS": lambda machine, _: machine.set(machine.since_mark()),
        "BINPUT": _Machine.keep,
        "LONG_BINPUT": _Machine.keep,
        "MEMOIZE": lambda machine, _: machine.keep(len(machine.memo)),
        "BINGET": _Machine.recall,
        "LONG_BINGET": _Machine.recall,
        "GLOBAL": _Machine.name,
        "STACK_GLOBAL": _Machine.stack_name,
        "REDUCE": _Machine.reduce,
        "BUILD": _Machine.build,
    }
)
"""What protocols 2 to 4 write for such dicts."""


def unpickle(data: bytes, opcodes: int = OPCODES) -> dict[bytes, Any]:
    """The dict that `data` is a pickle of, its arrays as NumPy arrays; `PickleError` for everything else, and for more
    than so many opcodes."""
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name == "STOP":
                break
            if count == opcodes:
                raise PickleError(f"it has more than {opcodes:,} opcodes")
            if opcode.name not in _OPCODES:
                raise PickleError(f"it has the opcode {opcode.name}, which these archives do not need")
            _OPCODES[opcode.name](machine, argument)
    except ValueError as error:  # of `pickletools`: cut off, or no opcode
        raise PickleError(" ".join(str(error).split())[:200]) from error
    value = machine.pop()
    if type(value) is not dict:
        raise PickleError(f"it holds a {type(value).__name__.strip('_')}, a dict is expected")
    return {key: item.values if isinstance(item, _Array) else item for key, item in value.items()}
