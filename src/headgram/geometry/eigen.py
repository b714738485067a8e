"""Symmetric eigenproblems and singular values of small matrices, of which only the vectors of the largest magnitudes are wanted.

On a CPU: Householder's tridiagonal form, all values by the root-free QL iteration, the wanted vectors by inverse iteration
(Golub & Van Loan, Matrix Computations, 8.2-8.4), in less than half of the time that all vectors take. Inverse iteration may fail
in tight clusters, so its vectors are held against the matrix; where they do not hold, and where a large part of all vectors is
wanted, all are computed by divide and conquer.

On a GPU all matrices are solved at once, with all vectors, by the batched Jacobi routine of cuSOLVER. It has no such routine for
singular values of more than 32 rows, so those come from a symmetric problem of twice the size (8.6.1),

    [0  A; A^T  0] [u; v] = ± s [u; v]

exact to rounding of the largest. Where a solution does not hold, LAPACK solves that matrix again on the CPU.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headgram.geometry.blocks import at_once
from headgram.geometry.ratios import ZERO
from headgram.geometry.residuals import off_identity

#: Residuals and overlaps of vectors above this many units of rounding, for each row, are not trusted.
_ROUNDING = 8 * np.finfo(np.float64).eps
#: Vectors one by one are worth it up to this share of them.
_FEW = 1 / 6
#: Columns that LAPACK works on at once.
_BLOCK = 32
#: From this version on, torch solves a batch of matrices of more than 32 rows at once on a GPU.
_BATCHED_IN_TORCH = "2.12"

_log = logging.getLogger(__name__)


def largest_magnitude(
    matrices: Float[Tensor, "heads n n"], count: int
) -> tuple[Float[Tensor, "heads n"], Float[Tensor, "heads count n"]]:
    """Eigenvalues, largest magnitude first (of `±λ` that rounding cannot tell apart, the positive first), and eigenvectors.

    Parameters
    ----------
    matrices : (H, n, n)
        Symmetric, float64, on any device.
    count
        How many eigenvectors, at most `n`; of unit length, their signs undetermined.
    """
    n = matrices.shape[-1]
    if not at_once(matrices.device) and count <= _FEW * n:
        found = [_solved_in_part(matrix, count) for matrix in matrices]
        return torch.stack([values for values, _ in found]), torch.stack([vectors for _, vectors in found])
    return _all(matrices, count)


def largest_singular(
    matrices: Float[Tensor, "heads n m"], count: int
) -> tuple[Float[Tensor, "heads count n"], Float[Tensor, "heads l"], Float[Tensor, "heads count m"]]:
    """Left singular vectors as rows, all `min(n, m)` singular values, descending, and right singular vectors as rows.

    Parameters
    ----------
    matrices : (H, n, m)
        Float64, on any device.
    count
        How many vectors of each side, at most `min(n, m)`. Those of values that are zero to rounding may be zero.
    """
    n = matrices.shape[-1]
    if not at_once(matrices.device) or matrices.shape[-2] != n:
        u, s, vh = torch.linalg.svd(matrices)
        return u[..., :count].mT, s, vh[:, :count]
    zeros = torch.zeros_like(matrices)
    values, vectors = _decomposed(torch.cat([torch.cat([zeros, matrices], 2), torch.cat([matrices.mT, zeros], 2)], 1))
    s, vectors = values[:, n:].flip(-1).clamp_min(0), vectors[..., n:].flip(-1)[..., :count].mT
    # Where s is zero to rounding, a vector is any mixture of u and v.
    alive = (s > _ROUNDING * n * s[:, :1])[:, :count, None]
    left, right = (
        side / side.norm(dim=-1, keepdim=True).where(alive, 1) * alive for side in (vectors[..., :n], vectors[..., n:])
    )
    limit = _ROUNDING * n
    lost = ((s[:, :count] > ZERO * s[:, :1]) & ~alive[..., 0]).any(1)
    wrong = lost | ~((off_identity(left) <= limit) & (off_identity(right) <= limit))
    if bool(wrong.any()):
        u, exact, vh = (found.to(s.device) for found in torch.linalg.svd(matrices[wrong].cpu()))
        left[wrong], s[wrong], right[wrong] = u[..., :count].mT, exact, vh[:, :count]
    return left, s, right


def _all(matrices: Float[Tensor, "heads n n"], count: int) -> tuple[Float[Tensor, "heads n"], Float[Tensor, "heads count n"]]:
    values, vectors = _decomposed(matrices)
    order = _by_magnitude(values)
    return values.gather(-1, order), vectors.gather(-1, order[:, None, :count].expand(-1, vectors.shape[-2], -1)).mT


def _decomposed(matrices: Float[Tensor, "heads n n"]) -> tuple[Float[Tensor, "heads n"], Float[Tensor, "heads n n"]]:
    """All eigenvalues, ascending, and eigenvectors as columns."""
    if not at_once(matrices.device):
        values, vectors = torch.linalg.eigh(matrices)
        return values, vectors
    try:
        values, vectors = _batched_eigh(matrices)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values, vectors = matrices.new_zeros(matrices.shape[:-1]), torch.zeros_like(matrices)
    wrong = ~_are_eigenvectors(matrices, values, vectors)
    if bool(wrong.any()):
        _log.warning(
            "headgram: %d of %d eigenproblems did not hold on the GPU, and are solved on the CPU", wrong.sum(), len(wrong)
        )
        values[wrong], vectors[wrong] = (found.to(matrices.device) for found in torch.linalg.eigh(matrices[wrong].cpu()))
    return values, vectors


def _batched_eigh(matrices: Float[Tensor, "heads n n"]) -> tuple[Tensor, Tensor]:
    """By torch; where torch is older and would solve one after the other, by CuPy if it is installed."""
    cupy = _cupy() if torch.__version__ < _BATCHED_IN_TORCH else None  # compared as versions
    if cupy and matrices.device.type == "cuda":
        with cupy.cuda.Device(matrices.device.index):
            found = cupy.linalg.eigh(cupy.from_dlpack(matrices))
        values, vectors = (torch.utils.dlpack.from_dlpack(each) for each in found)
    else:
        values, vectors = torch.linalg.eigh(matrices)
    return values, vectors


def _cupy() -> Any:
    """CuPy, or None where it is not installed or finds no CUDA of its own version."""
    try:
        import cupy
    except ImportError:
        return None
    return cupy


def _solved_in_part(matrix: Float[Tensor, "n n"], count: int) -> tuple[Float[Tensor, " n"], Float[Tensor, "count n"]]:
    """Of one matrix, on a CPU."""
    from scipy.linalg.lapack import dormqr, dstein, dsterf, dsytrd  # costs time where no spectrum is measured

    a = matrix.numpy()
    n = len(a)
    reflectors, diagonal, beside, scales, _ = dsytrd(a.T, lower=1, lwork=_BLOCK * n)
    values, failed = dsterf(diagonal, beside)
    order = _by_magnitude(torch.from_numpy(values)[None])[0].numpy()
    wanted = np.sort(order[:count])
    # As one block: where the tridiagonal form splits, the check below decides.
    blocks, ends = np.ones(n, dtype=np.int32), np.full(n, n, dtype=np.int32)
    columns, not_converged = dstein(diagonal, beside, values[wanted], blocks, ends)
    columns[1:], _, _ = dormqr("L", "N", reflectors[1:, :-1], scales, columns[1:], lwork=_BLOCK * n)
    if (
        failed
        or not_converged
        or not _are_eigenvectors(matrix[None], *(torch.from_numpy(each)[None] for each in (values[wanted], columns)))
    ):
        ascending, vectors = _all(matrix[None], count)
        return ascending[0], vectors[0]
    rows = columns[:, np.searchsorted(wanted, order[:count])].T
    return torch.from_numpy(values[order]), torch.from_numpy(np.ascontiguousarray(rows))


def _are_eigenvectors(
    matrices: Float[Tensor, "heads n n"], values: Float[Tensor, "heads k"], columns: Float[Tensor, "heads n k"]
) -> Bool[Tensor, " heads"]:
    """Whether columns are orthonormal eigenvectors, as far as rounding lets them; not where one is not a number."""
    identity = torch.eye(values.shape[-1], dtype=values.dtype, device=values.device)
    overlap = (columns.mT @ columns - identity).abs().amax((-1, -2))
    residual = (matrices @ columns - columns * values[:, None]).abs().amax((-1, -2))
    limit = _ROUNDING * matrices.shape[-1]
    return (overlap <= limit) & (residual <= limit * values.abs().amax(-1))


def _by_magnitude(values: Float[Tensor, "heads n"]) -> Int[Tensor, "heads n"]:
    """Indices that sort by magnitude, largest first; of a pair `±λ` that rounding cannot tell apart, the positive first."""
    magnitude = values.abs()
    slack = 1e-12 * magnitude.amax(-1, keepdim=True)
    return torch.argsort(magnitude + slack * (values > 0), dim=-1, descending=True, stable=True)
