"""All of a head's form in small matrices: two factorisations of the same quantities.

With thin factorisations `W_Q^T = U_q R_q`, `W_K^T = U_k R_k` and `[W_Q; W_K]^T = B [S_q | S_k]`, all bases orthonormal,

    g           = U_k (R_k R_q^T) U_q^T                    singular values and directions
    (g + g^T)/2 = B ½(S_k S_q^T + S_q S_k^T) B^T           signed spectrum: always a symmetric problem

*Householder* QR of the weights is backward stable whatever they are: `2r > d`, repeated rows, zero heads (Golub & Van Loan,
Matrix Computations, 5.2). *Cholesky* factors the products `[W_Q; W_K] [W_Q; W_K]^T`, which are needed anyway, several times
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

from headgram.geometry.batches import at_once

#: Smallest pivot of unit rows that is trusted; and the range of squared row norms in which nothing over- or underflows.
_PIVOT = 0.05
_TINY, _HUGE = 1e-100, 1e100

#: Row vectors of the bases of queries, of keys and of both -> the same vectors, as wide as the model. Together: the weights, much
#: larger than all else, are passed over once.
Lift = Callable[
    [Float[Tensor, "heads k n"], Float[Tensor, "heads k n"], Float[Tensor, "heads l m"]],
    tuple[Float[Tensor, "heads k hidden"], Float[Tensor, "heads k hidden"], Float[Tensor, "heads l hidden"]],
]


class Products(NamedTuple):
    """Products of the weights of some heads that may share their keys."""

    qq: Float[Tensor, "heads rank rank"]  # W_Q W_Q^T
    qk: Float[Tensor, "heads rank rank"]  # W_Q W_K^T
    kk: Float[Tensor, "#heads rank rank"]  # W_K W_K^T: one, or one for each


@dataclass(frozen=True)
class Factors:
    """The small matrices of some heads, and the maps from their row vectors to the width of the model."""

    core: Float[Tensor, "heads n_left n_right"]
    symmetric: Float[Tensor, "heads m m"]
    triangle_q: Float[Tensor, "heads p rank"]  # R with R^T R = W_Q W_Q^T, so that ‖R x‖ = ‖W_Q^T x‖
    triangle_k: Float[Tensor, "#heads p_k rank"]
    lift: Lift


def products(q: Float[Tensor, "heads rank hidden"], k: Float[Tensor, "#heads rank hidden"]) -> Products:
    """The products that both spectra and their checks need."""
    return Products(_with_itself(q), q @ once(k).mT, _with_itself(k))


def _with_itself(weights: Float[Tensor, "heads rank hidden"]) -> Float[Tensor, "heads rank rank"]:
    """`W W^T`. On a CPU one triangle of it is computed, by BLAS' routine for that, which torch does not call."""
    if at_once(weights.device):
        return weights @ weights.mT
    from scipy.linalg.blas import dsyrk  # costs time where no spectrum is measured

    lower = torch.stack([torch.from_numpy(dsyrk(1.0, matrix.numpy().T, trans=1, lower=1)) for matrix in weights])
    return lower + lower.tril(-1).mT


def column_norms(
    triangle: Float[Tensor, "#heads p rank"], weights: Float[Tensor, "#heads rank hidden"]
) -> Float[Tensor, "heads hidden"]:
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


def once(k: Float[Tensor, "#heads rank hidden"]) -> Float[Tensor, "*heads rank hidden"]:
    """Keys that all heads read, as one matrix: products with it are then one product of all heads' rows."""
    return k[0] if len(k) == 1 else k


def by_householder(q: Float[Tensor, "heads rank hidden"], k: Float[Tensor, "heads rank hidden"]) -> Factors:
    """Of float64 weights whose rows are balanced."""
    rank = q.shape[1]
    basis, r = torch.linalg.qr(torch.cat([q, k], dim=1).mT)  # (H, d, m), (H, m, 2r), m = min(d, 2r)
    r_q, r_k = r[..., :rank], r[..., rank:]
    # R_q is upper triangular: its rows below n are zero, so W_Q^T = basis[:, :, :n] R_q[:n] is a thin QR as it stands.
    n = min(rank, r.shape[-2])
    basis_k, core_k = torch.linalg.qr(r_k)  # (H, m, n), (H, n, r)
    symmetric = r_k @ r_q.mT
    return Factors(
        core=core_k @ r_q[:, :n].mT,
        symmetric=(symmetric + symmetric.mT) / 2,
        triangle_q=r_q[:, :n],
        triangle_k=core_k,
        lift=lambda right, left, signed: (right @ basis[..., :n].mT, left @ basis_k.mT @ basis.mT, signed @ basis.mT),
    )


def by_cholesky(
    q: Float[Tensor, "heads rank hidden"], k: Float[Tensor, "#heads rank hidden"], of: Products
) -> tuple[Factors, Bool[Tensor, " heads"]]:
    """Of float64 weights and their products; and which heads to trust. Nothing is said of the others."""
    rank = q.shape[1]
    gram = torch.cat([torch.cat([of.qq, of.qk], 2), torch.cat([of.qk.mT, of.kk.expand_as(of.qq)], 2)], 1)
    lengths_sq = gram.diagonal(dim1=1, dim2=2)
    lengths, lengths_k = lengths_sq.sqrt(), of.kk.diagonal(dim1=1, dim2=2).sqrt()
    upper, failed = torch.linalg.cholesky_ex((gram / lengths[:, :, None] / lengths[:, None, :]).mT, upper=True)
    # Of the keys alone: a product of orthonormal factors leaves the triangle of their own Gram matrix.
    upper_k, failed_k = torch.linalg.cholesky_ex((of.kk / lengths_k[:, :, None] / lengths_k[:, None, :]).mT, upper=True)
    smallest = upper.diagonal(dim1=1, dim2=2).amin(1)
    in_range = ((lengths_sq > _TINY) & (lengths_sq < _HUGE)).all(1)
    trusted = (failed == 0) & (failed_k == 0) & (smallest >= _PIVOT) & in_range

    s_q, s_k = upper[:, :, :rank] * lengths[:, None, :rank], upper[:, :, rank:] * lengths[:, None, rank:]
    r_q, r_k = s_q[:, :rank], upper_k * lengths_k[:, None]
    half = s_k @ r_q.mT  # the rows of S_q below r are zero
    symmetric = torch.nn.functional.pad(half, (0, rank))

    def lift(right: Tensor, left: Tensor, signed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the bases `W^T (R D)^-1`."""
        right = _solved(upper[:, :rank, :rank], right) / lengths[:, None, :rank]
        left = _solved(upper_k, left) / lengths_k[:, None]
        signed = _solved(upper, signed) / lengths[:, None]
        kept = right.shape[1]
        on_q = torch.cat([right, signed[..., :rank]], 1) @ q
        on_k = torch.cat([left, signed[..., rank:]], 1) @ once(k)
        return on_q[:, :kept], on_k[:, :kept], on_q[:, kept:] + on_k[:, kept:]

    return Factors(r_k @ r_q.mT, (symmetric + symmetric.mT) / 2, triangle_q=r_q, triangle_k=r_k, lift=lift), trusted


def _solved(triangle: Float[Tensor, "#heads m m"], rows: Float[Tensor, "heads k m"]) -> Float[Tensor, "heads k m"]:
    """`(R^-1 rows^T)^T`."""
    solved: Tensor = torch.linalg.solve_triangular(triangle, rows.mT, upper=True)
    return solved.mT
