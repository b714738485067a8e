"""How the form of a head changed from an earlier model to a later one that shares its residual basis.

    Δ = Y - X = (C - A)^T D + A^T (D - B)        X = A^T B before, Y = C^T D after

Differences of weights are exact to rounding in float64, and no term is larger than the change of a factor: nothing cancels where
weights hardly moved. The form is never formed. With thin factorisations of the stacked factors, `[C - A; A]^T = U R` and
`[D; D - B]^T = V S`, the singular values of `Δ`, at most `2r`, are those of `R S^T`. What several heads share is factored once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.errors import HeadgramError
from headgram.forms.heads import Heads
from headgram.geometry.blocks import by_blocks
from headgram.geometry.checks import check_weights
from headgram.geometry.ratios import ZERO, effective_rank, ratio

#: Bytes of float64 working memory that one batch of factors may take; bounds the peak, never the result.
_BLOCK_BYTES = {"cpu": 128 * 2**20, "cuda": 4 * 2**30}


@dataclass(frozen=True)
class Drift:
    """The change of `n` heads; float64, on the device of the weights. Ratios to a zero form are 0.

    Attributes
    ----------
    cosine : (n,)
        `<X, Y> / (‖X‖ ‖Y‖)`.
    norm_before, norm_after, norm_ratio : (n,)
        `‖X‖`, `‖Y‖` and `‖Y‖ / ‖X‖`.
    change_norm, change : (n,)
        `‖Δ‖`, and `‖Δ‖ / ‖X‖`.
    change_values : (n, 2r)
        Singular values of `Δ`, descending, padded with zeros.
    change_rank : (n,)
        Their effective rank, the exponential of the entropy of `s² / sum(s²)`; 0 where nothing changed.
    inside_right, inside_left, inside : (n,)
        The share of `‖Δ‖²` that lies in the span of the right singular vectors of `X` (of `qk` the query side), in that of its
        left ones, and in both. What is missing to 1 are new directions.
    inside_expected : (n,)
        The mean of the first two for a change in random directions: the rank of `X` over the width.
    floor : (n,)
        `‖Δ‖ / ‖X‖` that rounding `A` and `B` to 16 bits gives on average: to float16 where stored in it, else to
        bfloat16.
    equal : (n,)
        The share of the weights of both factors that are the same bit for bit.
    """

    cosine: Float[Tensor, " n"]
    norm_before: Float[Tensor, " n"]
    norm_after: Float[Tensor, " n"]
    norm_ratio: Float[Tensor, " n"]
    change_norm: Float[Tensor, " n"]
    change: Float[Tensor, " n"]
    change_values: Float[Tensor, "n two_r"]
    change_rank: Float[Tensor, " n"]
    inside_right: Float[Tensor, " n"]
    inside_left: Float[Tensor, " n"]
    inside: Float[Tensor, " n"]
    inside_expected: Float[Tensor, " n"]
    floor: Float[Tensor, " n"]
    equal: Float[Tensor, " n"]


@torch.no_grad()
def drift(before: Heads, after: Heads) -> Drift:
    """How each head of one set changed to the head in the same place of another.

    Parameters
    ----------
    before, after
        Sets of the same shapes, whose heads read their factors in the same way.

    Raises
    ------
    HeadgramError
        If the shapes differ, or a weight is not finite.

    Examples
    --------
    >>> import torch
    >>> from headgram.forms.circuits import qk
    >>> from headgram.geometry.drift import drift
    >>> queries, keys = torch.randn(4, 2, 8), torch.randn(2, 2, 8)
    >>> found = drift(qk(queries, keys), qk(2 * queries, keys))
    >>> found.norm_ratio.round(decimals=9).tolist(), found.equal.tolist()
    ([2.0, 2.0, 2.0, 2.0], [0.5, 0.5, 0.5, 0.5])
    """
    _check(before, after)
    left = _side(before.a, after.a, new_first=False).take(before.reads_a)
    right = _side(before.b, after.b, new_first=True).take(before.reads_b)

    x, y = left.old @ right.old.mT, left.new @ right.new.mT  # (n, m, m'), in the bases of the factors
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    alive = (s > ZERO * _row_products(left.old, right.old)[:, None]).to(s.dtype)
    norm_x, norm_y = s.mul(alive).norm(dim=-1), torch.linalg.matrix_norm(y)
    norm_y = norm_y.where(norm_y > ZERO * _row_products(left.new, right.new), 0)
    product = (x * (left.old_new @ y @ right.old_new.mT)).sum((-1, -2))

    values = torch.linalg.svdvals(left.stacked @ right.stacked.mT)
    values = values.where(values > ZERO * _row_products(left.stacked, right.stacked)[:, None], 0)
    change = values.norm(dim=-1)
    in_left = (u.mT @ left.old_stacked) * alive[:, :, None]  # the stacked factors in the singular vectors of X
    in_right = (vh @ right.old_stacked) * alive[:, :, None]
    inside = [
        ratio(torch.linalg.matrix_norm(part), change).square().clamp_max(1)
        for part in (left.stacked @ in_right.mT, in_left @ right.stacked.mT, in_left @ in_right.mT)
    ]
    floor = (left.rounding * right.row_sq + left.row_sq * right.rounding).sum(-1).sqrt()
    return Drift(
        cosine=ratio(ratio(product, norm_x), norm_y).clamp(-1, 1),
        norm_before=norm_x,
        norm_after=norm_y,
        norm_ratio=ratio(norm_y, norm_x),
        change_norm=change,
        change=ratio(change, norm_x),
        change_values=torch.nn.functional.pad(values, (0, 2 * before.rank - values.shape[-1])),
        change_rank=effective_rank(values),
        inside_right=inside[0],
        inside_left=inside[1],
        inside=inside[2],
        inside_expected=alive.sum(-1) / before.widths[0],
        floor=ratio(floor, norm_x),
        equal=(left.equal + right.equal) / 2,
    )


def joined(parts: list[Drift]) -> Drift:
    """Parts below one another, on the CPU."""
    return Drift(**{field.name: torch.cat([getattr(part, field.name).cpu() for part in parts]) for field in fields(Drift)})


def _check(before: Heads, after: Heads) -> None:
    shapes = [(len(each), each.a.shape, each.b.shape) for each in (before, after)]
    reads = torch.equal(before.reads_a, after.reads_a) and torch.equal(before.reads_b, after.reads_b)
    if shapes[0] != shapes[1] or not reads:
        raise HeadgramError("Heads are compared one by one in sets of the same shapes only, which share their factors alike.")
    for heads in (before, after):
        check_weights("left", heads.a)
        check_weights("right", heads.b)


class _Side(NamedTuple):
    """One side of some heads in small float64 matrices; `W_old^T = Q_old R_old`, `W_new^T = Q_new R_new`, `m = min(r, width)`."""

    old: Float[Tensor, "n m r"]  # R_old
    new: Float[Tensor, "n m r"]  # R_new
    stacked: Float[Tensor, "n l two_r"]  # R of the stacked factor, see `_side`
    old_new: Float[Tensor, "n m m"]  # Q_old^T Q_new
    old_stacked: Float[Tensor, "n m two_r"]  # Q_old^T times the transposed stacked factor
    row_sq: Float[Tensor, "n r"]  # squared norms of the rows of W_old
    rounding: Float[Tensor, "n r"]  # what rounding W_old to 16 bits adds to each on average
    equal: Float[Tensor, " n"]  # share of equal weights

    def take(self, reads: Tensor) -> _Side:
        return _Side(*(values[reads.to(values.device)] for values in self))


def _side(old: Float[Tensor, "n r width"], new: Float[Tensor, "n r width"], new_first: bool) -> _Side:
    """The stacked factor holds `[W_new; W_new - W_old]` or `[W_new - W_old; W_old]`."""
    rank, width = old.shape[1:]
    size = max(1, _BLOCK_BYTES[old.device.type] // (8 * 16 * rank * width))

    def measure(block: slice) -> _Side:
        stored, before, after = old[block], old[block].double(), new[block].double()
        change = after - before
        stack = torch.cat([after, change] if new_first else [change, before], 1)
        q_old, r_old = torch.linalg.qr(before.mT)
        q_new, r_new = torch.linalg.qr(after.mT)
        spacing = _spacing(before, torch.float16 if stored.dtype == torch.float16 else torch.bfloat16)
        return _Side(
            old=r_old,
            new=r_new,
            stacked=torch.linalg.qr(stack.mT, mode="r")[1],
            old_new=q_old.mT @ q_new,
            old_stacked=q_old.mT @ stack.mT,
            row_sq=before.square().sum(-1),
            rounding=spacing.square().sum(-1) / 12,
            equal=((change == 0) & (before.signbit() == after.signbit())).double().mean((-1, -2)),
        )

    parts = zip(*by_blocks(range(len(old)), size, measure), strict=True)
    return _Side(*(torch.cat(values) for values in parts))


def _spacing(weights: Float[Tensor, "n r width"], dtype: torch.dtype) -> Float[Tensor, "n r width"]:
    """The distance between two neighbouring numbers of a type at each weight; rounding errors are uniform in it. 0 at 0."""
    limits = torch.finfo(dtype)
    magnitude = weights.abs()
    power = torch.exp2(magnitude.clamp_min(limits.smallest_normal).log2().floor())
    return (power * limits.eps).where(magnitude > 0, 0)


def _row_products(left: Float[Tensor, "n m rows"], right: Float[Tensor, "n l rows"]) -> Float[Tensor, " n"]:
    """`sum_i ‖a_i‖ ‖b_i‖` over the rows of two factors, given as triangles of their transposes."""
    sizes: Tensor = (left.norm(dim=1) * right.norm(dim=1)).sum(-1)
    return sizes
