"""All heads with all heads, as the page draws them: whole if they are few, else an overview and the rows of single layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from headgram.report.names import DRAWN
from headgram.results.paths import Place
from headgram.results.tables import pair_indices, read_parts, read_table

#: Feeders and readers of a head that a page lists.
STRONGEST = 8


@dataclass(frozen=True)
class PairMatrix:
    """Cosines of all pairs of `N` heads, which lie layer by layer, `H` in each.

    Attributes
    ----------
    values : by column of the table `pairs`, (N, N) float32
        Symmetric; a head with itself is 1, and its symmetry score.
    order : (N,)
        The heads as an average-linkage clustering by `1 - |cosine|` places them.
    """

    values: dict[str, np.ndarray]
    order: np.ndarray
    heads: int

    def arrays(self) -> dict[str, np.ndarray]:
        """What a page holds: the order, and upper triangles by value and order; of few heads in the order of layers only."""
        whole = len(self.order) <= DRAWN
        orders = {"layer": np.arange(len(self.order))} | ({} if whole else {"cluster": self.order})
        drawn = {
            f"{value}/{name}": _triangle(_largest(matrix[np.ix_(order, order)]))
            for value, matrix in self.values.items()
            for name, order in orders.items()
        }
        return {"order": self.order, **drawn}

    def layer(self, position: int) -> dict[str, np.ndarray]:
        """By value, the heads of one layer with all heads, (H, N)."""
        return {value: matrix[position * self.heads : (position + 1) * self.heads] for value, matrix in self.values.items()}


@dataclass(frozen=True)
class Feeding:
    """Compositions of all pairs of `N` heads, in times chance: the head of a row writes, the one of a column reads.

    Attributes
    ----------
    kinds : by `q`, `k`, `v`, (N, N) float32
        0 where the first head is not of an earlier layer.
    """

    kinds: dict[str, np.ndarray]
    heads: int

    def arrays(self) -> dict[str, np.ndarray]:
        """What a page holds: by kind the upper triangle, and the strongest feeders and readers of every head."""
        drawn = {kind: _triangle(_largest(matrix)) for kind, matrix in self.kinds.items()}
        feeders = {f"{kind}/feeders": _strongest(matrix.T, self.heads, self.heads) for kind, matrix in self.kinds.items()}
        readers = {f"{kind}/readers": _strongest(matrix, self.heads, self.heads) for kind, matrix in self.kinds.items()}
        return drawn | feeders | readers

    def layer(self, position: int) -> dict[str, np.ndarray]:
        """By kind, what the heads of one layer write for all heads, (H, N)."""
        return {kind: matrix[position * self.heads : (position + 1) * self.heads] for kind, matrix in self.kinds.items()}


@dataclass(frozen=True)
class Across:
    """The heads of another stack that write for those of this one, or read what these write: of an encoder and of what reads it.

    Attributes
    ----------
    partner
        The other stack.
    arrays : by `{kind}/feeders` or `{kind}/readers`, (3, L, H, n)
        Place of the layer there, head, and value in times chance of the strongest partners of every head.
    """

    partner: str
    arrays: dict[str, np.ndarray]


def read_feeding(path: Path, stack: str, layers: np.ndarray, heads: int) -> Feeding | None:
    """Compositions of a stack from the table of that name; None if it holds none of this stack.

    Parameters
    ----------
    layers : (L,)
        True indices.
    """
    kinds: dict[str, np.ndarray] = {}
    for part in read_parts(path, stack=stack, writer=stack):
        for kind in part["kind"].unique().to_pylist():
            rows = part.filter(pc.field("kind") == kind)
            matrix = kinds.setdefault(kind, np.zeros((len(layers) * heads,) * 2, dtype=np.float32))
            matrix[pair_indices(rows, layers, heads)] = rows["times_chance"]
    return Feeding(kinds, heads) if kinds else None


def read_across(path: Path, stack: str, shapes: Mapping[str, tuple[np.ndarray, int]]) -> Across | None:
    """Compositions of a stack with another one from the table `composition`; None if it holds none.

    Parameters
    ----------
    shapes
        By stack, the true indices of its layers, and how many heads each has.
    """
    found: dict[str, np.ndarray] = {}
    partner = ""
    table = read_table(path)
    for side, own, other in (("feeders", "stack", "writer"), ("readers", "writer", "stack")):
        rows = table.filter((pc.field(own) == stack) & (pc.field(other) != stack)).to_pandas()
        for (kind, name), some in rows.groupby(["kind", other]):
            partner = str(name)
            ends = [(f"_{'b' if end == 'stack' else 'a'}", *shapes[stack if end == own else partner]) for end in (own, other)]
            places = [
                np.searchsorted(layers, some[f"layer{end}"]) * heads + some[f"head{end}"].to_numpy()
                for end, layers, heads in ends
            ]
            matrix = np.zeros([len(layers) * heads for _, layers, heads in ends], dtype=np.float32)
            matrix[places[0], places[1]] = some["times_chance"]
            found[f"{kind}/{side}"] = _strongest(matrix, ends[0][2], ends[1][2])
    return Across(partner, found) if found else None


def _strongest(matrix: np.ndarray, heads: int, of_partners: int) -> np.ndarray:
    """Place of the layer, head, and value of every row's strongest partners, (3, L, H, n); values are 0 beyond the last."""
    partners = np.argsort(-matrix, axis=1, kind="stable")[:, :STRONGEST]
    values = np.take_along_axis(matrix, partners, axis=1)
    return np.stack([partners // of_partners, partners % of_partners, values]).reshape(3, -1, heads, values.shape[1])


def read_matrix(path: Path, place: Place, layers: np.ndarray, itself: dict[str, np.ndarray]) -> PairMatrix | None:
    """All pairs of one circuit of a stack from the table `pairs`; None where not all were measured.

    Parameters
    ----------
    layers : (L,)
        True indices.
    itself : by column of the table `pairs`, (L, H)
        The value of a head with itself.
    """
    heads = itself["cosine"].shape[1]
    values = {name: np.diag(value.ravel()).astype(np.float32) for name, value in itself.items()}
    known = np.eye(itself["cosine"].size, dtype=bool)
    circuit, stack = place
    for rows in read_parts(path, circuit=circuit, stack=stack):
        a, b = pair_indices(rows, layers, heads)
        known[a, b] = known[b, a] = True
        for name, matrix in values.items():
            matrix[a, b] = matrix[b, a] = rows[name]
    return PairMatrix(values, _clustered(values["cosine"]), heads) if known.all() else None


def _clustered(cosine: np.ndarray) -> np.ndarray:
    if len(cosine) < 3:
        return np.arange(len(cosine))
    distance = 1 - np.abs(cosine)
    np.fill_diagonal(distance, 0)
    order: np.ndarray = leaves_list(linkage(squareform(distance.clip(0), checks=False), "average"))
    return order


def _largest(matrix: np.ndarray) -> np.ndarray:
    """At most DRAWN cells a side: of every block of neighbours the value of largest magnitude."""
    step = -(-len(matrix) // DRAWN)
    if step == 1:
        return matrix
    cells = -(-len(matrix) // step)
    padded = np.pad(matrix, (0, cells * step - len(matrix))).reshape(cells, step, cells, step)
    most, least = padded.max((1, 3)), padded.min((1, 3))
    largest: np.ndarray = np.where(most >= -least, most, least)
    return largest


def _triangle(matrix: np.ndarray) -> np.ndarray:
    """The upper triangle with the diagonal, row by row."""
    values: np.ndarray = matrix[np.triu_indices(len(matrix))]
    return values
