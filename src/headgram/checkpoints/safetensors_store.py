"""Safetensors files, here or elsewhere: only headers and the bytes of asked tensors are read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from headgram.checkpoints.dtypes import known_dtype, tensor_of
from headgram.checkpoints.homes import Homes
from headgram.checkpoints.local_file import LocalFile, Span
from headgram.checkpoints.safetensors_header import TensorPlace, read_header
from headgram.checkpoints.stores import Kept, Piece, TensorStore
from headgram.families.layouts import Cut

if TYPE_CHECKING:
    from torch import Tensor

File = TypeVar("File")
#: Tensors up to this size stay in memory when they are read: scales and shapes, which are asked for more than once.
_KEPT_BYTES = 2**16


class Safetensors(TensorStore, Generic[File]):
    """Safetensors files, from which a subclass reads bytes.

    Parameters
    ----------
    headers
        By file name, the file, and the places of its tensors.
    index
        As of `Homes`.
    """

    def __init__(
        self, headers: Mapping[str, tuple[File, Mapping[str, TensorPlace]]], index: Mapping[str, str] | None = None
    ) -> None:
        places = {key: {name: (file, place) for name, place in found.items()} for key, (file, found) in headers.items()}
        self._home: Homes[tuple[File, TensorPlace]] = Homes(places, index)
        self._kept = Kept(lambda pieces: self._read({piece: self._spans(*piece) for piece in pieces}))

    @abstractmethod
    def _read(self, wanted: Mapping[Piece, tuple[File, list[Span]]]) -> dict[Piece, memoryview]:
        """The bytes of pieces, of each its ranges of a file one after the other."""

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def names(self) -> Collection[str]:
        return self._home.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._home[name][1].shape

    def stored(self, name: str) -> str:
        return self._home[name][1].dtype

    def nbytes(self, name: str) -> int:
        place = self._home[name][1]
        return place.stop - place.start

    def raw(self, name: str, cut: Cut | None = None) -> memoryview:
        return self._kept.look(name, cut)

    def slices(self, name: str, rows: int) -> Iterator[Tensor]:
        self.dtype(name)
        count = self.shape(name)[0]
        for start in range(0, count, rows):
            cut = Cut(0, ((start, min(start + rows, count)),))
            yield self._tensor(name, cut, bytearray(self.raw(name, cut)))

    def part(self, name: str, cut: Cut | None = None) -> Tensor:
        known_dtype(name, self.stored(name))
        # A copy: what lies beside it in the buffer can be freed then, and offsets may be unaligned.
        stored = bytearray(self._kept.take(name, cut))
        if len(stored) <= _KEPT_BYTES:
            self._kept.put(name, cut, memoryview(stored))
        return self._tensor(name, cut, stored)

    def _tensor(self, name: str, cut: Cut | None, stored: bytearray) -> Tensor:
        shape = list(self.shape(name))
        if cut is not None:
            shape[cut.axis] = cut.count
        return tensor_of(stored, known_dtype(name, self.stored(name)), shape)

    def _spans(self, name: str, cut: Cut | None) -> tuple[File, list[Span]]:
        """The file that holds a tensor, and the ranges of its bytes."""
        file, place = self._home[name]
        if cut is None:
            return file, [(place.start, place.stop)]
        outer = 1 if cut.axis == 0 else place.shape[0]  # of columns, a range in every row
        size = (place.stop - place.start) // max(1, outer * place.shape[cut.axis])
        row = (place.stop - place.start) // max(1, outer)
        starts = range(place.start, place.start + outer * row, max(1, row))
        return file, [(at + first * size, at + last * size) for at in starts for first, last in cut.ranges]


class SafetensorsStore(Safetensors[LocalFile]):
    """One or several safetensors files on this machine."""

    def __init__(self, paths: Mapping[str, Path], index: Mapping[str, str] | None = None) -> None:
        files = {name: LocalFile(path) for name, path in paths.items()}
        super().__init__({name: (file, _header(file)) for name, file in files.items()}, index)

    def keep(self, pieces: Iterable[Piece]) -> None:
        self._kept.keep(pieces)

    def _read(self, wanted: Mapping[Piece, tuple[LocalFile, list[Span]]]) -> dict[Piece, memoryview]:
        return {piece: memoryview(file.read(spans)) for piece, (file, spans) in wanted.items()}


def _header(file: LocalFile) -> dict[str, TensorPlace]:
    return read_header(lambda start, stop: bytes(file.read([(start, stop)])), len(file), str(file.path))
