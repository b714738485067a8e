"""Torch's own weight files: zip archives of a pickled table and a record for each storage. Nothing is unpickled."""

from __future__ import annotations

import math
import mmap
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from headgram.checkpoints.homes import Homes
from headgram.checkpoints.pickle_table import StoredTensor, read_table
from headgram.checkpoints.stores import DTYPES, TensorStore, bytes_of, float_dtype
from headgram.errors import HeadgramError

#: As which zipfile reports a file that it cannot read.
_DAMAGE = (zipfile.BadZipFile, struct.error, OSError, EOFError, ValueError, LookupError, NotImplementedError, RuntimeError)
_WORDS = {dtype: word for word, dtype in DTYPES.items()}
#: A table of 50,000 tensors takes less.
_LARGEST_PICKLE = 16 * 2**20
_CONVERT = "convert it to safetensors where you trust it"
#: The part of a zip record's own header that has a fixed length, and where it states those of its name and extra field.
_ZIP_HEADER = 30
_ZIP_LENGTHS = struct.Struct("<26xHH")


class _File:
    """A `.bin` file, mapped into memory: its tensors, and where the records lie."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            with zipfile.ZipFile(path) as archive:
                records = {record.filename: record for record in archive.infolist()}
                if len(records) < len(archive.infolist()):
                    raise HeadgramError(f"{path} holds two records of one name: fetch it again")
                _check_stored(path, records)
                root, pickled = _pickle(path, archive, records)
            self._starts = {
                name.removeprefix(f"{root}data/"): (self._start(record), record.file_size)
                for name, record in records.items()
                if name.startswith(f"{root}data/")
            }
        except _DAMAGE:
            raise HeadgramError(
                f"{path} is not a whole torch file, or older than torch 1.6: fetch it again, or {_CONVERT}"
            ) from None
        try:
            self.tensors = read_table(pickled)
        except (ValueError, LookupError, struct.error) as error:
            raise HeadgramError(
                f"{path} is a pickle that holds more than tensors, which headgram does not run: it holds {error}; {_CONVERT}"
            ) from None
        self._check_records(path)

    def _start(self, record: zipfile.ZipInfo) -> int:
        header = self.data[record.header_offset : record.header_offset + _ZIP_HEADER]
        name_bytes, extra_bytes = _ZIP_LENGTHS.unpack(header)
        return record.header_offset + _ZIP_HEADER + int(name_bytes) + int(extra_bytes)

    def _check_records(self, path: Path) -> None:
        for name, tensor in self.tensors.items():
            start, size = self._starts.get(tensor.record, (0, -1))
            if size != tensor.record_bytes or start + size > len(self.data):
                raise HeadgramError(
                    f"{path}: the record of tensor {name!r:.200} is missing, or not as long as the table says: fetch it again"
                )

    def stored(self, tensor: StoredTensor) -> memoryview:
        """The bytes from a tensor's first to its last element."""
        start, item = self._starts[tensor.record][0], tensor.dtype.itemsize
        elements = tensor.elements
        return memoryview(self.data)[start + elements.start * item : start + elements.stop * item]


class BinStore(TensorStore):
    """One or several `.bin` files, mapped into memory."""

    def __init__(self, paths: Mapping[str, Path], index: Mapping[str, str] | None = None) -> None:
        files = {name: _File(path) for name, path in paths.items()}
        self._home = Homes({name: dict.fromkeys(file.tensors, file) for name, file in files.items()}, index)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def names(self) -> Collection[str]:
        return self._home.names()

    def _tensor(self, name: str) -> StoredTensor:
        return self._home[name].tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        stored = self._tensor(name).dtype
        return float_dtype(name, _WORDS.get(stored, str(stored)))

    def nbytes(self, name: str) -> int:
        return math.prod(self._tensor(name).shape) * self._tensor(name).dtype.itemsize

    def raw(self, name: str) -> memoryview:
        return bytes_of(self.part(name))

    def read(self, name: str) -> Tensor:
        self.dtype(name)
        return self.part(name)

    def part(self, name: str) -> Tensor:
        tensor = self._tensor(name)
        stored = bytearray(self._home[name].stored(tensor))  # a copy: what lies in the file may be unaligned
        if not stored:
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return torch.frombuffer(stored, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride).contiguous()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._home.clear()


def _check_stored(path: Path, records: Mapping[str, zipfile.ZipInfo]) -> None:
    """Refuse what could grow beyond the file's own size: torch stores its records uncompressed."""
    stored = sum(record.file_size for record in records.values())
    if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()) or stored > path.stat().st_size:
        raise HeadgramError(f"{path} holds compressed records, which torch never writes: {_CONVERT}")


def _pickle(path: Path, archive: zipfile.ZipFile, records: Mapping[str, zipfile.ZipInfo]) -> tuple[str, bytes]:
    """The folder that the archive's records lie in, and its pickled table."""
    tables = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(tables) != 1:
        raise HeadgramError(f"{path} is not a whole torch file: it holds {len(tables)} tables of tensors; fetch it again")
    root = tables[0].removesuffix("data.pkl")
    if records[tables[0]].file_size > _LARGEST_PICKLE:
        raise HeadgramError(f"{path} has a table of more than {_LARGEST_PICKLE >> 20} MiB, which no real checkpoint's is")
    if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
        raise HeadgramError(f"{path} is in the other byte order than headgram reads: convert it")
    return root, archive.read(tables[0])
