"""Symmetric eigenproblems of which all values are wanted, but only the vectors of the largest magnitudes.

On a CPU: Householder's tridiagonal form, all values by the root-free QL iteration, the wanted vectors by inverse iteration
(Golub & Van Loan, Matrix Computations, 8.2-8.4), in less than half of the time that all vectors take. Inverse iteration may fail
in tight clusters, so its vectors are held against the matrix; where they do not hold, and where a large part of all vectors is
wanted, all are computed by divide and conquer. On a GPU all matrices are solved at once, with all vectors.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

#: Residuals and overlaps of vectors above this many units of rounding, for each row, are not trusted.
_ROUNDING = 8 * np.finfo(np.float64).eps
#: Vectors one by one are worth it up to this share of them.
_FEW = 1 / 6
#: Columns that LAPACK works on at once.
_BLOCK = 32


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
    if matrices.device.type == "cpu" and count <= _FEW * n:
        found = [_few(matrix, count) for matrix in matrices]
        return torch.stack([values for values, _ in found]), torch.stack([vectors for _, vectors in found])
    return _all(matrices, count)


def _all(matrices: Float[Tensor, "heads n n"], count: int) -> tuple[Float[Tensor, "heads n"], Float[Tensor, "heads count n"]]:
    values, vectors = torch.linalg.eigh(matrices)
    order = _by_magnitude(values)
    return values.gather(-1, order), vectors.gather(-1, order[:, None, :count].expand(-1, vectors.shape[-2], -1)).mT


def _few(matrix: Float[Tensor, "n n"], count: int) -> tuple[Float[Tensor, " n"], Float[Tensor, "count n"]]:
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
    if failed or not_converged or not _holds(a, values[wanted], columns):
        ascending, vectors = _all(matrix[None], count)
        return ascending[0], vectors[0]
    rows = columns[:, np.searchsorted(wanted, order[:count])].T
    return torch.from_numpy(values[order]), torch.from_numpy(np.ascontiguousarray(rows))


def _holds(a: NDArray[np.float64], values: NDArray[np.float64], columns: NDArray[np.float64]) -> bool:
    """Whether columns are orthonormal eigenvectors, as far as rounding lets them."""
    off_identity = np.abs(columns.T @ columns - np.eye(len(values))).max()
    residual = np.abs(a @ columns - columns * values).max()
    limit = _ROUNDING * len(a)
    return bool(off_identity <= limit and residual <= limit * np.abs(values).max())


def _by_magnitude(values: Float[Tensor, "heads n"]) -> Int[Tensor, "heads n"]:
    """Indices that sort by magnitude, largest first; of a pair `±λ` that rounding cannot tell apart, the positive first."""
    magnitude = values.abs()
    slack = 1e-12 * magnitude.amax(-1, keepdim=True)
    return torch.argsort(magnitude + slack * (values > 0), dim=-1, descending=True, stable=True)
