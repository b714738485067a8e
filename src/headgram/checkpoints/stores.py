"""The tensors of a checkpoint's weight files, by name. Nothing is read before it is asked for.

Names, shapes, types and bytes need no torch. It is imported where a tensor is made, since every start of a run that meets a new
model would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from headgram.checkpoints.dtypes import bytes_of, float_dtype
from headgram.families.layouts import Cut

if TYPE_CHECKING:
    from torch import Tensor

#: A tensor's name, and the rows or columns that are meant; None for all of it.
Piece = tuple[str, Cut | None]
Stored = TypeVar("Stored")


class TensorStore(Protocol):
    """Tensors by name, as stored."""

    def __contains__(self, name: str) -> bool: ...

    def names(self) -> Collection[str]:
        """Every tensor's name, as stored."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in torch's order, `(out, in)` for a linear weight; costs no read of the data."""

    def stored(self, name: str) -> str:
        """The stored type in the format's own word, such as `BF16`, `U8` or `Q4_K`."""

    def dtype(self, name: str) -> str:
        """The stored precision of a weight, as `stored`; refused if `read` cannot read it."""
        return float_dtype(name, self.stored(name))

    def nbytes(self, name: str) -> int:
        """Bytes on disk."""

    def prefetch(self, pieces: Iterable[Piece]) -> None:
        """Prepare to read these tensors soon; does something only where that is quicker than one by one."""
        return

    def keep(self, pieces: Iterable[Piece]) -> None:
        """Read these into memory now, for `raw` and `read`. `read` lets go of its piece, the next `keep` of all."""
        return

    def pin(self, names: Iterable[str]) -> str | None:
        """A digest that stands for the bytes of these tensors without reading them; None where only the bytes can tell."""
        return None

    def raw(self, name: str, cut: Cut | None = None) -> memoryview:
        """The stored bytes of a tensor, or of some rows or columns; of all of it where its format has none for these alone."""
        return bytes_of(self.part(name, cut))

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        """The tensor, or some rows or columns; stored precision, or float32 if the format is quantised."""
        self.dtype(name)
        return self.part(name, cut)

    def slices(self, name: str, rows: int) -> Iterator[Tensor]:
        """The tensor as `read` gives it, so many rows at a time; most stores read no more than that at once."""
        yield from self.read(name).split(rows)

    def part(self, name: str, cut: Cut | None = None) -> Tensor:
        """The tensor, or some rows or columns, as stored, of any type: what a quantised weight is made of."""


class Kept(Generic[Stored]):
    """What is stored of pieces. `read` reads them, ahead of time or when they are asked for."""

    def __init__(self, read: Callable[[Iterable[Piece]], dict[Piece, Stored]]) -> None:
        self._read = read
        self._kept: dict[Piece, Stored] = {}

    def keep(self, pieces: Iterable[Piece]) -> None:
        """As of `TensorStore`."""
        self._kept.clear()
        self.add(pieces)

    def add(self, pieces: Iterable[Piece]) -> None:
        """Keep these as well."""
        if missing := [piece for piece in dict.fromkeys(pieces) if piece not in self._kept]:
            self._kept |= self._read(missing)

    def put(self, name: str, cut: Cut | None, stored: Stored) -> None:
        """Keep this, as it was read."""
        self._kept[name, cut] = stored

    def look(self, name: str, cut: Cut | None) -> Stored:
        """What is stored; it stays in memory, if it was kept."""
        return self._kept[name, cut] if (name, cut) in self._kept else self._read([(name, cut)])[name, cut]

    def take(self, name: str, cut: Cut | None) -> Stored:
        """What is stored, no longer kept."""
        found = self.look(name, cut)
        self._kept.pop((name, cut), None)
        return found


def cut_of(tensor: Tensor, cut: Cut | None) -> Tensor:
    """The tensor, or a copy of some rows or columns."""
    return tensor if cut is None else cut.of(tensor)
