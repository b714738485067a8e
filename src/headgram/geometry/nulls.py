"""What chance alone gives: moments of measures of two forms if one is turned at random, and the best of many.

If a form is turned by Haar-random rotations of both its sides, its cosine with another has mean 0 and deviation `1/d`. If a
subspace of `k` dimensions is turned by one, `‖V_a V_b^T‖_F²` has mean `k²/d` and variance `2 k² (d-k)² / (d² (d-1) (d+2))`. That
is one case of two positive semidefinite forms `A`, `B` of which one is turned: `<A, B>` has

    mean        tr A tr B / d
    variance    2 (‖A‖² - (tr A)²/d) (‖B‖² - (tr B)²/d) / ((d-1) (d+2))

(second moments of the Haar measure: Collins & Śniady, "Integration with respect to the Haar measure", Comm. Math. Phys. 264,
2006). A form of two independent random factors has the symmetry `0.5 + 1/(2d)`, and deviates by `√2/(2d)`, whatever its rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.geometry.ratios import ratio

#: A form whose energy is spread so evenly over all directions that turning it changes nothing, but for rounding.
_EVEN = 1e-9


@dataclass(frozen=True)
class Null:
    """Mean and deviation of a measure by chance; `two_sided` where its magnitude counts."""

    mean: float
    deviation: float
    two_sided: bool = False

    def best_of(self, count: int) -> float:
        """What the best of so many random ones reaches: the expected extreme of normal variables (Blom, 1958)."""
        tries = 2 * count if self.two_sided else count
        quantile = torch.special.ndtri(torch.tensor((tries - 0.375) / (tries + 0.25), dtype=torch.float64))
        return self.mean + self.deviation * float(quantile)

    def mean_of(self, count: int) -> Null:
        """Of the mean of so many independent ones."""
        return Null(self.mean, self.deviation / math.sqrt(count), self.two_sided)


def cosine_null(width: int) -> Null:
    """Of the cosine of two forms `(d, d)`, and of one with the other's transpose."""
    return Null(0.0, 1 / width, two_sided=True)


def part_cosine_null(width: int) -> Null:
    """Of the cosine of two forms' symmetric, or antisymmetric, parts: half as many dimensions."""
    return Null(0.0, math.sqrt(2) / width, two_sided=True)


def symmetry_null(width: int) -> Null:
    """Of the share of a form's energy in its symmetric part."""
    return Null(0.5 + 0.5 / width, math.sqrt(0.5) / width, two_sided=True)


def symmetry_score_null(width: int) -> Null:
    """Of `2 symmetry - 1`."""
    return Null(1 / width, math.sqrt(2) / width, two_sided=True)


def overlap_null(kept: int, width: int) -> Null:
    """Of `‖V_a V_b^T‖_F² / k` of two sets of `k` orthonormal rows of width `d`."""
    if width == 1 or kept >= width:
        return Null(kept / width, 0.0)
    return Null(kept / width, math.sqrt(2 / ((width - 1) * (width + 2))) * (width - kept) / width)


@dataclass(frozen=True)
class Moments:
    """What a null follows from, of positive semidefinite forms `A`: `tr A` and `‖A‖²`, each `(n,)` float64."""

    trace: Float[Tensor, " n"]
    square: Float[Tensor, " n"]


def deviations(products: Float[Tensor, "n_x n_y"], of_x: Moments, of_y: Moments, width: int) -> Float[Tensor, "n_x n_y"]:
    """How far inner products `<A, B>` are from their mean by chance, in standard deviations, if one form is turned at random.

    0 where they cannot deviate: where a form is zero, or spread evenly over all directions.

    Examples
    --------
    >>> import torch
    >>> from headgram.geometry.nulls import Moments, deviations
    >>> planes = Moments(torch.tensor([2.0]), torch.tensor([2.0]))  # projectors onto planes
    >>> deviations(torch.tensor([[2.0]]), planes, planes, width=8)  # of equal planes
    tensor([[5.9161]])
    """
    even = [each.trace.square() / width for each in (of_x, of_y)]
    spread = [
        (each.square - least).where(each.square > least * (1 + _EVEN), 0) for each, least in zip((of_x, of_y), even, strict=True)
    ]
    variance = 2 * spread[0][:, None] * spread[1] / (max(1, width - 1) * (width + 2))
    return ratio(products - of_x.trace[:, None] * of_y.trace / width, variance.sqrt())
