"""Distributed checkpoints of torch: a pickled table, and pieces of tensors in files. Nothing is unpickled."""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headgram.checkpoints.bin_store import Archive, Numbers
from headgram.checkpoints.dtypes import BYTES, bytes_of_array, tensor_of, word_of
from headgram.checkpoints.local_file import LocalFile
from headgram.checkpoints.pickle_walk import OTHER, Global, Walk, are_sizes, dtype_of, is_shape
from headgram.checkpoints.stores import TensorStore
from headgram.checkpoints.weight_files import DISTRIBUTED_TABLE
from headgram.errors import HeadgramError
from headgram.families.layouts import Cut
from headgram.foreign import read_bounded

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_METADATA = 64 * 2**20
_INERT = ("pathlib PosixPath", "pathlib PurePosixPath", "pathlib._local PosixPath", "pathlib WindowsPath", "builtins set")


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor, and where it lies in a file, as a torch file inside of that file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor in pieces; its type as torch calls it."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Chunk, ...]


class DistcpStore(TensorStore):
    """A folder with `.metadata` and the files that it names."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._where = paths[DISTRIBUTED_TABLE]
        self._files = {name: LocalFile(path) for name, path in paths.items() if name != DISTRIBUTED_TABLE}
        try:
            self._tensors = read_metadata(read_bounded(self._where, _LARGEST_METADATA))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
            raise HeadgramError(
                f"{self._where} is no table of a distributed checkpoint that headgram reads ({error!s:.200}): save it again, "
                "or convert it with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch`"
            ) from None

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def stored(self, name: str) -> str:
        return word_of(self._tensors[name].dtype)

    def nbytes(self, name: str) -> int:
        whole = self._tensors[name]
        return math.prod(whole.shape) * BYTES[whole.dtype]

    def raw(self, name: str, cut: Cut | None = None) -> memoryview:
        return bytes_of_array(self._numbers(name, cut))

    def part(self, name: str, cut: Cut | None = None) -> Tensor:
        numbers = self._numbers(name, cut)
        return tensor_of(bytes_of_array(numbers), self._tensors[name].dtype, numbers.shape)

    def _numbers(self, name: str, cut: Cut | None) -> Numbers:
        whole = self._tensors[name]
        self._check_places(name, whole)
        if sum(piece.length for piece in whole.pieces) < self.nbytes(name):
            raise HeadgramError(f"{self._where}: the pieces of tensor {name!r:.200} are too small for its shape {whole.shape}")
        result = np.empty(whole.shape, f"V{BYTES[whole.dtype]}")
        missing = np.ones(whole.shape, bool)
        for piece in whole.pieces:
            block = tuple(slice(start, start + size) for start, size in zip(piece.offsets, piece.sizes, strict=True))
            if not missing[block].all():
                raise HeadgramError(f"{self._where}: two pieces of tensor {name!r:.200} hold the same of its numbers")
            result[block] = self._read_piece(name, whole, piece)
            missing[block] = False
        if missing.any():
            raise HeadgramError(f"{self._where}: the pieces of tensor {name!r:.200} do not make up the whole: fetch all files")
        return result if cut is None else cut.of(result)

    def _check_places(self, name: str, whole: ChunkedTensor) -> None:
        """Refuse pieces that their files do not hold, each in a place of its own, before any memory is taken for them."""
        file, end = "", 0
        for piece in sorted(whole.pieces, key=lambda piece: (piece.file, piece.start)):
            if piece.start + piece.length > len(self._files.get(piece.file, b"")):
                raise HeadgramError(
                    f"{self._where}: the piece of tensor {name!r:.200} in {piece.file!r:.200} is missing: fetch all files"
                )
            if piece.file == file and piece.start < end:
                raise HeadgramError(f"{self._where}: two pieces of tensor {name!r:.200} are the same bytes of {file!r:.200}")
            file, end = piece.file, piece.start + piece.length

    def _read_piece(self, name: str, whole: ChunkedTensor, piece: Chunk) -> Numbers:
        where = f"the piece of tensor {name!r:.200} in {piece.file!r:.200}"
        archive = Archive(self._files[piece.file][piece.start : piece.start + piece.length], where)
        stored = archive.only()
        if (stored.dtype, stored.shape) != (whole.dtype, piece.sizes):
            raise HeadgramError(f"{self._where}: {where} has another type or shape than the table says")
        return archive.numbers(stored)


def read_metadata(pickled: bytes) -> dict[str, ChunkedTensor]:
    """The tensors that a `.metadata` describes, by name.

    Raises
    ------
    ValueError
        Says what it holds that such a table does not.
    """
    top = _MetadataWalk().run(pickled)
    described, stored = top.fields["state_dict_metadata"], top.fields["storage_data"]
    places = {_place_of(index): place.fields for index, place in stored.others}
    tensors = {}
    for name, entry in described.items():
        if entry.name.endswith(" TensorStorageMetadata"):
            tensors[name] = _whole(name, entry.fields, places)
    return tensors


def _whole(name: str, fields: Mapping[str, Any], places: Mapping[Any, Mapping[str, Any]]) -> ChunkedTensor:
    properties = fields["properties"].fields
    dtype, layout = (properties[key] for key in (("dtype", "layout") if isinstance(properties, Mapping) else (0, 1)))
    kind = dtype_of(dtype.name)
    shape = _sizes(fields["size"])
    if kind is None or layout != "torch.strided":
        raise ValueError(f"{name!r:.200} is no plain tensor")
    if not is_shape(shape):
        raise ValueError(f"{name!r:.200} has a shape that no memory holds")
    pieces = []
    for chunk in fields["chunks"]:
        offsets, sizes = _sizes(chunk.fields["offsets"]), _sizes(chunk.fields["sizes"])
        place = places[name, offsets]
        if place.get("transform_descriptors"):
            raise ValueError(f"{name!r:.200} is stored compressed")
        if not len(offsets) == len(sizes) == len(shape) or any(map(lambda o, s, n: o + s > n, offsets, sizes, shape)):
            raise ValueError(f"a piece of {name!r:.200} is not inside of it")
        file, (start, length) = place["relative_path"], _sizes((place["offset"], place["length"]))
        if not isinstance(file, str):
            raise ValueError(f"a piece of {name!r:.200} is in no file")
        pieces.append(Chunk(offsets, sizes, file, start, length))
    return ChunkedTensor(kind, shape, tuple(pieces))


def _place_of(index: _Record) -> tuple[str, tuple[int, ...] | None]:
    """The name and the offsets of a piece: nothing else is ever hashed."""
    name, offsets = index.fields["fqn"], index.fields.get("offset")
    if not isinstance(name, str):
        raise ValueError("a piece of a tensor without a name")
    return name, offsets if offsets is None else _sizes(offsets)


def _sizes(values: Any) -> tuple[int, ...]:
    if not are_sizes(values):
        raise ValueError("sizes that are no whole numbers")
    found: tuple[int, ...] = values
    return found


@dataclass
class _Record:
    """An object of a known class: its attributes, by name or in order."""

    name: str
    fields: Any = field(default_factory=dict)


class _Entries(dict[str, Any]):
    """A table that also keeps what lies under records."""

    def __init__(self) -> None:
        super().__init__()
        self.others: list[tuple[_Record, Any]] = []


class _MetadataWalk(Walk):
    """Describes the objects of a `.metadata`."""

    def known(self, name: str) -> Global:
        calls = ("torch Size", "torch.serialization _get_layout", "collections OrderedDict")
        if dtype_of(name) or name.startswith("torch.distributed.") or name in (*calls, *_INERT):
            return Global(name)
        raise ValueError(f"{name.replace(' ', '.')!r:.200}, which no such table needs")

    def call(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        match function.name:
            case "torch Size" | "torch.serialization _get_layout" if len(arguments) == 1:
                return arguments[0]
            case "collections OrderedDict" if not arguments:
                return self.new_table()
            case name if name.startswith("torch.distributed."):
                return _Record(name)
            case name if name in _INERT:
                return OTHER
        raise ValueError(f"a call of {function.name.replace(' ', '.')!r:.200}")

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, _Record):
            target.fields = state

    def new_list(self) -> list[Any]:
        return []

    def new_table(self) -> dict[str, Any]:
        return _Entries()

    def entry(self, table: dict[str, Any], key: Any, value: Any) -> None:
        if isinstance(key, _Record) and isinstance(table, _Entries):
            table.others.append((key, value))
        else:
            super().entry(table, key, value)
