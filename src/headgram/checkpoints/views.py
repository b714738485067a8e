"""Stores whose tensors are made of those of other stores: under other names, or of two stores together."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from headgram.checkpoints.sources import HUB_DIGEST
from headgram.checkpoints.stores import Piece, TensorStore
from headgram.families.layouts import Cut

if TYPE_CHECKING:
    from torch import Tensor


class View(TensorStore):
    """A store over another one; as it stands, the same tensors. What a tensor is made of is said by `sources`."""

    def __init__(self, store: TensorStore) -> None:
        self._store = store

    def sources(self, name: str) -> list[str]:
        """The tensors beneath that this one is made of."""
        return [name]

    def is_stored(self, name: str) -> bool:
        """Whether this is a tensor beneath, unchanged: then its rows are rows of that one."""
        return True

    def __contains__(self, name: str) -> bool:
        return all(source in self._store for source in self.sources(name))

    def names(self) -> Collection[str]:
        return self._store.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._store.shape(self.sources(name)[0])

    def stored(self, name: str) -> str:
        return self._store.stored(self.sources(name)[0])

    def dtype(self, name: str) -> str:
        return self._store.dtype(self.sources(name)[0])

    def nbytes(self, name: str) -> int:
        return sum(map(self._store.nbytes, self.sources(name)))

    def prefetch(self, pieces: Iterable[Piece]) -> None:
        self._store.prefetch(self._beneath(pieces))

    def keep(self, pieces: Iterable[Piece]) -> None:
        self._store.keep(self._beneath(pieces))

    def pin(self, names: Iterable[str]) -> str | None:
        return self._store.pin(list(dict.fromkeys(source for name in names for source in self.sources(name))))

    def raw(self, name: str, cut: Cut | None = None) -> memoryview:
        pieces = self._beneath([(name, cut)])
        return self._store.raw(*pieces[0]) if len(pieces) == 1 else memoryview(b"".join(map(self._store.raw, self.sources(name))))

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        return self._store.read(self.sources(name)[0], cut)

    def slices(self, name: str, rows: int) -> Iterator[Tensor]:
        sources = self.sources(name)
        return self._store.slices(sources[0], rows) if len(sources) == 1 else super().slices(name, rows)

    def part(self, name: str, cut: Cut | None = None) -> Tensor:
        return self._store.part(self.sources(name)[0], cut)

    def _beneath(self, pieces: Iterable[Piece]) -> list[Piece]:
        """What is read beneath for some pieces. Of a tensor that is not stored as it is, all that it is made of is read whole."""
        found = ((source, cut if self.is_stored(name) else None) for name, cut in pieces for source in self.sources(name))
        return list(dict.fromkeys(found))


class Renamed(View):
    """The tensors of a store under other names, and no others.

    Parameters
    ----------
    store
        The store.
    stored
        By new name, the name in the store.
    """

    def __init__(self, store: TensorStore, stored: Mapping[str, str]) -> None:
        super().__init__(store)
        self._stored = stored

    def sources(self, name: str) -> list[str]:
        return [self._stored[name]]

    def __contains__(self, name: str) -> bool:
        return name in self._stored and super().__contains__(name)

    def names(self) -> Collection[str]:
        return self._stored.keys()


class Joined(TensorStore):
    """Two stores as one: the tensors of the second have names that begin with a prefix, which none of the first has."""

    def __init__(self, first: TensorStore, prefix: str, second: TensorStore) -> None:
        self._first, self._prefix = first, prefix
        self._second = Renamed(second, {prefix + name: name for name in second.names()})

    def _of(self, name: str) -> TensorStore:
        return self._second if name.startswith(self._prefix) else self._first

    def _split(self, pieces: Iterable[Piece]) -> Iterator[tuple[TensorStore, list[Piece]]]:
        found = list(pieces)
        for each in (self._first, self._second):
            yield each, [piece for piece in found if self._of(piece[0]) is each]

    def __contains__(self, name: str) -> bool:
        return name in self._of(name)

    def names(self) -> Collection[str]:
        return [*self._first.names(), *self._second.names()]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def stored(self, name: str) -> str:
        return self._of(name).stored(name)

    def dtype(self, name: str) -> str:
        return self._of(name).dtype(name)

    def nbytes(self, name: str) -> int:
        return self._of(name).nbytes(name)

    def prefetch(self, pieces: Iterable[Piece]) -> None:
        for store, some in self._split(pieces):
            store.prefetch(some)

    def keep(self, pieces: Iterable[Piece]) -> None:
        for store, some in self._split(pieces):
            store.keep(some)

    def pin(self, names: Iterable[str]) -> str | None:
        """A digest of both stores' pins; of the second's bytes, if it has no pin. None if the first has none."""
        first, second = ([name for name, _ in some] for _, some in self._split((name, None) for name in names))
        pinned = self._first.pin(first)
        if pinned is None:
            return None
        state = hashlib.blake2b(pinned.encode(), digest_size=16)
        if inner := self._second.pin(second):
            state.update(inner.encode())
        else:
            for name in second:
                state.update(self._second.raw(name))
        return HUB_DIGEST + state.hexdigest()

    def raw(self, name: str, cut: Cut | None = None) -> memoryview:
        return self._of(name).raw(name, cut)

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        return self._of(name).read(name, cut)

    def part(self, name: str, cut: Cut | None = None) -> Tensor:
        return self._of(name).part(name, cut)
