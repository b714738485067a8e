"""All heads with all heads, as the page draws them: whole if they are few, else an overview and the rows of single layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from headgram.report.names import DRAWN
from headgram.results.tables import Place, of_place, read_parts

#: What two heads are compared by: columns of the table `pairs`.
VALUES = ("cosine", "transposed")


@dataclass(frozen=True)
class PairMatrix:
    """Cosines of all pairs of `N` heads, which lie layer by layer, `H` in each.

    Attributes
    ----------
    values : by name of VALUES, (N, N) float32
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


def read_matrix(path: Path, place: Place, layers: np.ndarray, itself: dict[str, np.ndarray]) -> PairMatrix | None:
    """All pairs of one circuit of a stack from the table `pairs`; None where not all were measured.

    Parameters
    ----------
    layers : (L,)
        True indices.
    itself : by name of VALUES, (L, H)
        The value of a head with itself.
    """
    heads = itself["cosine"].shape[1]
    values = {name: np.diag(value.ravel()).astype(np.float32) for name, value in itself.items()}
    known = np.eye(itself["cosine"].size, dtype=bool)
    for part in read_parts(path):
        rows = of_place(place, part)
        a, b = (np.searchsorted(layers, rows[f"layer_{side}"].to_numpy()) * heads + rows[f"head_{side}"] for side in "ab")
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
