"""All of a head's form `X = A^T B` in small matrices: two factorisations of the same quantities.

With thin factorisations `B^T = U_b R_b`, `A^T = U_a R_a` and `[B; A]^T = U [S_b | S_a]`, all bases orthonormal,

    X           = U_a (R_a R_b^T) U_b^T                    singular values and directions
    (X + X^T)/2 = U ½(S_a S_b^T + S_b S_a^T) U^T           signed spectrum: always a symmetric problem

*Householder* QR of the weights is backward stable whatever they are: `2r > d`, repeated rows, zero heads (Golub & Van Loan,
Matrix Computations, 5.2). *Cholesky* factors the products `[B; A] [B; A]^T`, which are needed anyway, several times
faster, and loses what the condition of the rows costs: bases are orthonormal to `ε κ²`, values exact to `ε κ` (Yamamoto et al.,
ETNA 44, 2015). Rows are scaled to length one first, which is the best diagonal scaling up to a factor; its result is trusted
where no pivot is small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headgram.geometry.blocks import at_once

#: Smallest pivot of unit rows that is trusted; and the range of squared row norms in which nothing over- or underflows.
_PIVOT = 0.05
_TINY, _HUGE = 1e-100, 1e100

#: A factor for each of some heads; one that all of them read, or one for each.
Own = Float[Tensor, "heads rank hidden"]
Shared = Float[Tensor, "#heads rank hidden"]

#: Row vectors of the bases of right factors, of left factors and of both -> the same vectors, as wide as the model. Together: the
#: weights, much larger than all else, are passed over once.
Lift = Callable[
    [Float[Tensor, "heads k n"], Float[Tensor, "heads k n"], Float[Tensor, "heads l m"]],
    tuple[Float[Tensor, "heads k hidden"], Float[Tensor, "heads k hidden"], Float[Tensor, "heads l hidden"]],
]


class Products(NamedTuple):
    """Products of the factors of some heads that may share their left factor."""

    bb: Float[Tensor, "heads rank rank"]  # B B^T
    ba: Float[Tensor, "heads rank rank"]  # B A^T
    aa: Float[Tensor, "#heads rank rank"]  # A A^T: one, or one for each


@dataclass(frozen=True)
class Triangles:
    """The small matrices of some heads, and the maps from their row vectors to the width of the model."""

    core: Float[Tensor, "heads n_left n_right"]
    symmetric: Float[Tensor, "heads m m"]
    triangle_b: Float[Tensor, "heads p rank"]  # R with R^T R = B B^T, so that ‖R x‖ = ‖B^T x‖
    triangle_a: Float[Tensor, "#heads p_k rank"]
    lift: Lift


def products(b: Own, a: Shared) -> Products:
    """The products that both spectra and their checks need."""
    return Products(own_products(b), b @ unbatched(a).mT, own_products(a))


def own_products(weights: Float[Tensor, "n rank width"]) -> Float[Tensor, "n rank rank"]:
    """`W W^T` of float64 weights. With one thread one triangle of it is computed, by BLAS' routine for that: torch calls none."""
    if at_once(weights.device) or torch.get_num_threads() > 1:
        return weights @ weights.mT
    from scipy.linalg.blas import dsyrk  # costs time where nothing is multiplied

    lower = torch.stack([torch.from_numpy(dsyrk(1.0, matrix.numpy().T, trans=1, lower=1)) for matrix in weights])
    return lower + lower.tril(-1).mT


@torch.no_grad()
def triangles(factors: Float[Tensor, "n rank width"]) -> Float[Tensor, "n m rank"]:
    """`R` of every thin QR factorisation `W^T = U R`, `m = min(r, width)` rows, float64; signs of rows are arbitrary.

    Of rows that are far from dependent by Cholesky's factorisation of `W W^T`, which is many times faster.
    """
    wide = factors.double()
    upper: Tensor
    if factors.shape[1] > factors.shape[2]:
        upper = torch.linalg.qr(wide.mT, mode="r")[1]
        return upper
    gram = own_products(wide)
    lengths = gram.diagonal(dim1=1, dim2=2).sqrt()
    unit = lengths.where(lengths > 0, 1)
    upper, failed = torch.linalg.cholesky_ex(gram / unit[:, :, None] / unit[:, None], upper=True)
    # Rounding grows with the inverse square of the smallest pivot; squares of such lengths neither over- nor underflow.
    ordinary = ((lengths > 1e-100) & (lengths < 1e100)).all(-1)
    rough = (failed != 0) | ~(upper.diagonal(dim1=1, dim2=2).amin(-1) > _PIVOT) | ~ordinary
    upper = upper * unit[:, None]
    if bool(rough.any()):
        upper[rough] = torch.linalg.qr(wide[rough].mT, mode="r")[1]
    return upper


def column_norms(triangle: Float[Tensor, "#heads p rank"], weights: Shared) -> Float[Tensor, "heads hidden"]:
    """Norms of the columns of `R W` for an upper triangular `R`: on a CPU by BLAS' routine for that, in half the operations."""
    heads, (p, rank) = max(len(triangle), len(weights)), triangle.shape[1:]
    if at_once(weights.device) or p != rank:
        return (triangle @ weights).square().sum(1).sqrt()
    from scipy.linalg.blas import dtrmm  # costs time where no spectrum is measured

    norms = torch.empty(heads, weights.shape[2], dtype=weights.dtype)
    for head in range(heads):
        r, w = triangle[head % len(triangle)].numpy(), weights[head % len(weights)].numpy()
        product = dtrmm(1.0, np.ascontiguousarray(r).T, w.T, side=1, lower=1).T  # LAPACK's matrices are transposed
        norms[head] = torch.from_numpy(np.einsum("ij,ij->j", product, product)).sqrt()
    return norms


def unbatched(a: Shared) -> Float[Tensor, "*heads rank hidden"]:
    """A factor that all heads read, as one matrix: products with it are then one product of all heads' rows."""
    return a[0] if len(a) == 1 else a


def by_householder(b: Own, a: Own) -> Triangles:
    """Of float64 weights whose rows are balanced."""
    rank = b.shape[1]
    basis, r = torch.linalg.qr(torch.cat([b, a], dim=1).mT)  # (H, d, m), (H, m, 2r), m = min(d, 2r)
    r_b, r_a = r[..., :rank], r[..., rank:]
    # R_b is upper triangular: its rows below n are zero, so B^T = basis[:, :, :n] R_b[:n] is a thin QR as it stands.
    n = min(rank, r.shape[-2])
    basis_a, core_a = torch.linalg.qr(r_a)  # (H, m, n), (H, n, r)
    symmetric = r_a @ r_b.mT
    return Triangles(
        core=core_a @ r_b[:, :n].mT,
        symmetric=(symmetric + symmetric.mT) / 2,
        triangle_b=r_b[:, :n],
        triangle_a=core_a,
        lift=lambda right, left, signed: (right @ basis[..., :n].mT, left @ basis_a.mT @ basis.mT, signed @ basis.mT),
    )


def by_cholesky(b: Own, a: Shared, of: Products) -> tuple[Triangles, Bool[Tensor, " heads"]]:
    """Of float64 weights and their products; and which heads to trust. Nothing is said of the others."""
    rank = b.shape[1]
    gram = torch.cat([torch.cat([of.bb, of.ba], 2), torch.cat([of.ba.mT, of.aa.expand_as(of.bb)], 2)], 1)
    lengths_sq = gram.diagonal(dim1=1, dim2=2)
    lengths, lengths_a = lengths_sq.sqrt(), of.aa.diagonal(dim1=1, dim2=2).sqrt()
    upper, failed = torch.linalg.cholesky_ex((gram / lengths[:, :, None] / lengths[:, None, :]).mT, upper=True)
    # Of the left factors alone: a product of orthonormal factors leaves the triangle of their own Gram matrix.
    upper_a, failed_a = torch.linalg.cholesky_ex((of.aa / lengths_a[:, :, None] / lengths_a[:, None, :]).mT, upper=True)
    smallest = upper.diagonal(dim1=1, dim2=2).amin(1)
    in_range = ((lengths_sq > _TINY) & (lengths_sq < _HUGE)).all(1)
    trusted = (failed == 0) & (failed_a == 0) & (smallest >= _PIVOT) & in_range

    s_b, s_a = upper[:, :, :rank] * lengths[:, None, :rank], upper[:, :, rank:] * lengths[:, None, rank:]
    r_b, r_a = s_b[:, :rank], upper_a * lengths_a[:, None]
    half = s_a @ r_b.mT  # the rows of S_b below r are zero
    symmetric = torch.nn.functional.pad(half, (0, rank))

    def lift(right: Tensor, left: Tensor, signed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the bases `W^T (R D)^-1`."""
        right = _solved(upper[:, :rank, :rank], right) / lengths[:, None, :rank]
        left = _solved(upper_a, left) / lengths_a[:, None]
        signed = _solved(upper, signed) / lengths[:, None]
        kept = right.shape[1]
        on_b = torch.cat([right, signed[..., :rank]], 1) @ b
        on_a = torch.cat([left, signed[..., rank:]], 1) @ unbatched(a)
        return on_b[:, :kept], on_a[:, :kept], on_b[:, kept:] + on_a[:, kept:]

    return Triangles(r_a @ r_b.mT, (symmetric + symmetric.mT) / 2, triangle_b=r_b, triangle_a=r_a, lift=lift), trusted


def _solved(triangle: Float[Tensor, "#heads m m"], rows: Float[Tensor, "heads k m"]) -> Float[Tensor, "heads k m"]:
    """`(R^-1 rows^T)^T`."""
    solved: Tensor = torch.linalg.solve_triangular(triangle, rows.mT, upper=True)
    return solved.mT
