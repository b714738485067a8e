"""Torch's own weight files: zip archives of a pickled table and a record for each storage. Nothing is unpickled."""

from __future__ import annotations

import io
import itertools
import math
import struct
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headgram.checkpoints.dtypes import BYTES, bytes_of_array, tensor_of, word_of
from headgram.checkpoints.homes import Homes
from headgram.checkpoints.local_file import LocalFile
from headgram.checkpoints.pickle_table import StoredTensor, read_tensor, read_tensors
from headgram.checkpoints.stores import Kept, Piece, TensorStore
from headgram.errors import HeadgramError
from headgram.families.layouts import Cut

if TYPE_CHECKING:
    from torch import Tensor

#: Numbers of a tensor, of whatever type, as so many bytes each.
Numbers = np.ndarray[Any, np.dtype[np.void]]
#: As which zipfile reports a file that it cannot read.
_DAMAGE = (zipfile.BadZipFile, struct.error, OSError, EOFError, ValueError, LookupError, NotImplementedError, RuntimeError)
#: Rows, and columns, of what is copied at once.
_TILE = 256
#: A table of 50,000 tensors takes less.
_LARGEST_PICKLE = 16 * 2**20
_CONVERT = "convert it to safetensors where you trust it"
#: The part of a zip record's own header that has a fixed length, and where it states those of its name and extra field.
_ZIP_HEADER = 30
_ZIP_LENGTHS = struct.Struct("<26xHH")


class Archive:
    """One torch file, or its bytes: its tensors, and where the records lie."""

    def __init__(self, data: LocalFile | bytearray, where: str | Path) -> None:
        self._data = data
        self._where = where
        try:
            with zipfile.ZipFile(data.path if isinstance(data, LocalFile) else io.BytesIO(data)) as archive:
                records = {record.filename: record for record in archive.infolist()}
                if len(records) < len(archive.infolist()):
                    raise HeadgramError(f"{where} holds two records of one name: fetch it again")
                _check_stored(where, records, len(data))
                root, self._pickled = _pickle(where, archive, records)
            self._starts = {
                name.removeprefix(f"{root}data/"): (self._start(record), record.file_size)
                for name, record in records.items()
                if name.startswith(f"{root}data/")
            }
        except _DAMAGE:
            raise HeadgramError(
                f"{where} is not a whole torch file, or older than torch 1.6: fetch it again, or {_CONVERT}"
            ) from None

    def table(self) -> dict[str, StoredTensor]:
        """The tensors by name, of a file that holds a table of them.

        Raises
        ------
        HeadgramError
            If it holds more, or less.
        """
        return self._checked(read_tensors)

    def only(self) -> StoredTensor:
        """The tensor of a file that holds one and no table.

        Raises
        ------
        HeadgramError
            If it holds anything else.
        """
        return self._checked(lambda pickled: {"": read_tensor(pickled)})[""]

    def numbers(self, stored: StoredTensor) -> Numbers:
        """The numbers of a tensor of the file, copied in rows."""
        elements, size = stored.elements, BYTES[stored.dtype]
        if not elements:
            return np.empty(stored.shape, f"V{size}")
        start = self._starts[stored.record][0]
        data = self._data[start + elements.start * size : start + elements.stop * size]
        return _in_rows(np.ndarray(stored.shape, f"V{size}", data, strides=[size * step for step in stored.stride]))

    def _start(self, record: zipfile.ZipInfo) -> int:
        header = self._data[record.header_offset : record.header_offset + _ZIP_HEADER]
        name_bytes, extra_bytes = _ZIP_LENGTHS.unpack(header)
        return record.header_offset + _ZIP_HEADER + int(name_bytes) + int(extra_bytes)

    def _checked(self, read: Callable[[bytes], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
        try:
            tensors = read(self._pickled)
        except (ValueError, LookupError, struct.error) as error:
            more = f"is a pickle that holds more than tensors, which headgram does not run: it holds {error}"
            raise HeadgramError(f"{self._where} {more}; {_CONVERT}") from None
        for name, tensor in tensors.items():
            start, size = self._starts.get(tensor.record, (0, -1))
            if size != tensor.record_bytes or start + size > len(self._data):
                raise HeadgramError(
                    f"{self._where}: the record of tensor {name!r:.200} is missing, or not as long as the table says: "
                    "fetch it again"
                )
        return tensors


class BinStore(TensorStore):
    """One or several `.bin` files."""

    def __init__(self, paths: Mapping[str, Path], index: Mapping[str, str] | None = None) -> None:
        places: dict[str, dict[str, tuple[Archive, StoredTensor]]] = {}
        for file, path in paths.items():
            archive = Archive(LocalFile(path), path)
            places[file] = {name: (archive, tensor) for name, tensor in archive.table().items()}
        self._home = Homes(places, index)
        self._kept = Kept(lambda pieces: {piece: self._read(*piece) for piece in pieces})

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def names(self) -> Collection[str]:
        return self._home.names()

    def _tensor(self, name: str) -> StoredTensor:
        return self._home[name][1]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def stored(self, name: str) -> str:
        return word_of(self._tensor(name).dtype)

    def nbytes(self, name: str) -> int:
        return math.prod(self._tensor(name).shape) * BYTES[self._tensor(name).dtype]

    def keep(self, pieces: Iterable[Piece]) -> None:
        self._kept.keep(pieces)

    def raw(self, name: str, cut: Cut | None = None) -> memoryview:
        return bytes_of_array(self._kept.look(name, cut))

    def part(self, name: str, cut: Cut | None = None) -> Tensor:
        numbers = self._kept.take(name, cut)
        return tensor_of(bytes_of_array(numbers), self._tensor(name).dtype, numbers.shape)

    def _read(self, name: str, cut: Cut | None) -> Numbers:
        archive, stored = self._home[name]
        if cut is None:
            return archive.numbers(stored)
        return np.concatenate([archive.numbers(stored.narrowed(cut.axis, *bounds)) for bounds in cut.ranges], cut.axis)


def _in_rows(numbers: Numbers) -> Numbers:
    """The same numbers, row after row without gaps: a copy, unless they lie so.

    Made tile by tile: a matrix that is stored by its columns takes half as long so.
    """
    if numbers.ndim < 2 or numbers.flags.c_contiguous:
        return np.asarray(numbers, order="C")
    result = np.empty(numbers.shape, numbers.dtype)
    starts = (range(0, numbers.shape[axis], _TILE) for axis in (0, -1))
    for row, column in itertools.product(*starts):
        tile = (slice(row, row + _TILE), ..., slice(column, column + _TILE))
        result[tile] = numbers[tile]
    return result


def _check_stored(where: str | Path, records: Mapping[str, zipfile.ZipInfo], total: int) -> None:
    """Refuse what could grow beyond the file's own size: torch stores its records uncompressed."""
    stored = sum(record.file_size for record in records.values())
    if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()) or stored > total:
        raise HeadgramError(f"{where} holds compressed records, which torch never writes: {_CONVERT}")


def _pickle(where: str | Path, archive: zipfile.ZipFile, records: Mapping[str, zipfile.ZipInfo]) -> tuple[str, bytes]:
    """The folder that the archive's records lie in, and its pickled table."""
    tables = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(tables) != 1:
        raise HeadgramError(f"{where} is not a whole torch file: it holds {len(tables)} tables of tensors; fetch it again")
    root = tables[0].removesuffix("data.pkl")
    if records[tables[0]].file_size > _LARGEST_PICKLE:
        raise HeadgramError(f"{where} has a table of more than {_LARGEST_PICKLE >> 20} MiB, which no real checkpoint's is")
    if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
        raise HeadgramError(f"{where} is in the other byte order than headgram reads: convert it")
    return root, archive.read(tables[0])
