"""The Frobenius inner product of every layer pair's heads.

    <g_a, g_b> = tr(g_a^T g_b) = sum((W_K,a W_K,b^T) * (W_Q,a W_Q,b^T))

so two `r × r` products replace the `d × d` forms, and the key product is shared by all query heads of a group.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.errors import HeadgramError
from headgram.geometry.grouping import key_head

#: Bytes of float64 working memory of one block of products; a constant, so that the blocking, and with it the last
#: bit of the result, does not depend on the machine.
BLOCK_BYTES = 128 * 2**20


@torch.no_grad()
def gram(
    w_q_a: Float[Tensor, "layers_a heads rank hidden"],
    w_k_a: Float[Tensor, "layers_a kv_heads rank hidden"],
    w_q_b: Float[Tensor, "layers_b heads rank hidden"],
    w_k_b: Float[Tensor, "layers_b kv_heads rank hidden"],
) -> Float[Tensor, "layers_a layers_b heads"]:
    """Inner products of the heads of two runs of layers.

    Parameters
    ----------
    w_q_a, w_q_b : (n_a, H, r, d), (n_b, H, r, d)
        Query weights, leading axis: layers. Any floating dtype; products are taken in float64.
    w_k_a, w_k_b : (n_a, K, r, d), (n_b, K, r, d)
        Key weights; query head `h` reads key head `h * K // H`.

    Returns
    -------
    (n_a, n_b, H) float64
        `[i, j, h] = <g_i^h, g_j^h>`.

    Raises
    ------
    HeadgramError
        If the shapes do not fit together.
    """
    _check_shapes(w_q_a, w_k_a, w_q_b, w_k_b)
    n_a, heads, rank, hidden = w_q_a.shape
    n_b, kv_heads = len(w_q_b), w_k_a.shape[1]
    result = torch.zeros(n_a, n_b, heads, dtype=torch.float64, device=w_q_a.device)
    step = max(1, int(BLOCK_BYTES // (8 * rank * max(4 * hidden, 1))))
    step = max(1, min(step, int((BLOCK_BYTES / (16 * rank * rank)) ** 0.5)))
    groups = key_head(heads, kv_heads)
    for kv in range(kv_heads):
        members = torch.nonzero(groups == kv).flatten().tolist()
        for i in range(0, n_a, step):
            for j in range(0, n_b, step):
                block = (slice(i, i + step), slice(j, j + step))
                keys = _products(w_k_a[block[0], kv], w_k_b[block[1], kv])
                for head in members:
                    queries = _products(w_q_a[block[0], head], w_q_b[block[1], head])
                    result[(*block, head)] = (queries * keys).sum((1, 3))
    return result


def _products(a: Float[Tensor, "n_a rank hidden"], b: Float[Tensor, "n_b rank hidden"]) -> Float[Tensor, "n_a rank n_b rank"]:
    """`W_a W_b^T` of every pair of layers: one large matrix product."""
    rows = a.double().flatten(0, 1) @ b.double().flatten(0, 1).T
    return rows.view(*a.shape[:2], *b.shape[:2])


def _check_shapes(w_q_a: Tensor, w_k_a: Tensor, w_q_b: Tensor, w_k_b: Tensor) -> None:
    shapes = [tuple(weight.shape) for weight in (w_q_a, w_k_a, w_q_b, w_k_b)]
    four = all(len(shape) == 4 and 0 not in shape for shape in shapes)
    if not four or len(w_q_a) != len(w_k_a) or len(w_q_b) != len(w_k_b):
        raise HeadgramError(f"gram takes query (n, H, r, d) and key (n, K, r, d) weights of two runs of layers, not {shapes}.")
    (_, heads, *inner), (_, kv_heads, *inner_k), (_, heads_b, *inner_b), (_, kv_heads_b, *inner_kb) = shapes
    if not (inner == inner_k == inner_b == inner_kb and heads == heads_b and kv_heads == kv_heads_b and kv_heads <= heads):
        raise HeadgramError(f"The two runs of layers differ in heads, key heads, rank or width: {shapes}.")
