"""Which rows of a long matrix, such as the embeddings of tokens, project most on each of some directions.

The rows pass by once, a slice at a time. Their mean is taken away at the end: it moves all projections on a direction by one
number, which leaves their order. Of a direction `v`, with centred rows `e_t`,

    projection   <e_t, v>
    deviations   <e_t, v> / sqrt(mean_t <e_t, v>²)       the most of `V` normal values is what chance gives
    share        Σ_t <e_t, v>² / Σ_t ‖e_t‖²              of the rows' energy; of a random direction 1/d in the mean, exactly
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgram.geometry.ratios import ratio

#: Bytes of the projections of one slice of rows on one block of directions.
_BLOCK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Projections:
    """The rows that project most, on both ends of every direction; on the CPU, float64.

    Attributes
    ----------
    rows : (n, 2, count) int64
        Of the largest projections, largest first, and of the smallest, smallest first; fewer where there are fewer rows.
    values : (n, 2, count)
        Their projections, after the mean row is taken away.
    deviations : (n, 2, count)
        The same over the root mean square of the direction's projections; 0 where that is 0.
    share : (n,)
        The share of the rows' energy that lies along the direction.
    count
        How many rows there were.
    """

    rows: Int[Tensor, "n 2 count"]
    values: Float[Tensor, "n 2 count"]
    deviations: Float[Tensor, "n 2 count"]
    share: Float[Tensor, " n"]
    count: int


@torch.no_grad()
def projections(directions: Float[Tensor, "n width"], slices: Iterable[Float[Tensor, "_ width"]], count: int) -> Projections:
    """Project rows on directions.

    Parameters
    ----------
    directions : (n, d)
        Of unit length, float32.
    slices : (rows, d) each
        All rows, from the first to the last; any floating dtype.
    count
        How many rows to keep at each end.

    Examples
    --------
    >>> import torch
    >>> from headgram.geometry.projections import projections
    >>> found = projections(torch.eye(3)[:1], [torch.tensor([[2.0, 0, 0], [-1, 1, 0]]), torch.tensor([[5.0, 0, 1]])], 2)
    >>> found.rows[0, 0], found.values[0, 0]
    (tensor([2, 0]), tensor([3., 0.], dtype=torch.float64))
    """
    n, width = directions.shape
    wide = directions.double()
    best = [torch.empty(n, 0, dtype=torch.float32) for _ in range(2)]
    places = [torch.empty(n, 0, dtype=torch.int64) for _ in range(2)]
    total, energy, start = torch.zeros(width, dtype=torch.float64), 0.0, 0
    squares = torch.zeros(n, dtype=torch.float64)
    step = max(1, _BLOCK_BYTES // (4 * n))
    for rows in (piece.float() for each in slices for piece in each.split(step)):
        total += rows.sum(0, dtype=torch.float64).cpu()
        energy += rows.square().sum(dtype=torch.float64).item()
        found = directions @ rows.T
        squares += found.square().sum(1, dtype=torch.float64).cpu()
        for end, sign in enumerate((1, -1)):
            largest = (found * sign).topk(min(count, len(rows)), dim=1)
            values = torch.cat([best[end], largest.values.cpu()], 1)
            indices = torch.cat([places[end], largest.indices.cpu() + start], 1)
            best[end], order = values.topk(min(count, values.shape[1]), dim=1)
            places[end] = indices.gather(1, order)
        start += len(rows)
    mean = total / max(1, start)
    of_mean = wide.cpu() @ mean
    power = (squares - start * of_mean.square()).clamp_min(0)
    values = torch.stack([best[0].double() - of_mean[:, None], -best[1].double() - of_mean[:, None]], 1)
    return Projections(
        rows=torch.stack(places, 1),
        values=values,
        deviations=ratio(values, (power / max(1, start)).sqrt()[:, None, None]),
        share=power / centred if (centred := energy - start * mean.square().sum().item()) > 0 else torch.zeros_like(power),
        count=start,
    )
