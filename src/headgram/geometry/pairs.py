"""The Frobenius inner products of every layer pair's heads, `<g_a, g_b>` and `<g_a, g_b^T>`.

How they are formed is said in `headgram.geometry.routes`. In float64 the keys are made orthonormal before, `W_K^T = U R` and
`g = U (R W_Q)`: then no product is larger than the forms themselves, and nothing cancels where a form is much smaller than its
weights. Weights of at most 32 bits may be multiplied in float32, which is several times faster. The error is then a few units
of rounding of `‖W_Q‖ ‖W_K‖ / √r`, the size of the form of random weights; so each form's norm is looked at, and a head with a
form that is much smaller than that is measured again in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headgram.errors import HeadgramError
from headgram.geometry.checks import check_floating, check_weights, is_finite
from headgram.geometry.costs import Route, cheapest
from headgram.geometry.grouping import groups
from headgram.geometry.routes import Inner, Side, by_products, by_strips

#: In float32, forms may be this much smaller than those of random weights of the same norms.
_SMALL = 0.1

#: Frobenius norms of weights that can be trusted in float32.
_NORMS = 1e-15, 1e15

#: Bytes of float64 working memory; a constant, so that the blocking does not depend on the machine.
EXACT_BYTES = 512 * 2**20

Precision = Literal["auto", "float64"]


@dataclass(frozen=True)
class PairProducts:
    """Inner products of the heads of two runs of layers; float64, on the device of the weights.

    Attributes
    ----------
    gram : (n_a, n_b, H)
        `[i, j, h] = <g_i^h, g_j^h> = tr(g_i^T g_j)`.
    transposed : (n_a, n_b, H)
        `[i, j, h] = <g_i^h, (g_j^h)^T> = tr(g_i g_j)`. With `gram` it gives the inner products of the symmetric parts,
        `(gram + transposed) / 2`, and of the antisymmetric parts, `(gram - transposed) / 2`.
    exact : (H,)
        Which heads were measured in float64.
    route
        How: `products` or `strips`, see `headgram.geometry.routes`.
    """

    gram: Float[Tensor, "layers_a layers_b heads"]
    transposed: Float[Tensor, "layers_a layers_b heads"]
    exact: Bool[Tensor, " heads"]
    route: Route


def gram(
    w_q_a: Float[Tensor, "layers_a heads rank hidden"],
    w_k_a: Float[Tensor, "layers_a kv_heads rank hidden"],
    w_q_b: Float[Tensor, "layers_b heads rank hidden"],
    w_k_b: Float[Tensor, "layers_b kv_heads rank hidden"],
) -> Float[Tensor, "layers_a layers_b heads"]:
    """`PairProducts.gram` in float64: `[i, j, h] = <g_i^h, g_j^h>`. Arguments and errors as for `pair_products`."""
    return pair_products(w_q_a, w_k_a, w_q_b, w_k_b).gram


@torch.no_grad()
def pair_products(
    w_q_a: Float[Tensor, "layers_a heads rank hidden"],
    w_k_a: Float[Tensor, "layers_a kv_heads rank hidden"],
    w_q_b: Float[Tensor, "layers_b heads rank hidden"],
    w_k_b: Float[Tensor, "layers_b kv_heads rank hidden"],
    precision: Precision = "float64",
) -> PairProducts:
    """Inner products of the heads of two runs of layers.

    Parameters
    ----------
    w_q_a, w_q_b : (n_a, H, r, d), (n_b, H, r, d)
        Query weights, leading axis: layers. Any floating dtype, any device.
    w_k_a, w_k_b : (n_a, K, r, d), (n_b, K, r, d)
        Key weights; query head `h` reads key head `h * K // H`.
    precision
        `float64`, or `auto`: float32 where weights are no wider and no form is too small for it. The error is then
        below `1e-6 ‖g_a‖ ‖g_b‖`.

    Raises
    ------
    HeadgramError
        If the shapes do not fit together, a weight is not finite, or a product overflows float64.
    """
    _check(w_q_a, w_k_a, w_q_b, w_k_b)
    same = w_q_a is w_q_b and w_k_a is w_k_b
    n_a, heads, rank, hidden = w_q_a.shape
    route = cheapest(n_a, len(w_q_b), min(rank, hidden), hidden, same)
    narrow = precision == "auto" and max(weights.element_size() for weights in (w_q_a, w_k_a, w_q_b, w_k_b)) <= 4
    results: list[Inner] = []
    exact: list[bool] = []
    for kv, members in groups(heads, w_k_a.shape[1]):
        keys = [weights[:, kv] for weights in (w_k_a, w_k_b)][: 1 if same else 2]
        scaled_keys = [_scaled(weights) for weights in keys] if narrow else []
        for head in members:
            queries = [weights[:, head] for weights in (w_q_a, w_q_b)][: len(keys)]
            inner = _in_float32([_scaled(weights) for weights in queries], scaled_keys, route) if narrow else None
            exact.append(inner is None)
            results.append(inner or _in_float64(queries, keys, route))
    products, transposed = (torch.stack(values, 2) for values in zip(*results, strict=True))
    if not (is_finite(products) and is_finite(transposed)):
        for name, weights in (("query", w_q_a), ("key", w_k_a), ("query", w_q_b), ("key", w_k_b)):
            check_weights(name, weights)
        raise HeadgramError("An inner product overflows float64: rescale the weights.")
    return PairProducts(products, transposed, torch.tensor(exact), route)


def _multiply(sides: Sequence[Side], route: Route) -> Inner:
    """Inner products of two sides, or of one with itself."""
    return (by_strips if route == "strips" else by_products)(sides[0], sides[-1])


def _in_float64(queries: Sequence[Tensor], keys: Sequence[Tensor], route: Route) -> Inner:
    """Products in float64, a block of layers at a time."""
    (n_a, rank, hidden), n_b = queries[0].shape, len(queries[-1])
    step = max(1, EXACT_BYTES // (128 * rank * hidden))
    gram = torch.zeros(n_a, n_b, dtype=torch.float64, device=queries[0].device)
    inner = Inner(gram, torch.zeros_like(gram))
    for i in range(0, n_a, step):
        side_a = _orthonormal_keys(queries[0][i : i + step], keys[0][i : i + step])
        for j in range(0, n_b, step):
            same = len(queries) == 1 and i == j
            side_b = side_a if same else _orthonormal_keys(queries[-1][j : j + step], keys[-1][j : j + step])
            for whole, part in zip(inner, _multiply([side_a, side_b], route), strict=True):
                whole[i : i + step, j : j + step] = part
    return inner


def _orthonormal_keys(w_q: Float[Tensor, "layers rank hidden"], w_k: Float[Tensor, "layers rank hidden"]) -> Side:
    """Weights of the same forms in float64, with orthonormal keys; `m = min(r, d)`."""
    basis, upper = torch.linalg.qr(w_k.double().mT)
    return Side(basis.mT, upper @ w_q.double())


class _Scaled(NamedTuple):
    """Weights of one head in float32, each layer divided by the power of two below its Frobenius norm."""

    weights: Float[Tensor, "layers rank hidden"]
    unit: Float[Tensor, " layers"]  # that power, float64
    norm: Float[Tensor, " layers"]  # after it, between 1 and 2, or 0; NaN where it is not known; float64


def _scaled(weights: Float[Tensor, "layers rank hidden"]) -> _Scaled:
    wide = weights.float()
    norm = torch.linalg.vector_norm(wide, dim=(-1, -2))
    alive = (wide != 0).any(-1).any(-1) if bool((norm < _NORMS[0]).any()) else norm > 0
    # Where squares may under- or overflow, no norm is known; nothing is accurate then.
    norm = norm.double().where(~alive | ((norm > _NORMS[0]) & (norm < _NORMS[1])), torch.nan)
    unit = torch.ldexp(torch.ones_like(norm), norm.log2().floor().where(norm > 0, 0))
    return _Scaled(wide * (1 / unit).float()[:, None, None], unit, norm / unit)


def _in_float32(queries: Sequence[_Scaled], keys: Sequence[_Scaled], route: Route) -> Inner | None:
    """Products in float32; nothing if those would not be accurate."""
    sides = [Side(k.weights, q.weights) for q, k in zip(queries, keys, strict=True)]
    inner = _multiply(sides, route)
    norms_sq = [inner.gram.diagonal()] if len(sides) == 1 else [_norms_sq(side) for side in sides]
    for q, k, norm_sq in zip(queries, keys, norms_sq, strict=True):
        expected = (q.norm * k.norm).square() / q.weights.shape[1]
        if not bool((norm_sq >= _SMALL**2 * expected).all()):  # also where one is not finite
            return None
    units = [q.unit * k.unit for q, k in zip(queries, keys, strict=True)]
    unit = units[0][:, None] * units[-1]
    return Inner(inner.gram * unit, inner.transposed * unit)


def _norms_sq(side: Side) -> Float[Tensor, " layers"]:
    """`‖g‖²` of every form."""
    return ((side.k @ side.k.mT) * (side.q @ side.q.mT)).sum((-1, -2), dtype=torch.float64)


def _check(w_q_a: Tensor, w_k_a: Tensor, w_q_b: Tensor, w_k_b: Tensor) -> None:
    shapes = [tuple(weight.shape) for weight in (w_q_a, w_k_a, w_q_b, w_k_b)]
    four = all(len(shape) == 4 and 0 not in shape for shape in shapes)
    if not four or len(w_q_a) != len(w_k_a) or len(w_q_b) != len(w_k_b):
        raise HeadgramError(f"gram takes query (n, H, r, d) and key (n, K, r, d) weights of two runs of layers, not {shapes}.")
    (_, heads, *inner), (_, kv_heads, *inner_k), (_, heads_b, *inner_b), (_, kv_heads_b, *inner_kb) = shapes
    if not (inner == inner_k == inner_b == inner_kb and heads == heads_b and kv_heads == kv_heads_b and kv_heads <= heads):
        raise HeadgramError(f"The two runs of layers differ in heads, key heads, rank or width: {shapes}.")
    for name, weights in (("query", w_q_a), ("key", w_k_a), ("query", w_q_b), ("key", w_k_b)):
        check_floating(name, weights)
