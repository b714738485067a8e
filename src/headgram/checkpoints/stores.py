"""The tensors of a checkpoint's weight files, by name. Nothing is read before it is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor

from headgram.checkpoints.sources import Location
from headgram.errors import HeadgramError

if TYPE_CHECKING:
    from headgram.checkpoints.hub import RemoteLocation

#: What a weight may be stored as in safetensors, in that format's words.
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorStore(Protocol):
    """Tensors by name, as stored; a context manager, closed at the end."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in torch's order, `(out, in)` for a linear weight; costs no read of the data."""

    def dtype(self, name: str) -> str:
        """The stored precision in the format's own word, such as `BF16` or `Q4_K`."""

    def nbytes(self, name: str) -> int:
        """Bytes on disk."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Prepare to read these tensors soon; does something only where that is quicker than one by one."""

    def pin(self, names: Iterable[str]) -> str | None:
        """A digest that stands for the bytes of these tensors without reading them; None where only the bytes can tell."""

    def raw(self, name: str) -> memoryview:
        """The stored bytes."""

    def read(self, name: str) -> Tensor:
        """The tensor; stored precision, or float32 if the format is quantised."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


class SafetensorsStore:
    """One or several safetensors files."""

    def __init__(self, paths: Iterable[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._stack = ExitStack()
        self._home: dict[str, Any] = {}
        for path in paths:
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise HeadgramError(f"{path} is not a whole safetensors file ({error}): fetch it again") from None
            self._home.update(dict.fromkeys(file.keys(), file))

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._home[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return str(self._home[name].get_slice(name).get_dtype())

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self._item_size(name)

    def prefetch(self, names: Iterable[str]) -> None:
        pass

    def pin(self, names: Iterable[str]) -> str | None:
        return None

    def raw(self, name: str) -> memoryview:
        return memoryview(self.read(name).contiguous().view(torch.uint8).numpy()).cast("B")

    def read(self, name: str) -> Tensor:
        self._item_size(name)
        tensor: Tensor = self._home[name].get_tensor(name)
        return tensor

    def _item_size(self, name: str) -> int:
        if self.dtype(name) not in SAFETENSORS_DTYPES:
            raise HeadgramError(
                f"tensor {name} is stored as {self.dtype(name)}, a quantised format that headgram does not read yet"
            )
        return SAFETENSORS_DTYPES[self.dtype(name)].itemsize

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


class GgufStore:
    """One GGUF file, or the parts of a split one. Also holds the metadata, which names the architecture."""

    def __init__(self, paths: Iterable[Path]) -> None:
        from gguf import GGUFReader

        self._tensors: dict[str, Any] = {}
        self.metadata: dict[str, Any] = {}
        for path in paths:
            try:
                reader = GGUFReader(path)
                for field in reader.fields.values():
                    if not field.name.startswith("tokenizer."):
                        self.metadata.setdefault(field.name, field.contents())
            except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError) as error:
                raise HeadgramError(f"{path} is not a whole GGUF file ({error}): fetch it again") from None
            self._tensors.update({tensor.name: tensor for tensor in reader.tensors})

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))  # GGUF counts from the fastest axis

    def dtype(self, name: str) -> str:
        return str(self._tensors[name].tensor_type.name)

    def nbytes(self, name: str) -> int:
        return int(self._tensors[name].n_bytes)

    def prefetch(self, names: Iterable[str]) -> None:
        pass

    def pin(self, names: Iterable[str]) -> str | None:
        return None

    def raw(self, name: str) -> memoryview:
        return memoryview(self._tensors[name].data.view("uint8").reshape(-1))

    def read(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        stored = self._tensors[name]
        kind = stored.tensor_type.name
        if kind == "BF16":
            return torch.from_numpy(stored.data.view("int16").copy()).view(torch.bfloat16).reshape(self.shape(name))
        if kind in ("F16", "F32", "F64"):
            return torch.from_numpy(stored.data.copy()).reshape(self.shape(name))
        try:
            return torch.from_numpy(dequantize(stored.data, stored.tensor_type)).reshape(self.shape(name))
        except NotImplementedError:
            raise HeadgramError(f"tensor {name} is stored as {kind}, which the gguf library cannot dequantise") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._tensors.clear()


def open_store(location: Location | RemoteLocation) -> TensorStore:
    """The store of a located source, by its format and whether it is here or at the hub.

    Raises
    ------
    HeadgramError
        If a file is not what its format asks for.
    """
    if not isinstance(location, Location):
        from headgram.checkpoints.remote import RemoteSafetensorsStore

        return RemoteSafetensorsStore(location)
    paths = [location.path(name) for name in location.weights]
    return GgufStore(paths) if location.format == "gguf" else SafetensorsStore(paths)
