"""Symmetry and directionality scores, of every head and of a whole layer.

After Saponati et al., "The underlying structures of self-attention: symmetry, directionality, and emergent dynamics in
Transformer training" (arXiv:2502.10927), definitions 3.1 and 3.2. Their matrix `W_qk = W_q W_k^T` is our `g^T`: its rows are
the query side, its columns the key side.

    symmetry        (‖S‖_F² - ‖A‖_F²) / ‖g‖_F² = <g, g^T> / ‖g‖_F²       S, A: symmetric and antisymmetric part
    directionality  (Q - K) / (Q + K)                                   Q, K: sums of the query and key side's large norms

where a norm counts as large if it exceeds the mean of its side's `d` norms by more than two standard deviations. Of any form `X
= A^T B`, the right side takes the place of the queries. With `A^T = U R`, `U` orthonormal, the norms of a head's right side are
those of the columns of `R B`, and the left side's follow in the same way: `X` is never formed (`headgram.geometry.spectra`). The
form of a layer, the sum of its heads' forms, is met in pairs of blocks, so that it is never held whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.errors import HeadgramError
from headgram.forms.heads import Heads
from headgram.forms.transforms import transposed
from headgram.geometry.checks import is_finite
from headgram.geometry.ratios import ZERO, ratio

#: Bytes of float64 working memory of the weights that blocks of a layer's form are made of. A constant, so that the last bit of
#: the result does not depend on the machine.
BLOCK_BYTES = 256 * 2**20
#: Rows and columns of a block of the layer's form: on a CPU, a few blocks should lie in a cache.
BLOCK = {"cpu": 512, "cuda": 4096}

#: Standard deviations above the mean from which on a norm is large.
_DEVIATIONS = 2
#: A norm must exceed the threshold by this share of it: rounding must not choose among norms that are all equal.
_SLACK = 1e-9


class LayerScores(NamedTuple):
    """Scores of the sum of a layer's forms."""

    symmetry_score: float
    directionality: float


def symmetry_score(fro_sq: Float[Tensor, "*shape"], self_overlap: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`<g, g^T> / ‖g‖_F²`: 1 for symmetric, -1 for antisymmetric forms, near 0 for random ones; 0 for zero forms."""
    return ratio(self_overlap, fro_sq).clamp(-1, 1)


def directionality(right: Float[Tensor, "*n hidden"], left: Float[Tensor, "*n hidden"]) -> Float[Tensor, "*n"]:
    """Of forms, from the norms of their right and of their left side: in `[-1, 1]`, 0 for zero forms."""
    large_right, large_left = _large(right), _large(left)
    return ratio(large_right - large_left, large_right + large_left)


@torch.no_grad()
def layer_scores(heads: Heads) -> LayerScores:
    """Scores of the sum of some heads' forms, `sum_h A_h^T B_h`: of a layer, where these are its heads.

    Raises
    ------
    HeadgramError
        If the sum overflows float64.
    """
    if len(heads.b) < len(heads.a):
        turned = layer_scores(transposed(heads))
        return LayerScores(turned.symmetry_score, -turned.directionality)
    of_left = heads.reads_b[heads.reads_a.argsort(stable=True)].to(heads.device)  # in one copy, cut there
    readers = of_left.split(heads.reads_a.bincount(minlength=len(heads.a)).tolist())
    width = heads.widths[0]
    size = max(1, BLOCK_BYTES // (8 * 4 * len(heads.a) * heads.rank))
    slices = [slice(start, min(start + size, width)) for start in range(0, width, size)]

    def sides(columns: slice) -> tuple[Float[Tensor, "rows n"], Float[Tensor, "rows n"]]:
        """Columns of the right factors, summed over those that go with one left factor, and of the left ones."""
        b = torch.cat([heads.b[..., columns][members].double().sum(0) for members in readers])
        return b, heads.a[..., columns].double().flatten(0, 1)

    right, left = (torch.zeros(width, dtype=torch.float64, device=heads.device) for _ in range(2))
    overlap, weight_b, weight_a = (torch.zeros((), dtype=torch.float64, device=heads.device) for _ in range(3))
    for place, own in enumerate(slices):
        b, a = sides(own)
        weight_b, weight_a = weight_b + b.square().sum(), weight_a + a.square().sum()
        for other in slices[place:]:
            b_other, a_other = (b, a) if other is own else sides(other)
            for i, j in _blocks(b.shape[1], b_other.shape[1], other is own, BLOCK[heads.device.type]):
                diagonal = other is own and i == j
                block = a[:, i].T @ b_other[:, j]  # X[i, j]
                mirror = block.T if diagonal else b[:, i].T @ a_other[:, j]  # X[j, i]^T
                overlap = overlap + (block * mirror).sum() * (1 if diagonal else 2)
                squares = block.square()
                left[own][i] += squares.sum(1)
                right[other][j] += squares.sum(0)
                if not diagonal:
                    squares = mirror.square()
                    right[own][i] += squares.sum(1)
                    left[other][j] += squares.sum(0)
    if not is_finite(right, left, overlap):
        raise HeadgramError("The form of a layer overflows float64: rescale its weights.")
    fro_sq = right.sum()
    alive = fro_sq.sqrt() > ZERO * weight_b.sqrt() * weight_a.sqrt()
    scores = torch.stack([symmetry_score(fro_sq, overlap), directionality(right.sqrt(), left.sqrt())])
    return LayerScores(*scores.where(alive, 0).tolist())


def _blocks(rows: int, columns: int, same: bool, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into square blocks; one whose sides are the same, into those on and above the diagonal."""
    for a in range(0, rows, size):
        for b in range(a if same else 0, columns, size):
            yield slice(a, min(a + size, rows)), slice(b, min(b + size, columns))


def _large(norms: Float[Tensor, "*n hidden"]) -> Float[Tensor, "*n"]:
    """The sum of the norms that exceed their mean by more than two standard deviations."""
    deviation = norms.std(-1, correction=min(1, norms.shape[-1] - 1), keepdim=True)
    threshold = norms.mean(-1, keepdim=True) + _DEVIATIONS * deviation
    return norms.where(norms > threshold * (1 + _SLACK), 0).sum(-1)
