"""Symmetry and directionality scores, of every head and of a whole layer.

After Saponati et al., "The underlying structures of self-attention: symmetry, directionality, and emergent dynamics in
Transformer training" (arXiv:2502.10927), definitions 3.1 and 3.2. Their matrix `W_qk = W_q W_k^T` is our `g^T`: its rows are
the query side, its columns the key side.

    symmetry        (‖S‖_F² - ‖A‖_F²) / ‖g‖_F² = <g, g^T> / ‖g‖_F²       S, A: symmetric and antisymmetric part
    directionality  (Q - K) / (Q + K)                                   Q, K: sums of the query and key side's large norms

where a norm counts as large if it exceeds the mean of its side's `d` norms by more than two standard deviations. With the thin
QR factorisation `W_K^T = U R`, the norms of the query side are those of the columns of `R W_Q`, and the key side's follow in
the same way: `g` of a head is never formed. The form of a layer, the sum of its heads' forms, is met in pairs of blocks, so
that it is never held whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.errors import HeadgramError
from headgram.geometry.grouping import groups, key_head
from headgram.geometry.ratios import ratio

#: Bytes of float64 working memory of a batch of heads, and of the weights of a layer's blocks. Constants, so that the last
#: bit of the result does not depend on the machine.
BATCH_BYTES = 256 * 2**20
#: Rows and columns of a block of the layer's form.
BLOCK = 2048

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


@torch.no_grad()
def directionality(
    w_q: Float[Tensor, "heads rank hidden"], w_k: Float[Tensor, "kv_heads rank hidden"]
) -> Float[Tensor, " heads"]:
    """Directionality of every head of a layer.

    Parameters
    ----------
    w_q : (H, r, d)
        Query weights, any floating dtype, any device.
    w_k : (K, r, d)
        Key weights; query head `h` reads key head `h * K // H`.

    Returns
    -------
    (H,) float64
        In `[-1, 1]`: 1 if only the query side has large norms, -1 if only the key side has; 0 for zero forms.
    """
    heads, rank, hidden = w_q.shape
    size = max(1, BATCH_BYTES // (8 * 4 * rank * hidden))  # both sides of a batch, and their products
    reads = key_head(heads, len(w_k))
    r_k = torch.cat([_triangles(w_k[start : start + size]) for start in range(0, len(w_k), size)])
    scores = []
    for start in range(0, heads, size):
        q, read = w_q[start : start + size].double(), reads[start : start + size]
        r_q, r_k_read = _triangles(q), r_k[read]
        query, key = (r_k_read @ q).norm(dim=1), (r_q @ w_k[read].double()).norm(dim=1)
        zero = _ZERO * r_q.flatten(1).norm(dim=1) * r_k_read.flatten(1).norm(dim=1)
        scores.append(_directionality(*(norms.where(norms > zero[:, None], 0) for norms in (query, key))))
    return torch.cat(scores)


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
    size = min(BLOCK, max(1, BATCH_BYTES // (8 * 4 * len(w_k) * rank)))
    slices = [slice(start, start + size) for start in range(0, hidden, size)]

    def sides(columns: slice) -> tuple[Float[Tensor, "rows n"], Float[Tensor, "rows n"]]:
        """Columns of the queries, summed over those that read one key head, and of the keys; all heads below one another."""
        q = torch.cat([w_q[members, :, columns].double().sum(0) for members in readers])
        return q, w_k[..., columns].double().flatten(0, 1)

    query, key = (torch.zeros(hidden, dtype=torch.float64, device=w_q.device) for _ in range(2))
    overlap, weight_q, weight_k = (torch.zeros((), dtype=torch.float64, device=w_q.device) for _ in range(3))
    for i, own in enumerate(slices):
        q, k = sides(own)
        weight_q, weight_k = weight_q + q.square().sum(), weight_k + k.square().sum()
        for other in slices[i:]:
            q_other, k_other = (q, k) if other is own else sides(other)
            above, below = k.T @ q_other, k_other.T @ q  # g[own, other] and g[other, own]
            overlap = overlap + (above * below.T).sum() * (1 if other is own else 2)
            for block, rows, columns in [(above, own, other), (below, other, own)][: 1 if other is own else 2]:
                squares = block.square()
                key[rows] += squares.sum(1)
                query[columns] += squares.sum(0)
    if not all(bool(torch.isfinite(value).all()) for value in (query, key, overlap)):
        raise HeadgramError("The form of a layer overflows float64: rescale its weights.")
    fro_sq = query.sum()
    if fro_sq.sqrt() <= _ZERO * weight_q.sqrt() * weight_k.sqrt():
        return LayerScores(0.0, 0.0)
    return LayerScores(symmetry_score(fro_sq, overlap).item(), _directionality(query.sqrt(), key.sqrt()).item())


def _triangles(weights: Float[Tensor, "n rank hidden"]) -> Float[Tensor, "n m rank"]:
    """`R` of `W^T = U R`, `m = min(r, d)`."""
    triangles: Tensor = torch.linalg.qr(weights.double().mT, mode="r").R
    return triangles


def _directionality(query: Float[Tensor, "*n hidden"], key: Float[Tensor, "*n hidden"]) -> Float[Tensor, "*n"]:
    large_query, large_key = _large(query), _large(key)
    return ratio(large_query - large_key, large_query + large_key)


def _large(norms: Float[Tensor, "*n hidden"]) -> Float[Tensor, "*n"]:
    """The sum of the norms that exceed their mean by more than two standard deviations."""
    deviation = norms.std(-1, correction=min(1, norms.shape[-1] - 1), keepdim=True)
    threshold = norms.mean(-1, keepdim=True) + _DEVIATIONS * deviation
    return norms.where(norms > threshold * (1 + _SLACK), 0).sum(-1)
