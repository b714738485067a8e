"""The complex eigenvalues of square forms, and what they say of copying.

The non-zero eigenvalues of `X = A^T B` are those of `B A^T`, an `r × r` problem that is not symmetric: of `o = W_O W_V`, those of
`W_V W_O`. LAPACK solves it on the CPU, for routines of GPUs are slower here. With the eigenvalues `λ`:

    copying     Σ Re λ / Σ |λ|                 1: what a head reads, it writes again (Elhage et al., 2021, "Copying heads")
    positive    Σ_{Re λ > 0} |λ|² / Σ |λ|²     the same in shares of energy
    departure   √(‖X‖_F² - Σ |λ|²) / ‖X‖_F     0: normal; near 1: eigenvalues say little of the form (Henrici, 1962)
    trace_z     tr X · √d / ‖X‖_F              the sum of the eigenvalues against chance

Elhage et al., "A mathematical framework for transformer circuits" (2021), take eigenvalues of a whole path from token to token;
here they are of the form in the residual stream. Henrici, "Bounds for iterates, inverses, spectral variation and fields of values
of non-normal matrices", Numerische Mathematik 4 (1962). By chance, if `X` is turned by one Haar-random rotation `U`, `X U` and
`-X U` are equally likely: the mean of `copying` is exactly 0 and of `positive` 1/2, and `trace_z` has mean 0 and variance 1. The
mean of `departure²` is at least `1 - (Σ s)² / (d ‖X‖_F²)`, `s` the singular values: by Schur's inequality `Σ |λ|²` is at most
`‖√S V^T U W √S‖_F²`, where `X = W S V^T`, and the mean of that is `(Σ s)² / d`.

Of `qk` the same numbers say whether a head looks for tokens like its own; of a K-composition `o_a^T g_b`, whether it looks for
tokens that follow one like its own, as an induction head does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from headgram.errors import HeadgramError
from headgram.forms.heads import Heads
from headgram.forms.transforms import with_orthonormal_left
from headgram.geometry.ratios import ZERO, ratio


@dataclass(frozen=True)
class Eigenvalues:
    """The eigenvalues of `n` forms and what follows from them, on the CPU. The scores of a zero form are 0.

    Attributes
    ----------
    values : (n, r) complex128
        Largest magnitude first, the positive imaginary part first of a conjugate pair; where the rank falls short, zeros.
    copying : (n,)
        `Σ Re λ / Σ |λ|`, in `[-1, 1]`.
    positive : (n,)
        The share of `Σ |λ|²` at `Re λ > 0`, in `[0, 1]`.
    departure : (n,)
        Departure from normality over the norm, in `[0, 1]`. Below about 1e-7 it cannot be told from 0.
    trace_z : (n,)
        `tr X · √d / ‖X‖_F`.
    residual : (n,)
        `|Σ λ - tr X| / Σ ‖a_i‖ ‖b_i‖` over the rows of the factors: rounding, near 1e-15.
    """

    values: Complex[Tensor, "n rank"]
    copying: Float[Tensor, " n"]
    positive: Float[Tensor, " n"]
    departure: Float[Tensor, " n"]
    trace_z: Float[Tensor, " n"]
    residual: Float[Tensor, " n"]


@torch.no_grad()
def eigenvalues(heads: Heads) -> Eigenvalues:
    """The eigenvalues of every form, and the scores that follow.

    Raises
    ------
    HeadgramError
        If the forms are not square: what is read and what is written are then of two spaces.

    Examples
    --------
    >>> import torch
    >>> from headgram.forms.circuits import ov
    >>> from headgram.geometry.eigenvalues import eigenvalues
    >>> weights = torch.randn(1, 4, 16)
    >>> eigenvalues(ov(w_v=weights, w_o=weights)).copying  # each channel that is read is written again
    tensor([1.], dtype=torch.float64)
    """
    rows, columns = heads.widths
    if rows != columns:
        raise HeadgramError(f"Eigenvalues are those of square forms, not of ({rows}, {columns}).")
    exact = with_orthonormal_left(heads)
    left, right = heads.left().double(), heads.right().double()
    unit = (left.norm(dim=-1) * right.norm(dim=-1)).sum(-1).cpu()
    fro_sq = exact.right().square().sum((-1, -2)).cpu()
    fro_sq = fro_sq.where(fro_sq.sqrt() > ZERO * unit, 0)
    small = (exact.right() @ exact.left().mT).cpu() * (fro_sq > 0)[:, None, None]
    values = torch.linalg.eigvals(small)
    values = values.gather(-1, values.abs().argsort(dim=-1, descending=True, stable=True))
    magnitude = values.abs()
    energy = magnitude.square().sum(-1)
    return Eigenvalues(
        values=torch.nn.functional.pad(values, (0, heads.rank - values.shape[-1])),
        copying=ratio(values.real.sum(-1), magnitude.sum(-1)).clamp(-1, 1),
        positive=ratio(magnitude.square().where(values.real > 0, 0).sum(-1), energy).clamp(0, 1),
        departure=ratio((fro_sq - energy).clamp_min(0).sqrt(), fro_sq.sqrt()),
        trace_z=ratio(small.diagonal(dim1=1, dim2=2).sum(-1) * math.sqrt(rows), fro_sq.sqrt()),
        residual=ratio((values.sum(-1).real - (left * right).sum((-1, -2)).cpu()).abs(), unit),
    )
