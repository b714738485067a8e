"""The table of tensors in a torch pickle, read without unpickling it: see `headgram.checkpoints.pickle_walk`.

Torch's `weights_only` loader also makes tensors that no file holds: `torch.Tensor(18, 18)` is memory that was never written.
So a tensor is taken here only as a description of a piece of a stored record. Opcodes and names that `torch.save` does not
need for a table of tensors are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from headgram.checkpoints.dtypes import BYTES
from headgram.checkpoints.pickle_walk import OTHER, Global, Walk, are_sizes, dtype_of, is_shape

#: What torch calls the numbers of a storage, by its name in a pickle.
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
#: Tensors of these do not lie in the file as plain numbers, or not at all.
_OTHER_TENSORS = {
    "torch Tensor": "a tensor that was never written",
    "torch._utils _rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no numbers",
    "torch._utils _rebuild_nested_tensor": "a nested tensor",
    "torch._utils _rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils _rebuild_qtensor": "a quantised tensor of torch's own kind",
    "torch._utils _rebuild_wrapper_subclass": "a tensor of a subclass",
    "torch._tensor _rebuild_from_type_v2": "a tensor of a subclass, or with attributes of its own",
    "torch._utils _rebuild_device_tensor_from_numpy": "a tensor of another device",
    "torch._utils _rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
}
_TABLES = ("collections OrderedDict", "collections Counter", "collections defaultdict")
#: What training checkpoints hold beside tensors; it says nothing of weights.
_INERT = (
    "torch Size", "torch device", "__builtin__ set", "builtins set", "__builtin__ complex", "builtins complex",
    "argparse Namespace", "pathlib PosixPath", "pathlib PurePosixPath",
    "numpy dtype", "numpy.core.multiarray scalar", "numpy._core.multiarray scalar", "_codecs encode",
)  # fmt: skip
#: Far more than any checkpoint has; tables may hold each other many times over.
_MOST_ENTRIES = 1_000_000
_MOST_TABLES = 10_000
_LONGEST_PREFIX = 1_000


@dataclass(frozen=True)
class StoredTensor:
    """A strided piece of a record: offset, shape and strides count elements.

    Attributes
    ----------
    record
        Name of the record in the archive's `data` folder.
    record_bytes
        Length that the pickle states of it.
    dtype
        Torch's name of the type of its numbers.
    """

    record: str
    record_bytes: int
    dtype: str
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

    def narrowed(self, axis: int, start: int, stop: int) -> StoredTensor:
        """Some of its rows, or what an axis counts."""
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return replace(self, offset=self.offset + start * self.stride[axis], shape=shape)


@dataclass(frozen=True)
class _Storage:
    record: str
    dtype: str
    numel: int


def read_tensors(pickled: bytes) -> dict[str, StoredTensor]:
    """The tensors of a pickled table, by name, and of the tables in it: `state_dict.NAME` is `NAME` in `state_dict`.

    What else the tables hold is left out.

    Raises
    ------
    ValueError
        Says what the pickle holds that is no stored tensor.
    """
    table = _Descriptions().run(pickled)
    if not isinstance(table, Mapping):
        raise ValueError("no table of tensors")
    tensors: dict[str, StoredTensor] = {}
    waiting: list[tuple[str, Mapping[str, Any]]] = [("", table)]
    entries = 0
    for prefix, inner in waiting:
        entries += len(inner)
        if len(waiting) > _MOST_TABLES or entries > _MOST_ENTRIES or len(prefix) > _LONGEST_PREFIX:
            raise ValueError("more tables and tensors than any checkpoint has")
        for name, value in inner.items():
            if isinstance(value, StoredTensor):
                if prefix + name in tensors:
                    raise ValueError(f"the name {prefix + name!r:.200} twice")
                tensors[prefix + name] = value
            elif isinstance(value, Mapping):
                waiting.append((f"{prefix}{name}.", value))
    return tensors


def read_tensor(pickled: bytes) -> StoredTensor:
    """The one tensor that a pickle holds.

    Raises
    ------
    ValueError
        If it is another thing.
    """
    tensor = _Descriptions().run(pickled)
    if not isinstance(tensor, StoredTensor):
        raise ValueError("no single tensor")
    return tensor


class _Descriptions(Walk):
    """Describes tensors and storages."""

    def known(self, name: str) -> Global:
        """What is called is described, never run."""
        if name in _OTHER_TENSORS:
            raise ValueError(f"{_OTHER_TENSORS[name]} ({name.replace(' ', '.')})")
        module, _, what = name.partition(" ")
        is_storage = (module == "torch" and what in _STORAGES) or (module, what) == ("torch.storage", "UntypedStorage")
        if dtype_of(name) or is_storage or name in _TABLES or name in _INERT or name in _REBUILDERS:
            return Global(name)
        raise ValueError(f"{name.replace(' ', '.')!r:.200}, which is more than tensors")

    def call(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        if function.name in _TABLES:
            if function.name.endswith("OrderedDict") and arguments:
                raise ValueError("a table that is made of another")
            return {}
        if function.name in _INERT:
            return OTHER
        if function.name in _REBUILDERS:
            return _REBUILDERS[function.name](*arguments[:8])
        raise ValueError(f"a call of {function.name.replace(' ', '.')}")

    def persistent(self, identity: Any) -> Any:
        match identity:
            case ("storage", Global(kind), str(record), str(location), int(numel)) if numel >= 0 and location != "meta":
                what = kind.partition(" ")[2]
                if what in _STORAGES or what == "UntypedStorage":
                    return _Storage(record, _STORAGES.get(what, "uint8"), numel)
        raise ValueError("a storage that is not described as torch does")

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, StoredTensor):
            raise ValueError("a tensor that is changed after it was read")


def _strided(storage: Any, offset: Any, shape: Any, stride: Any, dtype: str | None = None) -> StoredTensor:
    if not isinstance(storage, _Storage) or not are_sizes((offset,)) or not is_shape(shape) or not are_sizes(stride):
        raise ValueError("a tensor with a storage, an offset, a shape or strides that no tensor has")
    if len(shape) != len(stride):
        raise ValueError("a tensor with other strides than axes")
    stored_bytes = storage.numel * BYTES[storage.dtype]
    tensor = StoredTensor(storage.record, stored_bytes, dtype or storage.dtype, offset, shape, stride)
    if max(math.prod(shape), tensor.elements.stop) * BYTES[tensor.dtype] > stored_bytes:
        raise ValueError(f"a tensor of shape {shape} that is larger than what is stored of it")
    return tensor


def _rebuild(storage: Any = None, offset: Any = None, shape: Any = None, stride: Any = None, *more: Any) -> StoredTensor:
    if len(more) > 2 and more[2]:
        raise ValueError("a tensor that is stored negated or conjugated")
    return _strided(storage, offset, shape, stride)


def _rebuild_typed(storage: Any = None, offset: Any = None, shape: Any = None, stride: Any = None, *more: Any) -> StoredTensor:
    if len(more) < 3 or not isinstance(more[2], Global) or (len(more) > 3 and more[3]):
        raise ValueError("a tensor without a type, or one that is stored negated or conjugated")
    dtype = dtype_of(more[2].name)
    if dtype is None:
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
