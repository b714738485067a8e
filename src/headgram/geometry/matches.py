"""Which head of one model is which head of another: the assignment that makes the sum of `|cosine|` largest.

An optimal assignment (`scipy.optimize.linear_sum_assignment`) finds permuted heads again, even where several heads of one model
are most like the same head of the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Matches:
    """One head of the other model for each of `n` heads: of all, or of as many as the other model has.

    Attributes
    ----------
    row : (n,) int64
        Which heads, in their order.
    place : (n,) int64
        Which head of the other model.
    value : (n,)
        The cosine of the two forms; at -1 one is the other's negative.
    margin : (n,)
        `|value|` less the largest `|cosine|` to any other head of the other model; negative where the nearest head was given to
        another one.
    mutual : (n,) bool
        Whether each of the two is the other's nearest; not of a form that is zero.
    """

    row: Int[Tensor, " n"]
    place: Int[Tensor, " n"]
    value: Float[Tensor, " n"]
    margin: Float[Tensor, " n"]
    mutual: Bool[Tensor, " n"]


def matches(cosines: Float[Tensor, "rows columns"]) -> Matches:
    """Assign each row one column, or each column one row where there are fewer.

    Parameters
    ----------
    cosines : (n_x, n_y)
        Of the heads of one model with those of the other, on the CPU.

    Examples
    --------
    >>> import torch
    >>> from headgram.geometry.matches import matches
    >>> found = matches(torch.tensor([[0.5, 0.9], [0.1, 0.8]]))
    >>> found.place.tolist(), found.mutual.tolist()
    ([0, 1], [False, False])
    """
    from scipy.optimize import linear_sum_assignment  # costs time where nothing is matched

    likeness = cosines.abs()
    rows, place = map(torch.from_numpy, linear_sum_assignment(likeness.numpy(), maximize=True))
    own = likeness[rows, place]
    others = likeness.clone()
    others[rows, place] = 0
    mutual = (own > 0) & (own >= likeness.amax(1)[rows]) & (own >= likeness.amax(0)[place])
    return Matches(rows, place, cosines[rows, place], own - others.amax(1)[rows], mutual)
