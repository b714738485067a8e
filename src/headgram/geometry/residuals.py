"""The identities that every result must satisfy, as relative residuals.

All are relative to `sum_i ‖a_i‖ ‖b_i‖` over the rows (or its square), the size at which rounding enters: a healthy result
shows about 1e-14, a wrong layout, sign or scale shows 1e-3 and more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.geometry.triangles import Own, Products, Shared, unbatched


class Residuals(NamedTuple):
    """One value per head, `(H,)` each."""

    energy: Float[Tensor, " heads"]  # sum(s²) = ‖X‖_F²
    trace: Float[Tensor, " heads"]  # sum(λ) = tr X
    symmetric_energy: Float[Tensor, " heads"]  # sum(λ²) = (‖X‖_F² + <X, X^T>) / 2
    orthogonality: Float[Tensor, " heads"]  # V V^T = U U^T = I, signed ones too
    singular: Float[Tensor, " heads"]  # X v = s u
    eigen: Float[Tensor, " heads"]  # (X + X^T) w / 2 = λ w

    def largest(self) -> Float[Tensor, " heads"]:
        return torch.stack(self).amax(0)


def identity_residuals(
    of: Products,
    s: Float[Tensor, "heads rank"],
    eigenvalues: Float[Tensor, "heads 2*rank"],
    unit: Float[Tensor, " heads"],
) -> tuple[Tensor, Tensor, Tensor]:
    """How far the spectra are from what products of the weights themselves say; `unit` is `sum_i ‖a_i‖ ‖b_i‖`.

    `‖X‖_F² = sum((A A^T) * (B B^T))`, `tr X = sum(A * B)`, `<X, X^T> = tr((B A^T)²)`.
    """
    fro_sq = (of.bb * of.aa).sum((-1, -2))
    self_overlap = (of.ba * of.ba.mT).sum((-1, -2))
    energy = (s.square().sum(-1) - fro_sq).abs() / unit.square()
    trace = (eigenvalues.sum(-1) - of.ba.diagonal(dim1=1, dim2=2).sum(-1)).abs() / unit
    symmetric_energy = (eigenvalues.square().sum(-1) - (fro_sq + self_overlap) / 2).abs() / unit.square()
    return energy, trace, symmetric_energy


def direction_residuals(
    b: Own,
    a: Shared,
    s: Float[Tensor, "heads rank"],
    right: Float[Tensor, "heads k hidden"],
    left: Float[Tensor, "heads k hidden"],
    eigenvalues: Float[Tensor, "heads 2*rank"],
    signed: Float[Tensor, "heads k hidden"],
    unit: Float[Tensor, " heads"],
) -> tuple[Tensor, Tensor, Tensor]:
    """How far the directions are from orthonormal, and from what `X` does to them."""
    kept = right.shape[1]
    orthogonality = torch.stack([off_identity(rows) for rows in (right, left, signed)]).amax(0)
    left_factor = unbatched(a)
    both = torch.cat([right, signed], 1) @ b.mT @ left_factor
    of_right, of_signed = both[:, :kept], (both[:, kept:] + signed @ left_factor.mT @ b) / 2
    singular = (of_right - s[:, :kept, None] * left).norm(dim=-1).amax(-1) / unit
    eigen = (of_signed - eigenvalues[:, :kept, None] * signed).norm(dim=-1).amax(-1) / unit
    return orthogonality, singular, eigen


def off_identity(rows: Float[Tensor, "heads k hidden"]) -> Float[Tensor, " heads"]:
    """Largest entry of `|V V^T - I|`, zero rows (padding) left out."""
    product = rows @ rows.mT
    present = (rows != 0).any(-1).to(rows.dtype)
    return (product - torch.diag_embed(present)).abs().amax((-1, -2))
