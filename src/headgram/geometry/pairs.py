"""The Frobenius inner products of every layer pair's heads, `<g_a, g_b>` and `<g_a, g_b^T>`.

How they are formed is said in `headgram.geometry.routes`. In float64 the keys are made orthonormal before, `W_K^T = U R` and
`g = U (R W_Q)`: then no product is larger than the forms themselves, and nothing cancels where a form is much smaller than its
weights. Weights of at most 32 bits may be multiplied in float32, which is several times faster; on a GPU, bfloat16 by tensor
cores into float32. The error is then a few units
of rounding of `‖W_Q‖ ‖W_K‖ / √r`, the size of the form of random weights; so each form's norm is looked at, and a head with a
form that is much smaller than that is measured again in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from headgram.errors import HeadgramError
from headgram.geometry.batches import at_once, in_batches
from headgram.geometry.checks import check_floating, check_weights, is_finite
from headgram.geometry.costs import CPU, GPU, TENSOR_CORES, Prices, Route, cheapest
from headgram.geometry.grouping import key_head
from headgram.geometry.routes import Inner, Side, by_products, by_strips, longest_sum, multiplied

#: In float32, forms may be this much smaller than those of random weights of the same norms.
_SMALL = 0.1

#: Frobenius norms of weights that can be trusted in float32.
_NORMS = 1e-15, 1e15

#: Bytes of float64 working memory; a constant, so that the blocking does not depend on the machine.
EXACT_BYTES = {"cpu": 512 * 2**20, "cuda": 8 * 2**30}

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
    weights = [(w_q_a, w_k_a), (w_q_b, w_k_b)][: 1 if same else 2]
    (n_a, heads, rank, hidden), kv_heads = w_q_a.shape, w_k_a.shape[1]
    tensor_cores = at_once(w_q_a.device) and all(each.dtype == torch.bfloat16 for pair in weights for each in pair)
    route = cheapest(n_a, len(w_q_b), min(rank, hidden), hidden, same, _prices(w_q_a, tensor_cores))
    narrow = precision == "auto" and max(each.element_size() for pair in weights for each in pair) <= 4

    def measure(run: slice) -> tuple[Inner, Bool[Tensor, " heads"]]:
        reads = key_head(heads, kv_heads)[run]
        queries = [w_q[:, run].transpose(0, 1) for w_q, _ in weights]
        keys = [_read(w_k, reads).transpose(0, 1) for _, w_k in weights]
        if not narrow:
            return _in_float64(queries, keys, route), torch.ones(len(reads), dtype=torch.bool)
        inner, accurate = _in_float32(queries, keys, route, torch.bfloat16 if tensor_cores else torch.float32)
        again = (~accurate.cpu()).nonzero().flatten()
        if len(again):
            keys = [w_k[:, reads[again]].transpose(0, 1) for _, w_k in weights]
            for whole, part in zip(inner, _in_float64([q[again] for q in queries], keys, route), strict=True):
                whole[again] = part
        return inner, ~accurate.cpu()

    parts = list(in_batches(range(heads), heads if at_once(w_q_a.device) else 1, measure))
    products, transposed = (torch.cat(values).movedim(0, 2) for values in zip(*(inner for inner, _ in parts), strict=True))
    if not (is_finite(products) and is_finite(transposed)):
        for name, each in (("query", w_q_a), ("key", w_k_a), ("query", w_q_b), ("key", w_k_b)):
            check_weights(name, each)
        raise HeadgramError("An inner product overflows float64: rescale the weights.")
    return PairProducts(products, transposed, torch.cat([exact for _, exact in parts]), route)


def _prices(weights: Tensor, tensor_cores: bool) -> Prices:
    if not at_once(weights.device):
        return CPU
    return replace(TENSOR_CORES, longest=longest_sum(weights.device)) if tensor_cores else GPU


def _read(
    w_k: Float[Tensor, "layers kv_heads rank hidden"], reads: Int[Tensor, " heads"]
) -> Float[Tensor, "layers some_heads rank hidden"]:
    """The key heads that neighbouring query heads read: each once if all are read equally often, else one for each reader."""
    members, counts = reads.unique_consecutive(return_counts=True)
    return w_k[:, members[0] : members[-1] + 1] if bool((counts == counts[0]).all()) else w_k[:, reads]


def _multiply(sides: Sequence[Side], route: Route) -> Inner:
    """Inner products of two sides, or of one with itself."""
    return (by_strips if route == "strips" else by_products)(sides[0], sides[-1])


def _in_float64(queries: Sequence[Tensor], keys: Sequence[Tensor], route: Route) -> Inner:
    """Products in float64, a block of layers at a time."""
    (heads, n_a, rank, hidden), n_b = queries[0].shape, queries[-1].shape[1]
    same = len(queries) == 1
    step = max(1, EXACT_BYTES[queries[0].device.type] // (128 * heads * rank * hidden))
    gram = torch.zeros(heads, n_a, n_b, dtype=torch.float64, device=queries[0].device)
    inner = Inner(gram, torch.zeros_like(gram))
    for i in range(0, n_a, step):
        side_a = _orthonormal_keys(queries[0][:, i : i + step], keys[0][:, i : i + step])
        for j in range(i if same else 0, n_b, step):
            own = same and i == j
            side_b = side_a if own else _orthonormal_keys(queries[-1][:, j : j + step], keys[-1][:, j : j + step])
            for whole, part in zip(inner, _multiply([side_a, side_b], route), strict=True):
                whole[:, i : i + step, j : j + step] = part
                if same and not own:
                    whole[:, j : j + step, i : i + step] = part.mT
    return inner


def _orthonormal_keys(w_q: Float[Tensor, "heads layers rank hidden"], w_k: Float[Tensor, "kv_heads layers rank hidden"]) -> Side:
    """Weights of the same forms in float64, with orthonormal keys; `m = min(r, d)`."""
    basis, upper = torch.linalg.qr(w_k.double().mT)
    return Side(basis.mT, _for_readers(upper, len(w_q)) @ w_q.double())


def _for_readers(of_keys: Shaped[Tensor, "kv_heads ..."], heads: int) -> Shaped[Tensor, "heads ..."]:
    """What is known of key heads, for each head that reads one."""
    return of_keys.repeat_interleave(heads // len(of_keys), 0)


class _Scaled(NamedTuple):
    """Weights of some heads, each layer divided by the power of two below its Frobenius norm.

    In float32; in bfloat16, where that is multiplied with float32 results.
    """

    weights: Float[Tensor, "heads layers rank hidden"]
    unit: Float[Tensor, "heads layers"]  # that power, float64
    norm: Float[Tensor, "heads layers"]  # after it, between 1 and 2, or 0; NaN where it is not known; float64


def _scaled(weights: Float[Tensor, "heads layers rank hidden"], dtype: torch.dtype) -> _Scaled:
    wide = weights.to(dtype)
    norm = torch.linalg.vector_norm(wide, dim=(-1, -2), dtype=torch.float32)
    alive = (wide != 0).any(-1).any(-1) if at_once(wide.device) or bool((norm < _NORMS[0]).any()) else norm > 0
    # Where squares may under- or overflow, no norm is known; nothing is accurate then.
    norm = norm.double().where(~alive | ((norm > _NORMS[0]) & (norm < _NORMS[1])), torch.nan)
    unit = torch.ldexp(torch.ones_like(norm), norm.log2().floor().where(norm > 0, 0))
    return _Scaled(wide * (1 / unit).to(wide.dtype)[..., None, None], unit, norm / unit)


def _in_float32(
    queries: Sequence[Tensor], keys: Sequence[Tensor], route: Route, dtype: torch.dtype
) -> tuple[Inner, Bool[Tensor, " heads"]]:
    """Products in float32 of weights in `dtype`, and of which heads they are accurate."""
    heads = len(queries[0])
    scaled = [(_scaled(q, dtype), _scaled(k, dtype)) for q, k in zip(queries, keys, strict=True)]
    sides = [Side(k.weights, q.weights) for q, k in scaled]
    inner = _multiply(sides, route)
    norms_sq = [inner.gram.diagonal(dim1=1, dim2=2)] if len(sides) == 1 else [_norms_sq(side) for side in sides]
    accurate = torch.ones(heads, dtype=torch.bool, device=inner.gram.device)
    for (q, k), norm_sq in zip(scaled, norms_sq, strict=True):
        expected = (q.norm * _for_readers(k.norm, heads)).square() / q.weights.shape[2]
        accurate &= (norm_sq >= _SMALL**2 * expected).all(1)  # not where one is not finite
    units = [q.unit * _for_readers(k.unit, heads) for q, k in scaled]
    unit = units[0][:, :, None] * units[-1][:, None]
    return Inner(inner.gram * unit, inner.transposed * unit), accurate


def _norms_sq(side: Side) -> Float[Tensor, "heads layers"]:
    """`‖g‖²` of every form."""
    of_keys, of_queries = (_own_products(weights) for weights in side)
    return (_for_readers(of_keys, len(of_queries)) * of_queries).sum((-1, -2), dtype=torch.float64)


def _own_products(weights: Float[Tensor, "heads layers m hidden"]) -> Float[Tensor, "heads layers m m"]:
    flat = weights.flatten(0, 1)
    products: Tensor = multiplied(flat, flat.mT).unflatten(0, weights.shape[:2])
    return products


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
