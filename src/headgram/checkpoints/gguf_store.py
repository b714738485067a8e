"""GGUF files."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headgram.checkpoints.dtypes import bytes_of_array
from headgram.checkpoints.gguf_check import LONG, array_bytes, check_header
from headgram.checkpoints.homes import Homes
from headgram.checkpoints.local_file import LocalFile
from headgram.checkpoints.stores import Kept, Piece, TensorStore
from headgram.errors import HeadgramError
from headgram.families.layouts import Cut

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor

#: A tokenizer's metadata, and the header's own counts, which the library shows as if they were metadata.
_NOT_ASKED = ("tokenizer.", "GGUF.")
#: The type of strings in the metadata.
_STRING = 8
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
            parts[name] = {tensor.name: (LocalFile(path), tensor) for tensor in reader.tensors}
        self._tensors = Homes(parts)
        self._kept: Kept[Any] = Kept(lambda pieces: {piece: self._stored(*piece) for piece in pieces})

    def _add(self, key: str, value: Any, path: Path) -> None:
        """Take metadata of a part; parts may repeat it, but differ only in which part they are."""
        if self.metadata.setdefault(key, value) != value and not key.startswith("split."):
            raise HeadgramError(f"{path} states another {key!r:.200} than the parts before it: fetch all parts of one model")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> Collection[str]:
        return self._tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name][1].shape))  # GGUF counts from the fastest axis

    def dtype(self, name: str) -> str:
        return self.stored(name)

    def stored(self, name: str) -> str:
        return str(self._tensors[name][1].tensor_type.name)

    def nbytes(self, name: str) -> int:
        return int(self._tensors[name][1].n_bytes)

    def keep(self, pieces: Iterable[Piece]) -> None:
        self._kept.keep(pieces)

    def raw(self, name: str, cut: Cut | None = None) -> memoryview:
        return bytes_of_array(self._kept.look(name, cut))

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        return self._values(name, self._kept.take(name, cut)).reshape(-1, *self.shape(name)[1:])

    def slices(self, name: str, rows: int) -> Iterator[Tensor]:
        count = self.shape(name)[0]
        for start in range(0, count, rows):
            yield self.read(name, Cut(0, ((start, min(start + rows, count)),)))

    def _stored(self, name: str, cut: Cut | None) -> Any:
        """What is stored of a tensor, or of some rows. A row of a quantised format holds whole blocks."""
        file, tensor = self._tensors[name]
        count = self.shape(name)[0]
        row = int(tensor.n_bytes) // max(1, count)
        ranges = cut.ranges if cut else [(0, count)]  # never columns: llama.cpp's converter stores all projections as (out, in)
        stored = file.read(
            (int(tensor.data_offset) + row * start, int(tensor.data_offset) + row * stop) for start, stop in ranges
        )
        return np.frombuffer(stored, tensor.data.dtype).reshape(-1, *tensor.data.shape[1:])

    def _values(self, name: str, stored: Any) -> Tensor:
        """What stored data of a tensor stand for."""
        import torch
        from gguf.quants import dequantize

        kind = self._tensors[name][1].tensor_type
        if kind.name == "BF16":
            return torch.from_numpy(stored.view("int16").copy()).view(torch.bfloat16)
        if kind.name in ("F16", "F32", "F64"):
            return torch.from_numpy(stored.copy())
        try:
            return torch.from_numpy(dequantize(stored, kind))
        except NotImplementedError:
            raise HeadgramError(f"tensor {name} is stored as {kind.name}, which the gguf library cannot dequantise") from None

    def part(self, name: str, cut: Cut | None = None) -> Tensor:
        return self.read(name, cut)


def strings_of(path: Path, key: str) -> list[str]:
    """The strings of an array in the metadata of a GGUF file; none if it has no such array.

    Raises
    ------
    HeadgramError
        If the file is damaged.
    """
    check_header(path)
    try:
        reader = _reader_type()(path)
        if (field := reader.get_field(key)) is None:
            return []
        if field.data:
            return [str(text) for text in field.contents()]
        stored = bytes(field.parts[-1])
        kind, count = struct.unpack_from("<IQ", stored)
        if kind != _STRING:
            raise ValueError(f"{key} holds no strings")
        texts, at = [], 12
        for _ in range(count):
            (size,) = struct.unpack_from("<Q", stored, at)
            texts.append(stored[at + 8 : at + 8 + size].decode(errors="replace"))
            at += 8 + size
        return texts
    except (*_DAMAGE, struct.error) as error:
        raise HeadgramError(f"{path} is not a whole GGUF file ({error}): fetch it again") from None


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
