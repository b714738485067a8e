"""The table of tensors in a torch pickle, read without unpickling it: its opcodes are walked, and no call in it is made.

Torch's `weights_only` loader also makes tensors that no file holds: `torch.Tensor(18, 18)` is memory that was never written.
So a tensor is taken here only as a description of a piece of a stored record. Opcodes and names that `torch.save` does not
need for a table of tensors are refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: Storage types by their names in a pickle.
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
#: Tensors of these do not lie in the file as plain numbers, or not at all.
_OTHER_TENSORS = {
    "torch Tensor": "a tensor that was never written",
    "torch._utils _rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no numbers",
    "torch._utils _rebuild_nested_tensor": "a nested tensor",
    "torch._utils _rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils _rebuild_qtensor": "a quantised tensor of torch's own kind",
    "torch._utils _rebuild_wrapper_subclass": "a tensor of a subclass",
    "torch._tensor _rebuild_from_type_v2": "a tensor of a subclass",
    "torch._utils _rebuild_device_tensor_from_numpy": "a tensor of another device",
    "torch._utils _rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
}
_TABLES = ("collections OrderedDict", "collections Counter", "collections defaultdict")
#: What training checkpoints hold beside tensors; it says nothing of weights.
_INERT = ("torch Size", "torch device", "__builtin__ set", "builtins set", "__builtin__ complex", "builtins complex")
_MOST_AXES = 16
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING", "BINSTRING")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()
_OTHER = object()  # a value that says nothing of weights


@dataclass(frozen=True)
class StoredTensor:
    """A strided piece of a record: offset, shape and strides count elements.

    Attributes
    ----------
    record
        Name of the record in the archive's `data` folder.
    record_bytes
        Length that the pickle states of it.
    """

    record: str
    record_bytes: int
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def elements(self) -> range:
        """The elements of the record from the first to the last that belong to the tensor."""
        if 0 in self.shape:
            return range(0)
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return range(self.offset, self.offset + last + 1)


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    record: str
    dtype: torch.dtype
    numel: int


def read_table(pickled: bytes) -> dict[str, StoredTensor]:
    """The tensors of a pickled table, by name; what else the table holds is left out.

    Raises
    ------
    ValueError
        Says what the pickle holds that is no stored tensor.
    """
    table = _Walk().run(pickled)
    if not isinstance(table, Mapping):
        raise ValueError("no table of tensors")
    return {name: value for name, value in table.items() if isinstance(value, StoredTensor)}


class _Walk:
    """The stack and the memo of a pickle. Tables keep only what lies under a text: no other key is ever hashed."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
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
                self._stack.append(_known(argument))
            case "EMPTY_DICT":
                self._stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                self._stack.append(_OTHER)
            case "TUPLE":
                self._stack.append(tuple(self._pop_mark()))
            case "APPEND":
                self._pop()
            case "APPENDS" | "ADDITEMS":
                self._pop_mark()
            case "SETITEM":
                value, key = self._pop(), self._pop()
                self._set([key, value])
            case "SETITEMS":
                self._set(self._pop_mark())
            case "BINPERSID":
                self._stack.append(_storage(self._pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self._pop(), self._pop()
                self._stack.append(_call(function, arguments))
            case "BUILD":
                self._pop()  # attributes, such as the versions of a state dict's modules
                if isinstance(self._top(), StoredTensor):
                    raise ValueError("a tensor that is changed after it was read")
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

    def _set(self, pairs: list[Any]) -> None:
        table = self._top()
        if len(pairs) % 2 or not (isinstance(table, dict) or table is _OTHER):
            raise ValueError("entries of what is no table")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(table, dict) and isinstance(key, str):
                if key in table:
                    raise ValueError(f"the name {key!r:.200} twice")
                table[key] = value


def _known(name: str) -> _Global:
    """A name that may be called or referred to; what is called is described, never run."""
    if name in _OTHER_TENSORS:
        raise ValueError(f"{_OTHER_TENSORS[name]} ({name.replace(' ', '.')})")
    module, _, what = name.partition(" ")
    is_dtype = module == "torch" and isinstance(vars(torch).get(what), torch.dtype)
    is_storage = (module == "torch" and what in _STORAGES) or (module, what) == ("torch.storage", "UntypedStorage")
    if is_dtype or is_storage or name in _TABLES or name in _INERT or name in _REBUILDERS:
        return _Global(name)
    raise ValueError(f"{name.replace(' ', '.')!r:.200}, which is more than tensors")


def _storage(identity: Any) -> _Storage:
    match identity:
        case ("storage", _Global(kind), str(record), str(location), int(numel)) if numel >= 0 and location != "meta":
            what = kind.partition(" ")[2]
            if what in _STORAGES or what == "UntypedStorage":
                return _Storage(record, _STORAGES.get(what, torch.uint8), numel)
    raise ValueError("a storage that is not described as torch does")


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise ValueError("a call of what is no function")
    if function.name in _TABLES:
        if function.name.endswith("OrderedDict") and arguments:
            raise ValueError("a table that is made of another")
        return {}
    if function.name in _INERT:
        return _OTHER
    if function.name in _REBUILDERS:
        return _REBUILDERS[function.name](*arguments[:8])
    raise ValueError(f"a call of {function.name.replace(' ', '.')}")


def _strided(storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None) -> StoredTensor:
    if not isinstance(storage, _Storage) or not _sizes((offset,)) or not _sizes(shape) or not _sizes(stride):
        raise ValueError("a tensor with a storage, an offset, a shape or strides that no tensor has")
    if len(shape) != len(stride):
        raise ValueError("a tensor with other strides than axes")
    stored_bytes = storage.numel * storage.dtype.itemsize
    tensor = StoredTensor(storage.record, stored_bytes, dtype or storage.dtype, offset, shape, stride)
    count = 1
    for size in shape:
        count *= size
    if max(count, tensor.elements.stop) * tensor.dtype.itemsize > stored_bytes:
        raise ValueError(f"a tensor of shape {shape} that is larger than what is stored of it")
    return tensor


def _sizes(values: Any) -> bool:
    plain = isinstance(values, tuple) and len(values) <= _MOST_AXES
    return plain and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _rebuild(storage: Any = None, offset: Any = None, shape: Any = None, stride: Any = None, *more: Any) -> StoredTensor:
    if len(more) > 2 and more[2]:
        raise ValueError("a tensor that is stored negated or conjugated")
    return _strided(storage, offset, shape, stride)


def _rebuild_typed(storage: Any = None, offset: Any = None, shape: Any = None, stride: Any = None, *more: Any) -> StoredTensor:
    if len(more) < 3 or not isinstance(more[2], _Global) or (len(more) > 3 and more[3]):
        raise ValueError("a tensor without a type, or one that is stored negated or conjugated")
    dtype = vars(torch).get(more[2].name.removeprefix("torch "))
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor without a type")
    return _strided(storage, offset, shape, stride, dtype)


def _rebuild_parameter(tensor: Any = None, *more: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise ValueError("a parameter without a tensor")
    return tensor


_REBUILDERS: dict[str, Callable[..., StoredTensor]] = {
    "torch._utils _rebuild_tensor": _rebuild,
    "torch._utils _rebuild_tensor_v2": _rebuild,
    "torch._utils _rebuild_tensor_v3": _rebuild_typed,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "torch._utils _rebuild_parameter_with_state": _rebuild_parameter,
}
