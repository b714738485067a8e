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

import torch
from jaxtyping import Bool, Float
from torch import Tensor

#: Smallest pivot of unit rows that is trusted; and the range of squared row norms in which nothing over- or underflows.
_PIVOT = 0.05
_TINY, _HUGE = 1e-100, 1e100

Lift = Callable[[Float[Tensor, "heads k small"]], Float[Tensor, "heads k hidden"]]


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
    lift_right: Lift
    lift_left: Lift
    lift_signed: Lift


def products(q: Float[Tensor, "heads rank hidden"], k: Float[Tensor, "#heads rank hidden"]) -> Products:
    """The products that both spectra and their checks need."""
    return Products(q @ q.mT, q @ k.mT, k @ k.mT)


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
        lift_right=lambda rows: rows @ basis[..., :n].mT,
        lift_left=lambda rows: rows @ basis_k.mT @ basis.mT,
        lift_signed=lambda rows: rows @ basis.mT,
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

    def lift(rows: Tensor, triangle: Tensor, weights: Tensor, norms: Tensor) -> Tensor:
        """`rows` of the basis `W^T (R D)^-1`."""
        return (_solved(triangle, rows) / norms[:, None, :]) @ weights

    def lift_signed(rows: Tensor) -> Tensor:
        solved = _solved(upper, rows) / lengths[:, None, :]
        return solved[..., :rank] @ q + solved[..., rank:] @ k

    return (
        Factors(
            core=r_k @ r_q.mT,
            symmetric=(symmetric + symmetric.mT) / 2,
            lift_right=lambda rows: lift(rows, upper[:, :rank, :rank], q, lengths[:, :rank]),
            lift_left=lambda rows: lift(rows, upper_k, k, lengths_k),
            lift_signed=lift_signed,
        ),
        trusted,
    )


def _solved(triangle: Float[Tensor, "#heads m m"], rows: Float[Tensor, "heads k m"]) -> Float[Tensor, "heads k m"]:
    """`(R^-1 rows^T)^T`."""
    solved: Tensor = torch.linalg.solve_triangular(triangle, rows.mT, upper=True)
    return solved.mT
