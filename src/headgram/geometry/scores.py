"""Symmetry and directionality scores, of every head and of a whole layer.

After Saponati et al., "The underlying structures of self-attention: symmetry, directionality, and emergent dynamics in
Transformer training" (arXiv:2502.10927), definitions 3.1 and 3.2. Their matrix `W_qk = W_q W_k^T` is our `g^T`: its rows are
the query side, its columns the key side.

    symmetry        (‖S‖_F² - ‖A‖_F²) / ‖g‖_F² = <g, g^T> / ‖g‖_F²       S, A: symmetric and antisymmetric part
    directionality  (Q - K) / (Q + K)                                   Q, K: sums of the query and key side's large norms

where a norm counts as large if it exceeds the mean of its side's `d` norms by more than two standard deviations. With
`W_K^T = U R`, `U` orthonormal, the norms of a head's query side are those of the columns of `R W_Q`, and the key side's follow in
the same way: its `g` is never formed (`headgram.geometry.heads`). The form of a layer, the sum of its heads' forms, is met in
pairs of blocks, so that it is never held whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.errors import HeadgramError
from headgram.geometry.checks import is_finite
from headgram.geometry.grouping import groups
from headgram.geometry.ratios import ratio

#: Bytes of float64 working memory of the weights that blocks of a layer's form are made of. A constant, so that the last bit of
#: the result does not depend on the machine.
BATCH_BYTES = 256 * 2**20
#: Rows and columns of a block of the layer's form: on a CPU, a few blocks should lie in a cache.
BLOCK = {"cpu": 512, "cuda": 4096}

#: Norms below this many units of rounding of `‖W_Q‖ ‖W_K‖` cannot be told from zero.
_ZERO = 16 * torch.finfo(torch.float64).eps
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


def directionality(query: Float[Tensor, "*n hidden"], key: Float[Tensor, "*n hidden"]) -> Float[Tensor, "*n"]:
    """Of forms, from the norms of their query and of their key side: in `[-1, 1]`, 0 for zero forms."""
    large_query, large_key = _large(query), _large(key)
    return ratio(large_query - large_key, large_query + large_key)


@torch.no_grad()
def layer_scores(w_q: Float[Tensor, "heads rank hidden"], w_k: Float[Tensor, "kv_heads rank hidden"]) -> LayerScores:
    """Scores of a layer's form `sum_h W_K[h]^T W_Q[h]`, key heads repeated.

    Parameters
    ----------
    w_q : (H, r, d)
        Query weights, any floating dtype, any device.
    w_k : (K, r, d)
        Key weights; query head `h` reads key head `h * K // H`.

    Raises
    ------
    HeadgramError
        If the form overflows float64.
    """
    heads, rank, hidden = w_q.shape
    readers = [members for _, members in groups(heads, len(w_k))]
    size = max(1, BATCH_BYTES // (8 * 4 * len(w_k) * rank))
    slices = [slice(start, min(start + size, hidden)) for start in range(0, hidden, size)]

    def sides(columns: slice) -> tuple[Float[Tensor, "rows n"], Float[Tensor, "rows n"]]:
        """Columns of the queries, summed over those that read one key head, and of the keys; all heads below one another."""
        q = torch.cat([w_q[members.start : members.stop, :, columns].double().sum(0) for members in readers])
        return q, w_k[..., columns].double().flatten(0, 1)

    query, key = (torch.zeros(hidden, dtype=torch.float64, device=w_q.device) for _ in range(2))
    overlap, weight_q, weight_k = (torch.zeros((), dtype=torch.float64, device=w_q.device) for _ in range(3))
    for i, own in enumerate(slices):
        q, k = sides(own)
        weight_q, weight_k = weight_q + q.square().sum(), weight_k + k.square().sum()
        for other in slices[i:]:
            q_other, k_other = (q, k) if other is own else sides(other)
            for a, b in _blocks(q.shape[1], q_other.shape[1], other is own, BLOCK[w_q.device.type]):
                diagonal = other is own and a == b
                block = k[:, a].T @ q_other[:, b]  # g[a, b]
                mirror = block.T if diagonal else q[:, a].T @ k_other[:, b]  # g[b, a]^T
                overlap = overlap + (block * mirror).sum() * (1 if diagonal else 2)
                squares = block.square()
                key[own][a] += squares.sum(1)
                query[other][b] += squares.sum(0)
                if not diagonal:
                    squares = mirror.square()
                    query[own][a] += squares.sum(1)
                    key[other][b] += squares.sum(0)
    if not all(is_finite(value) for value in (query, key, overlap)):
        raise HeadgramError("The form of a layer overflows float64: rescale its weights.")
    fro_sq = query.sum()
    if fro_sq.sqrt() <= _ZERO * weight_q.sqrt() * weight_k.sqrt():
        return LayerScores(0.0, 0.0)
    return LayerScores(symmetry_score(fro_sq, overlap).item(), directionality(query.sqrt(), key.sqrt()).item())


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
