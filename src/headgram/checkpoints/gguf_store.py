"""GGUF files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from headgram.checkpoints.gguf_check import LONG, array_bytes, check_header
from headgram.checkpoints.homes import Homes
from headgram.checkpoints.stores import TensorStore
from headgram.errors import HeadgramError

if TYPE_CHECKING:
    from gguf import GGUFReader

#: A tokenizer's metadata, and the header's own counts, which the library shows as if they were metadata.
_NOT_ASKED = ("tokenizer.", "GGUF.")
#: As which the gguf library reports a file that it cannot read.
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, OSError, ArithmeticError)


class GgufStore(TensorStore):
    """One GGUF file, or the parts of a split one. Also holds the metadata, which names the architecture."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        reader_type = _reader_type()
        parts: dict[str, dict[str, Any]] = {}
        self.metadata: dict[str, Any] = {}
        for name, path in paths.items():
            check_header(path)
            try:
                reader = reader_type(path)
                if reader.byte_order == "S":
                    raise HeadgramError(f"{path} is in the other byte order than this machine: convert it")
                for field in reader.fields.values():
                    if not field.name.startswith(_NOT_ASKED) and field.data:  # not of an array without elements
                        self._add(field.name, field.contents(), path)
            except _DAMAGE as error:
                raise HeadgramError(f"{path} is not a whole GGUF file ({error}): fetch it again") from None
            parts[name] = {tensor.name: tensor for tensor in reader.tensors}
        self._tensors = Homes(parts)

    def _add(self, key: str, value: Any, path: Path) -> None:
        """Take metadata of a part; parts may repeat it, but differ only in which part they are."""
        if self.metadata.setdefault(key, value) != value and not key.startswith("split."):
            raise HeadgramError(f"{path} states another {key!r:.200} than the parts before it: fetch all parts of one model")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> Collection[str]:
        return self._tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))  # GGUF counts from the fastest axis

    def dtype(self, name: str) -> str:
        return self.stored(name)

    def stored(self, name: str) -> str:
        return str(self._tensors[name].tensor_type.name)

    def nbytes(self, name: str) -> int:
        return int(self._tensors[name].n_bytes)

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

    def part(self, name: str) -> Tensor:
        return self.read(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._tensors.clear()


@cache
def _reader_type() -> type[GGUFReader]:
    """The library's reader, which leaves long arrays of the metadata as they are.

    They are a tokenizer's, which nobody asks for here, and the library makes several objects of each of their elements: that
    takes seconds, all the rest of a header takes milliseconds.
    """
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list]:
            if raw_type == GGUFValueType.ARRAY and self._get(orig_offs + 4, np.uint64)[0] > LONG:
                size = array_bytes(self.data.data, orig_offs, swapped=self.byte_order == "S")
                return size, [self.data[orig_offs : orig_offs + size]], [], [GGUFValueType.ARRAY]  # as of one without elements
            found: tuple[int, list, list[int], list] = super()._get_field_parts(orig_offs, raw_type)
            return found

    return Reader
