"""A reader of pickles that only makes plain data, in time and memory linear in their length.

Pickle is a small language whose instructions can call any function of any module. Python's own machine for it allocates
what an instruction promises before it looks whether the file is that long, and PyTorch's restricted one keeps its list
of permitted names per process. This one knows the instructions that data needs. A name in the file is looked up in a
table of ours and never imported; what the table does not hold is refused.
"""

from __future__ import annotations

import io
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# beyond what any training script saves, and small enough for whoever walks through the values by recursion
_MAX_DEPTH = 100
# how often values may be seen from different places, as a multiple of the pickle's length: otherwise a few bytes
# unfold to a tree of any size
_MAX_SHARING = 100
# each makes at most some 300 bytes, out of as little as one
_MAX_INSTRUCTIONS = 1 << 20
_MAX_INT_BYTES = 32  # states of random generators have up to 16
_MAX_READ = 1 << 26  # of one value; also of the list of entries of a zip archive, which takes ten times as much memory
_MAX_LINE = 1 << 16  # of the text instructions: names and numbers
# dictionaries take linear time with these: strings hash differently in every process, small integers to themselves
_KEYS = (str, bytes, int, float, bool, type(None))
_MAX_KEY = 1 << 60


class Malformed(ValueError):
    """Not a pickle, or one that no program wrote."""


class Refused(ValueError):
    """A pickle with something in it that is not data, or too large."""


class Name(NamedTuple):
    """A name of the file: "module.name". It stands for nothing."""

    name: str


class Record:
    """Stands for an object, or for the result of a call: the name called, the arguments and the state in the file."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple) -> None:
        self.name, self.args, self.state = name, args, None


Call = Callable[..., Any]


def run(file: io.BufferedIOBase, calls: Mapping[str, Call | None], find_storage: Callable[[Any], Any]) -> Any:
    """The value of the pickle at the position of `file`, which is left behind it.

    Args:
        file: gives no more than it holds when asked for more, as `io.BytesIO` does and files do not (see `Bounded`).
        calls: by name, the function of ours that is called with the arguments in the file; None makes a `Record`. What
            it raises of ValueError and TypeError is taken as the fault of the file.
        find_storage: the object for a persistent id.

    Raises:
        Malformed, Refused: with the reason.
    """
    machine = _Machine(calls, find_storage)
    start = file.tell()
    try:
        for _ in range(_MAX_INSTRUCTIONS):
            if machine.step(*_instruction(file)):
                break
        else:
            raise Refused(f"more than {_MAX_INSTRUCTIONS} instructions")
    except (Refused, Malformed):
        raise
    # of arguments that end early, and of senseless orders of instructions
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        place = file.tell() - start
        raise Malformed(f"its pickle is broken before byte {place} ({type(error).__name__})") from error
    if len(machine.stack) != 1 or machine.marks:
        raise Malformed("its pickle leaves more than one value")
    _check_shape(machine.stack[0], file.tell() - start)
    return machine.stack[0]


def _instruction(file: io.BufferedIOBase) -> tuple[str, Any]:
    """Name and argument of the next one."""
    opcode = pickletools.code2op.get(file.read(1).decode("latin-1"))
    if opcode is None:
        raise Malformed("its pickle is broken: an instruction that there is not")
    if opcode.name not in _KNOWN:
        raise Refused(f"instruction {opcode.name}")
    if opcode.name == "GLOBAL":  # whose reader in pickletools takes backslashes for escapes, and warns of them
        return opcode.name, [file.readline().removesuffix(b"\n").decode() for _ in range(2)]
    return opcode.name, opcode.arg and opcode.arg.reader(file)


class _Machine:
    """The stack and the memo while instructions are carried out one by one."""

    def __init__(self, calls: Mapping[str, Call | None], find_storage: Callable[[Any], Any]) -> None:
        self._calls, self._find_storage = calls, find_storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> bool:
        """Carry out an instruction; whether it is the last."""
        if name in _VALUES:
            if isinstance(argument, int) and argument.bit_length() > 8 * _MAX_INT_BYTES:
                raise Refused(f"a number of {argument.bit_length()} bits")
            self.stack.append(argument)
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        else:
            getattr(self, f"_{name.lower()}")(argument)
        return name == "STOP"

    def _take(self) -> Any:
        self._peek()
        return self.stack.pop()

    def _peek(self) -> Any:
        if self.marks and self.marks[-1] == len(self.stack):
            raise Malformed("its pickle reaches beyond a mark")
        return self.stack[-1]

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    # ---- the stack and the memo ----

    def _proto(self, _: int) -> None:
        pass

    _frame = _stop = _proto

    def _mark(self, _: None) -> None:
        self.marks.append(len(self.stack))

    def _pop(self, _: None) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def _pop_mark(self, _: None) -> None:
        self._since_mark()

    def _dup(self, _: None) -> None:
        self.stack.append(self._peek())

    def _binput(self, index: int) -> None:
        self._memo[index] = self._peek()

    _put = _long_binput = _binput

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._peek()

    def _binget(self, index: int) -> None:
        self.stack.append(self._memo[index])

    _get = _long_binget = _binget

    # ---- containers ----

    def _tuple(self, _: None) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _tuple1(self, _: None) -> None:
        self.stack.append((self._take(),))

    def _tuple2(self, _: None) -> None:
        last = self._take()
        self.stack.append((self._take(), last))

    def _tuple3(self, _: None) -> None:
        last, middle = self._take(), self._take()
        self.stack.append((self._take(), middle, last))

    def _list(self, _: None) -> None:
        self.stack.append(self._since_mark())

    def _frozenset(self, _: None) -> None:
        self.stack.append(frozenset(map(check_key, self._since_mark())))

    def _dict(self, _: None) -> None:
        values = self._since_mark()
        self.stack.append({})
        self._set(values)

    def _append(self, _: None) -> None:
        self._extend([self._take()])

    def _appends(self, _: None) -> None:
        self._extend(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._peek()
        if type(target) is not list:
            raise Malformed(f"its pickle appends to a {type(target).__name__}")
        target.extend(values)

    def _additems(self, _: None) -> None:
        values = self._since_mark()
        target = self._peek()
        if type(target) is not set:
            raise Malformed(f"its pickle adds to a {type(target).__name__}")
        target.update(map(check_key, values))

    def _setitem(self, _: None) -> None:
        value = self._take()
        self._set([self._take(), value])

    def _setitems(self, _: None) -> None:
        self._set(self._since_mark())

    def _set(self, values: list[Any]) -> None:
        target = self._peek()
        if not isinstance(target, dict) or len(values) % 2:
            raise Malformed(f"its pickle sets items of a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[check_key(key)] = value

    # ---- names and calls ----

    def _global(self, names: list[str]) -> None:
        self._name(*names)

    def _stack_global(self, _: None) -> None:
        name = self._take()
        self._name(self._take(), name)

    def _name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Malformed("its pickle has a name that is no text")
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # of Python 2
        full = f"{module}.{name}"
        if full not in self._calls:
            raise Refused(f"{full}, and no code is run from files")
        self.stack.append(Name(full))

    def _reduce(self, _: None) -> None:
        arguments = self._take()
        self._call(self._take(), arguments)

    _newobj = _reduce

    def _newobj_ex(self, _: None) -> None:
        if self._take():
            raise Refused("a call with arguments by name")
        self._reduce(None)

    def _call(self, function: Any, arguments: Any) -> None:
        if type(function) is not Name or type(arguments) is not tuple:
            raise Refused(f"a call of a {type(function).__name__}, which is no function")
        call = self._calls[function.name]
        self.stack.append(Record(function.name, arguments) if call is None else call(*arguments))

    def _build(self, _: None) -> None:
        state, target = self._take(), self._peek()
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, OrderedDict):  # attributes of dictionaries are dropped
            raise Refused(f"a state for a {type(target).__name__}")

    def _binpersid(self, _: None) -> None:
        self.stack.append(self._find_storage(self._take()))


# instructions whose value is in their argument
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# the others call functions by a further way, speak of objects outside of the file, or are of Python 1
_KNOWN = {*_VALUES, *_EMPTY, *_CONSTANTS} | {
    opcode.name for opcode in pickletools.opcodes if hasattr(_Machine, f"_{opcode.name.lower()}")
}


def check_key(value: Any) -> Any:
    """`value`, if it may be a key of a dictionary or in a set; else Refused."""
    if type(value) not in _KEYS or (type(value) is int and abs(value) >= _MAX_KEY):
        raise Refused(f"a {type(value).__name__} as key of a dictionary")
    return value


def _check_shape(root: Any, length: int) -> None:
    """Refused where `root` is nested too deeply, holds itself, or unfolds to a much larger tree than `length` bytes."""
    limit = _MAX_SHARING * length
    sizes: dict[int, int] = {}  # of finished values, by id; 0 while their parts are looked at
    stack: list[tuple[Any, Any]] = [(root, None)]
    while stack:
        value, parts = stack[-1]
        if parts is None:
            if sizes.get(id(value)) or not (parts := _parts(value)):
                stack.pop()
                continue
            if id(value) in sizes:
                raise Refused("a value that holds itself")
            if len(stack) > _MAX_DEPTH:
                raise Refused(f"values nested more than {_MAX_DEPTH} deep")
            sizes[id(value)] = 0
            stack[-1] = (value, iter(parts))
            parts = stack[-1][1]
        part = next(parts, _END)
        if part is not _END:
            stack.append((part, None))
            continue
        size = 1 + sum(sizes.get(id(each)) or 1 + _length(each) for each in _parts(value))
        if size > limit:
            raise Refused("values that hold each other many times over")
        sizes[id(value)] = size
        stack.pop()


_END = object()


def _parts(value: Any) -> list[Any] | tuple | set | frozenset:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, Record):
        return [*value.args, value.state]
    return value if isinstance(value, (list, tuple, set, frozenset)) and not isinstance(value, Name) else ()


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, bytearray)) else 0


class Bounded:
    """A file that is never asked for more than it has, nor for much at once, nor for endless lines."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self.tell, self.seek, self.seekable = file.tell, file.seek, file.seekable

    def read(self, count: int = -1) -> bytes:
        left = max(self.size - self._file.tell(), 0)
        count = left if count < 0 else min(count, left)
        if count > _MAX_READ:
            raise Refused(f"a single piece of {count} bytes")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(_MAX_LINE)
