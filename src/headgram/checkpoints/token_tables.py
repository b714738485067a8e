"""The tables of a checkpoint with a row for every token: what tokens are read as, and what is held against the last stream.

Between that stream and the unembedding stands a norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headgram.checkpoints.stores import TensorStore
from headgram.errors import HeadgramError
from headgram.families.around import NormRule

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from headgram.forms.reading import Norm

_NO_TABLE = "the family's data name no such table"


@dataclass(frozen=True)
class TokenTables:
    """Where a checkpoint's embedding and unembedding are; made when it is opened, and read when asked for."""

    names: dict[str, str]  # `embedding`, `unembedding` -> the tensor
    missing: dict[str, str]  # why the others cannot be read
    _store: TensorStore = field(repr=False)
    contradict: bool = False  # whether two tables are stored, although the configuration says that they are one
    _final: tuple[NormRule, str] | None = None  # and what its tensors' names begin with

    def read(self, table: str) -> Float[Tensor, "tokens width"]:
        """One of the tables, in stored precision.

        Raises
        ------
        HeadgramError
            If the checkpoint has none, or it is no table of finite numbers.
        """
        from headgram.geometry.checks import is_finite

        name, _ = self._found(table)
        rows = self._store.read(name)
        if not is_finite(rows):
            raise HeadgramError(f"tensor {name} holds a NaN or an infinity: the checkpoint is damaged")
        return rows

    def shape(self, table: str) -> tuple[int, int]:
        """Tokens and width of one of the tables, without reading it; errors as of `read`."""
        return self._found(table)[1]

    def slices(self, table: str, rows: int) -> Iterator[Float[Tensor, "_ width"]]:
        """One of the tables from its first row to its last, so many at a time; whether they are finite is not looked at."""
        return self._store.slices(self._found(table)[0], rows)

    def final_norm(self) -> Norm | None:
        """The norm that the last stream passes before the unembedding, read now; None if it is not known.

        Raises
        ------
        HeadgramError
            If it is no vector of finite numbers, as wide as the unembedding.
        """
        if self._final is None or f"{self._final[1]}.weight" not in self._store:
            return None
        from headgram.forms.reading import Norm
        from headgram.geometry.checks import is_finite

        rule, place = self._final
        vectors = {}
        for kind in (kind for kind in ("weight", "bias") if f"{place}.{kind}" in self._store):
            name = f"{place}.{kind}"
            vectors[kind] = self._store.read(name).double()
            fitting = "unembedding" in self.missing or vectors[kind].shape == self.shape("unembedding")[1:]
            if vectors[kind].dim() != 1 or not fitting or not is_finite(vectors[kind]):
                raise HeadgramError(f"tensor {name} should be finite numbers, as many as the unembedding is wide")
        return Norm(rule.kind == "layer", vectors["weight"] + rule.plus, vectors.get("bias"))

    def _found(self, table: str) -> tuple[str, tuple[int, int]]:
        """The tensor and its shape."""
        if table in self.missing:
            raise HeadgramError(f"this checkpoint has no {table} to read: {self.missing[table]}")
        name = self.names[table]
        shape = self._store.shape(name)
        if len(shape) != 2:
            raise HeadgramError(f"tensor {name} has shape {shape}, which should be (tokens, width)")
        return name, (shape[0], shape[1])


def token_tables(
    store: TensorStore,
    embedding: Iterable[str],
    unembedding: Iterable[str],
    prefix: str,
    tied: bool | None,
    final: NormRule | None = None,
) -> TokenTables:
    """Find the tables of a checkpoint.

    Parameters
    ----------
    embedding, unembedding
        Modules that may hold them. An embedding lies below the prefix of the base model. An unembedding lies below the first part
        of the prefix, or at the top.
    tied
        What the configuration states: whether one table serves as both. Where it states nothing, a checkpoint without an
        unembedding has one table.
    final
        The norm before the unembedding, below the prefix, if it is known.
    """
    names, missing = {}, {}
    beside = [f"{prefix.split('.')[0]}.", ""] if prefix else [""]
    places = {
        "embedding": [f"{prefix}{module}.weight" for module in embedding],
        "unembedding": [f"{before}{module}.weight" for module in unembedding for before in beside],
    }
    for table, wanted in places.items():
        found = next((name for name in wanted if name in store), None)
        if found is not None:
            names[table] = found
        else:
            missing[table] = f"it lacks tensor {wanted[0]}" if wanted else _NO_TABLE
    if "unembedding" in missing and "embedding" in names and tied is not False:
        names["unembedding"] = names["embedding"]
        del missing["unembedding"]
    contradict = tied is True and len(set(names.values())) == 2
    return TokenTables(names, missing, store, contradict, None if final is None else (final, f"{prefix}{final.module}"))
