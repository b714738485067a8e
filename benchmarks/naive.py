"""The original script's arithmetic, one head at a time, without what only that script defines."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def spectra(w_q: Tensor, w_k: Tensor, topk: int = 8) -> None:
    """Singular values, directions and signed eigenvalues of one layer, `(H, r, d)` and `(K, r, d)`."""
    heads, rank, _ = w_q.shape
    swap = torch.eye(2 * rank, device=w_q.device).roll(rank, 0)
    for head in range(heads):
        q, k = w_q[head].float(), w_k[head * len(w_k) // heads].float()
        _, _, vh = torch.linalg.svd(k @ q.T, full_matrices=False)
        directions = vh @ q
        directions = directions / directions.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        directions[:topk].cpu()
        x = torch.cat([q, k])
        values = torch.linalg.eigvals(swap @ (x @ x.T)).real.cpu().double()
        values[torch.argsort(values.abs(), descending=True)]


def gram(w_q: Tensor, w_k: Tensor) -> Tensor:
    """Inner products of all pairs of layers, `(L, H, r, d)` and `(L, K, r, d)` to `(L, L, H)`: a pair and a head at a time."""
    layers, heads = w_q.shape[:2]
    q, k = w_q.float(), w_k.float()
    result = torch.zeros(layers, layers, heads, dtype=torch.float64)
    for a in range(layers):
        for b in range(a, layers):
            for head in range(heads):
                kv = head * w_k.shape[1] // heads
                value = float(((k[a, kv] @ k[b, kv].T) * (q[a, head] @ q[b, head].T)).sum())
                result[a, b, head] = result[b, a, head] = value
    return result


def all_pairs(w_q: Tensor, w_k: Tensor, pairs: int) -> list[float]:
    """`<g_a, g_b>` of the first so many pairs of any two heads, in float32, as products of factored matrices are taken in
    TransformerLens: `g_a^T g_b = Q_a^T (K_a K_b^T Q_b)` keeps the left factor, and its trace is the sum over both."""
    return [float((q_a * (k_a @ k_b.T @ q_b)).sum()) for q_a, k_a, q_b, k_b in _pairs(w_q, w_k, pairs)]


def both_numbers(w_q: Tensor, w_k: Tensor, pairs: int) -> list[tuple[float, float]]:
    """`<g_a, g_b>` and `<g_a, g_b^T>` of the same pairs, each as the script takes the first."""
    return [
        (float(((k_a @ k_b.T) * (q_a @ q_b.T)).sum()), float(((q_a @ k_b.T) * (k_a @ q_b.T)).sum()))
        for q_a, k_a, q_b, k_b in _pairs(w_q, w_k, pairs)
    ]


def _pairs(w_q: Tensor, w_k: Tensor, pairs: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Query and key of both heads, in float32."""
    heads = w_q.shape[1]
    q, k = w_q.float(), w_k.float()
    for pair in range(pairs):
        (layer_a, head_a), (layer_b, head_b) = (divmod(place, heads) for place in divmod(pair, len(w_q) * heads))
        key_a, key_b = (head * w_k.shape[1] // heads for head in (head_a, head_b))
        yield q[layer_a, head_a], k[layer_a, key_a], q[layer_b, head_b], k[layer_b, key_b]


def composition(w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, pairs: int) -> list[float]:
    """K-composition, `‖o_a^T g_b‖ / (‖o_a‖ ‖g_b‖)`, of the first so many pairs of heads, a pair at a time, in float32."""
    heads = w_q.shape[1]
    found = []
    for pair in range(pairs):
        a, b = pair % (len(w_q) * heads), pair // (len(w_q) * heads)
        (layer_a, head_a), (layer_b, head_b) = divmod(a, heads), divmod(b, heads)
        q, k = w_q[layer_b, head_b].float(), w_k[layer_b, head_b * w_k.shape[1] // heads].float()
        o, v = w_o[layer_a, head_a].float(), w_v[layer_a, head_a * w_v.shape[1] // heads].float()
        qq, vv, middle = q @ q.T, v @ v.T, o @ k.T
        composed = ((vv @ middle) * (middle @ qq)).sum()
        found.append(float((composed / ((k @ k.T) * qq).sum() / ((o @ o.T) * vv).sum()).sqrt()))
    return found
