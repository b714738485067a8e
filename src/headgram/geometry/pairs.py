"""The Frobenius inner product of every layer pair's heads.

    <g_a, g_b> = tr(g_a^T g_b) = sum((W_K,a W_K,b^T) * (W_Q,a W_Q,b^T))

so two `r × r` products replace the `d × d` forms, and the key product is shared by all query heads of a group. The keys are
made orthonormal before, `W_K^T = U R` and `g = U (R W_Q)`: then no product is larger than the forms themselves, and nothing
cancels where a form is much smaller than its weights.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.errors import HeadgramError
from headgram.geometry.checks import check_weights
from headgram.geometry.grouping import key_head

#: Bytes of float64 working memory of one side of a block; a constant, so that the blocking, and with it the last bit of the
#: result, does not depend on the machine.
BLOCK_BYTES = 256 * 2**20


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
        If the shapes do not fit together, a weight is not finite, or a product overflows float64.
    """
    _check(w_q_a, w_k_a, w_q_b, w_k_b)
    n_a, heads, rank, hidden = w_q_a.shape
    n_b, kv_heads = len(w_q_b), w_k_a.shape[1]
    result = torch.zeros(n_a, n_b, heads, dtype=torch.float64, device=w_q_a.device)
    groups = key_head(heads, kv_heads)
    for kv in range(kv_heads):
        members = torch.nonzero(groups == kv).flatten().tolist()
        step = max(1, BLOCK_BYTES // (16 * (1 + len(members)) * rank * hidden))
        for i in range(0, n_a, step):
            side_a = _orthonormal_keys(w_q_a[i : i + step, members], w_k_a[i : i + step, kv])
            for j in range(0, n_b, step):
                side_b = _orthonormal_keys(w_q_b[j : j + step, members], w_k_b[j : j + step, kv])
                keys = _products(side_a[1], side_b[1])
                for place, head in enumerate(members):
                    queries = _products(side_a[0][:, place], side_b[0][:, place])
                    result[i : i + step, j : j + step, head] = (queries * keys).sum((1, 3))
    if not bool(torch.isfinite(result).all()):
        raise HeadgramError("An inner product overflows float64: rescale the weights.")
    return result


def _orthonormal_keys(
    w_q: Float[Tensor, "n members rank hidden"], w_k: Float[Tensor, "n rank hidden"]
) -> tuple[Float[Tensor, "n members m hidden"], Float[Tensor, "n m hidden"]]:
    """Weights of the same forms in float64, with orthonormal keys; `m = min(r, d)`."""
    basis, upper = torch.linalg.qr(w_k.double().mT)
    return upper[:, None] @ w_q.double(), basis.mT


def _products(a: Float[Tensor, "n_a m hidden"], b: Float[Tensor, "n_b m hidden"]) -> Float[Tensor, "n_a m n_b m"]:
    """`W_a W_b^T` of every pair of layers: one large matrix product."""
    rows = a.flatten(0, 1) @ b.flatten(0, 1).T
    return rows.view(*a.shape[:2], *b.shape[:2])


def _check(w_q_a: Tensor, w_k_a: Tensor, w_q_b: Tensor, w_k_b: Tensor) -> None:
    shapes = [tuple(weight.shape) for weight in (w_q_a, w_k_a, w_q_b, w_k_b)]
    four = all(len(shape) == 4 and 0 not in shape for shape in shapes)
    if not four or len(w_q_a) != len(w_k_a) or len(w_q_b) != len(w_k_b):
        raise HeadgramError(f"gram takes query (n, H, r, d) and key (n, K, r, d) weights of two runs of layers, not {shapes}.")
    (_, heads, *inner), (_, kv_heads, *inner_k), (_, heads_b, *inner_b), (_, kv_heads_b, *inner_kb) = shapes
    if not (inner == inner_k == inner_b == inner_kb and heads == heads_b and kv_heads == kv_heads_b and kv_heads <= heads):
        raise HeadgramError(f"The two runs of layers differ in heads, key heads, rank or width: {shapes}.")
    for weights in (w_q_a, w_q_b):
        check_weights("query", weights)
    for weights in (w_k_a, w_k_b):
        check_weights("key", weights)
