"""The nearest heads of a stack: every head is compared with every other, for indices mean nothing across layers.

cosine                of the two forms
transposed            cosine of one form with the other's transpose
right, left, signed   overlap of the spans of the top k directions, ‖V_a V_b^T‖_F² / k
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgram.forms.heads import Heads
from headgram.geometry.inner import inner_products

#: What heads are compared by: inner products of the forms, and overlaps of directions.
BY_FORM = ("cosine", "transposed")
BY_SPAN = ("right", "left", "signed")

#: Bytes of the directions of one block, in float32. A constant, so that results do not depend on the machine.
_BLOCK_BYTES = 64 * 2**20
#: Rows that are sorted at once.
_ROWS = 256


@dataclass(frozen=True)
class Neighbours:
    """The nearest heads by one measure, nearest first.

    Attributes
    ----------
    place : (N, n) int64
        Which head, in the order of layers and heads.
    value : (N, n) float32
        The measure. Cosines are ordered by magnitude: at -1 one form is the other's negative.
    """

    place: Int[Tensor, "heads n"]
    value: Float[Tensor, "heads n"]


def nearest_heads(values: Float[Tensor, "heads heads"], count: int) -> Neighbours:
    """For every head the others of largest magnitude; equally near ones in their order.

    Parameters
    ----------
    values : (N, N)
        A measure of every two heads; the diagonal is not looked at.
    count
        How many; at most `N - 1` are found.
    """
    count = min(count, len(values) - 1)
    places = []
    for start in range(0, len(values), _ROWS):
        magnitude = values[start : start + _ROWS].abs()
        rows = torch.arange(len(magnitude))
        magnitude[rows, start + rows] = -1
        places.append(magnitude.sort(dim=1, descending=True, stable=True).indices[:, :count].clone())  # a view would hold all
    place = torch.cat(places)
    return Neighbours(place, values.gather(1, place))


def span_overlaps(directions: Float[Tensor, "layers per_layer k hidden"], device: str = "cpu") -> Float[Tensor, "heads heads"]:
    """Overlaps of the spans of all heads' directions with each other.

    Parameters
    ----------
    directions : (L, H, k, d)
        Orthonormal rows; may be mapped from a file, two blocks of layers are read at a time. Zero rows overlap with nothing.
    device
        Where products are taken, in float32.

    Returns
    -------
    (L H, L H) float32
        On the CPU.
    """
    layers, per_layer, kept, hidden = directions.shape
    step = max(1, _BLOCK_BYTES // (4 * per_layer * kept * hidden))
    found = torch.zeros(layers * per_layer, layers * per_layer)
    for i in range(0, layers, step):
        own = Heads.symmetric(directions[i : i + step].flatten(0, 1).to(device).float())
        for j in range(i, layers, step):
            other = own if i == j else Heads.symmetric(directions[j : j + step].flatten(0, 1).to(device).float())
            part = (inner_products(own, other).gram / kept).float().cpu()
            rows = slice(i * per_layer, i * per_layer + len(own))
            columns = slice(j * per_layer, j * per_layer + len(other))
            found[rows, columns], found[columns, rows] = part, part.mT
    return found
