"""A pickle read as data: what it would call and which tensors it holds. Nothing is called, and torch is not needed."""

from __future__ import annotations

import math
import pickletools
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from rprune.errors import InputError, printable

DTYPES = {
    "FloatStorage": ("float32", 4), "DoubleStorage": ("float64", 8), "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2), "LongStorage": ("int64", 8), "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2), "CharStorage": ("int8", 1), "ByteStorage": ("uint8", 1), "BoolStorage": ("bool", 1),
}  # fmt: skip
"""torch's names of storages: type and bytes of an entry."""
WIDTHS = dict(DTYPES.values())
"""Bytes of an entry by type."""

_REBUILD = ("_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_tensor")
_NUMBERS = (
    "Bool",
    "Float16",
    "Float32",
    "Float64",
    *(f"{kind}{n}" for kind in ("Int", "UInt") for n in (8, 16, 32, 64)),
)
NUMPY = frozenset(
    {"numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
    | {f"numpy.dtypes.{name}DType" for name in _NUMBERS}
)
PATHS = frozenset(
    f"{module}.{kind}Path"
    for module in ("pathlib", "pathlib._local")
    for kind in ("", "Posix", "Windows", "Pure", "PurePosix", "PureWindows")
)
HARMLESS = NUMPY | PATHS | {"argparse.Namespace", "types.SimpleNamespace", "collections.defaultdict"}
"""What training scripts put beside the weights, and nothing but stores what it is given."""

SAFE_GLOBALS = HARMLESS | frozenset(
    {"collections.OrderedDict", "collections.Counter", "_codecs.encode", "torch.Size", "torch.device"}
    | {"builtins.set", "builtins.int", "builtins.float", "builtins.list", "builtins.dict", "builtins.complex"}
    | {"torch.nn.parameter.Parameter", "torch.storage.UntypedStorage"}
    | {f"torch._utils.{name}" for name in _REBUILD}
    | {f"torch.{name}" for name in DTYPES}
    | {f"torch.{name}" for name, _ in DTYPES.values()}
)
"""All that a checkpoint may name. Anything else in a pickle is somebody's code."""


@dataclass(frozen=True)
class Global:
    """A name that the pickle would import."""

    name: str


@dataclass(frozen=True, eq=False)
class Persistent:
    """What lies outside the pickle: torch's storages."""

    id: Any


@dataclass(eq=False)
class Call:
    """An object that the pickle would make by calling something, with what is put into it afterwards."""

    function: Any
    arguments: Any
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor by what is said of it: where its numbers begin (``offset``) and how they lie (``stride``), in entries.

    ``key`` names its storage, which holds ``entries`` of them.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    key: str
    entries: int

    @property
    def reach(self) -> int:
        """Entries of the storage up to the tensor's last one."""
        if 0 in self.shape:
            return 0
        return 1 + self.offset + sum((side - 1) * step for side, step in zip(self.shape, self.stride, strict=True))

    @property
    def fits(self) -> bool:
        """Whether it lies in its storage and, however it is laid, is not larger than that."""
        return max(math.prod(self.shape), self.reach) <= self.entries


@dataclass(frozen=True, eq=False)
class Pickle:
    """``globals``: the names that it would import, the hidden ones too; ``tensors``: every one that it describes."""

    root: Any
    globals: frozenset[str]
    tensors: tuple[StoredTensor, ...]

    @property
    def unsafe(self) -> list[str]:
        return sorted(self.globals - SAFE_GLOBALS)


def read_pickle(file: IO[bytes] | Any, what: str) -> Pickle:
    """The next pickle of a binary file in memory or mapped into it, which is left behind its end.

    Raises InputError when it is damaged, or a tensor in it is larger than what is stored.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(file):
            machine.step(opcode.name, argument)
        root = machine.stack.pop()
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError, RecursionError) as error:
        reason = printable(str(error)) or type(error).__name__
        raise InputError(f"{what} has a damaged pickle: {reason}", "write the file again") from None
    return Pickle(root, frozenset(machine.globals), tuple(machine.tensors))


class _Machine:
    """Python's pickle machine, over stand-ins."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.globals: set[str] = set()
        self.tensors: list[StoredTensor] = []

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP" | "READONLY_BUFFER":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._marked()
            case "DUP":
                stack.append(stack[-1])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                stack.append({"TUPLE": (), "LIST": [], "DICT": {}, "SET": []}[name.removeprefix("EMPTY_")])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                if len(stack) < count:
                    raise IndexError("a tuple of what is not there")
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "LIST" | "FROZENSET":
                stack.append(self._marked())
            case "DICT":
                stack.append(_pairs(self._marked()))
            case "APPEND":
                value = stack.pop()
                self._extend([value])
            case "APPENDS" | "ADDITEMS":
                self._extend(self._marked())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._update([key, value])
            case "SETITEMS":
                self._update(self._marked())
            case "GLOBAL" | "INST":
                found = self._global(*str(argument).split(" ", 1))
                stack.append(found if name == "GLOBAL" else Call(found, tuple(self._marked())))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._global(module, attribute))
            case "EXT1" | "EXT2" | "EXT4":
                stack.append(self._global("<extension>", str(argument)))
            case "OBJ":
                function, *arguments = self._marked()
                stack.append(Call(function, tuple(arguments)))
            case "NEWOBJ_EX":
                named, plain, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(Call(function, (plain, named)))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._called(function, arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Call):
                    stack[-1].state = state
            case "PERSID" | "BINPERSID":
                stack.append(Persistent(argument if name == "PERSID" else stack.pop()))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[int(argument)] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[int(argument)])
            case "NEXT_BUFFER":
                raise ValueError("its data lies elsewhere")
            case _:  # all others push what stands in the opcode
                stack.append(argument)

    def _marked(self) -> list[Any]:
        place = self.marks.pop()
        found = self.stack[place:]
        del self.stack[place:]
        return found

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)

    def _update(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        table = target.items if isinstance(target, Call) else target
        if not isinstance(table, dict):
            raise TypeError("an item for what is no table")
        table |= _pairs(flat)

    def _global(self, module: Any, attribute: Any) -> Global:
        known = isinstance(module, str) and isinstance(attribute, str)
        # the names of Python 2, which protocol 2 still writes
        found = Global(printable(f"{IMPORT_MAPPING.get(module, module)}.{attribute}") if known else "<hidden>")
        self.globals.add(found.name)
        return found

    def _called(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case Global("collections.OrderedDict"), ():
                return {}
            case Global("collections.OrderedDict"), ([*pairs],):
                return _pairs([value for pair in pairs for value in pair])
            case Global("torch._utils._rebuild_parameter"), (StoredTensor() as tensor, *_):
                return tensor
            case Global("torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor"), (
                Persistent(("storage", Global(kind), str(key), _, int(entries), *_)), int(offset), shape, stride, *_,
            ):  # fmt: skip
                found = _stored(kind, key, entries, offset, shape, stride)
                self.tensors.append(found)
                return found
        return Call(function, arguments)


def _stored(kind: str, key: str, entries: int, offset: int, shape: Any, stride: Any) -> StoredTensor:
    sizes = shape.arguments[0] if isinstance(shape, Call) else shape  # a torch.Size
    dtype, _ = DTYPES.get(kind.removeprefix("torch."), (kind, 0))
    whole = (*sizes, *stride, offset, entries)
    if not all(type(number) is int and number >= 0 for number in whole) or len(sizes) != len(stride):
        raise ValueError("a tensor's shape is none")
    found = StoredTensor(dtype, tuple(sizes), tuple(stride), offset, key, entries)
    if not found.fits:
        raise ValueError(f"a tensor of shape {found.shape} in a storage of {entries} entries"[:100])
    return found


def _pairs(flat: list[Any]) -> dict[Any, Any]:
    """Keys that are no plain values stand for themselves: hashing them could take for ever."""
    plain = (str, int, float, bytes, type(None))
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return {key if isinstance(key, plain) else Persistent(key): value for key, value in pairs}


def leaves(value: Any, depth: int = 20, seen: set[int] | None = None) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors in nested tables and objects, by names with dots, as state_dict has them; no table is gone into twice."""
    seen = set() if seen is None else seen
    if isinstance(value, Call):
        value = value.state if isinstance(value.state, dict) else value.items
    if not isinstance(value, dict) or not depth or id(value) in seen:
        return
    seen.add(id(value))
    parts = [value.get(key) for key in ("_parameters", "_buffers", "_modules")]
    if all(isinstance(part, dict) for part in parts):
        value = {key: entry for part in parts if part for key, entry in part.items()}
    for key, entry in value.items():
        if isinstance(entry, StoredTensor):
            yield str(key), entry
        elif isinstance(entry, dict | Call):
            for name, tensor in leaves(entry, depth - 1, seen):
                yield f"{key}.{name}", tensor
