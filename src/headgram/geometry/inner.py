"""The Frobenius inner products of the forms of two sets of heads, `<X, Y>` and `<X, Y^T>`: all heads with all heads.

How they are formed is said in `headgram.geometry.routes`. In float64 the left factors are made orthonormal before: then no
product is larger than the forms themselves, and nothing cancels where a form is much smaller than its weights. Weights of at
most 32 bits may be multiplied in float32, which is several times faster; on a GPU, bfloat16 by tensor cores into float32. The
error is then a few units of rounding of `‖A‖ ‖B‖ / √r`, the size of the form of random weights; so each form's norm is looked
at, and a head whose form is smaller than that is measured again in float64. So is one whose factors have a few columns that
outweigh all others: every small term is then rounded as a large one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headgram.errors import HeadgramError
from headgram.forms.heads import Heads, read
from headgram.forms.transforms import with_orthonormal_left
from headgram.geometry.blocks import at_once, by_blocks
from headgram.geometry.checks import check_weights, is_finite
from headgram.geometry.costs import CPU, CPU_FLOAT64, GPU, TENSOR_CORES, Route, Sizes, cheapest
from headgram.geometry.float32 import whole_float32
from headgram.geometry.ratios import ratio
from headgram.geometry.routes import Inner, by_products, by_strips, longest_sum, multiplied

#: In float32, forms may be this much smaller than those of random weights of the same norms. Strips are in error by a share of
#: `‖A‖ ‖B‖` of each form; products of factors by a share of those of both, so there the ratio counts twice.
_SMALL: dict[Route, float] = {"strips": 0.3, "products": 0.7}

#: How far a few columns may outweigh the rest: `Σ‖a_j‖⁴ / ‖A‖⁴` over the columns of `A`, times the same of `B`. Beyond that, sums
#: add many small terms to a few large ones, and round them as coarsely as those. Sums over so few columns are short enough.
_UNEVEN = 0.01
_FEW_COLUMNS = 16

#: Frobenius norms of weights that can be trusted in float32.
_NORMS = 1e-15, 1e15

#: Bytes of float64 working memory; a constant, so that the blocking does not depend on the machine.
EXACT_BYTES = {"cpu": 512 * 2**20, "cuda": 8 * 2**30}

#: A norm further from 1 than by this factor is scaled: products of four then neither over- nor underflow.
_FAR = 2.0**8

Precision = Literal["auto", "float64"]
Norms = tuple[Float[Tensor, " n_x"], Float[Tensor, " n_y"]]


@dataclass(frozen=True)
class InnerProducts:
    """Inner products of every form of one set with every form of another; float64, on the device of the weights.

    Attributes
    ----------
    gram : (n_x, n_y)
        `[i, j] = <X_i, Y_j> = tr(X_i^T Y_j)`.
    transposed : (n_x, n_y)
        `[i, j] = <X_i, Y_j^T> = tr(X_i Y_j)`. With `gram` it gives the inner products of the symmetric parts,
        `(gram + transposed) / 2`, and of the antisymmetric parts, `(gram - transposed) / 2`.
    exact_x, exact_y : (n_x,), (n_y,)
        Which heads were measured in float64.
    route
        How: `products` or `strips`, see `headgram.geometry.routes`.
    """

    gram: Float[Tensor, "n_x n_y"]
    transposed: Float[Tensor, "n_x n_y"]
    exact_x: Bool[Tensor, " n_x"]
    exact_y: Bool[Tensor, " n_y"]
    route: Route


@torch.no_grad()
@whole_float32()
def inner_products(x: Heads, y: Heads, precision: Precision = "auto", norms_sq: Norms | None = None) -> InnerProducts:
    """Inner products of every form of `x` with every form of `y`.

    Parameters
    ----------
    x, y
        Sets of square forms of one width. One triangle is computed, and mirrored, where both are the same object.
    precision
        `float64`, or `auto`: float32 where weights are no wider and no form is too small for it. The error is then
        below `1e-6 ‖X‖ ‖Y‖`.
    norms_sq
        `‖X‖²` and `‖Y‖²` of all forms, float64, where the caller knows them.

    Raises
    ------
    HeadgramError
        If the widths do not fit together, a weight is not finite, or a product overflows float64.

    Examples
    --------
    >>> import torch
    >>> from headgram.forms.circuits import qk
    >>> from headgram.geometry.inner import inner_products
    >>> heads = qk(torch.randn(3, 4, 2, 8), torch.randn(3, 2, 2, 8))  # three layers of four heads, two of which share a key
    >>> inner_products(heads, heads).gram.shape
    torch.Size([12, 12])
    """
    if len({*x.widths, *y.widths}) > 1:
        raise HeadgramError(f"Inner products are taken of square forms of one width, not of {x.widths} and {y.widths}.")
    wide = max(factors.element_size() for heads in (x, y) for factors in (heads.a, heads.b))
    tensor_cores = at_once(x.device) and all(each.dtype == torch.bfloat16 for each in (x.a, x.b, y.a, y.b))
    exact = precision == "float64" or wide > 4
    dtype = torch.float64 if exact else torch.bfloat16 if tensor_cores else torch.float32
    route = _route(x, y, dtype)

    def measure(block: slice) -> _Part:
        some = x if block == slice(0, len(x)) else x.take(block)
        if exact:
            return _Part(_in_float64(some, y, route), *(torch.ones(len(each), dtype=torch.bool) for each in (some, y)))
        norms = norms_sq and (norms_sq[0][block], norms_sq[1])
        return _in_float32(some, y, route, dtype, norms)

    parts = list(by_blocks(range(len(x)), len(x), measure))  # in pieces only where memory runs out
    gram, transposed = (torch.cat(values) for values in zip(*(part.inner for part in parts), strict=True))
    if not is_finite(gram, transposed):
        for name, factors in (("left", x.a), ("right", x.b), ("left", y.a), ("right", y.b)):
            check_weights(name, factors)
        raise HeadgramError("An inner product overflows float64: rescale the weights.")
    return InnerProducts(gram, transposed, torch.cat([part.exact_x for part in parts]), parts[0].exact_y, route)


class _Part(NamedTuple):
    """Inner products, and which heads of both sides were measured in float64."""

    inner: Inner
    exact_x: Bool[Tensor, " n_x"]
    exact_y: Bool[Tensor, " n_y"]


def sizes_of(x: Heads, y: Heads) -> Sizes:
    """What the costs of both routes depend on."""
    return Sizes(
        heads=(len(x), len(y)),
        left=(len(x.a), len(y.a)),
        right=(len(x.b), len(y.b)),
        rank=(min(x.rank, x.widths[0]), min(y.rank, y.widths[0])),
        width=x.widths[0],
        same=x is y,
        symmetric=x.is_symmetric and y.is_symmetric,
    )


def _route(x: Heads, y: Heads, dtype: torch.dtype) -> Route:
    """The cheaper route where weights are multiplied in a precision; bfloat16 means tensor cores."""
    if not at_once(x.device):
        prices = CPU_FLOAT64 if dtype == torch.float64 else CPU
    else:
        prices = replace(TENSOR_CORES, longest=longest_sum(x.device)) if dtype == torch.bfloat16 else GPU
    return cheapest(sizes_of(x, y), prices)


def _multiplied(x: Heads, y: Heads, route: Route) -> Inner:
    return (by_strips if route == "strips" else by_products)(x, y)


def _in_float64(x: Heads, y: Heads, route: Route) -> Inner:
    """Products in float64, a block of heads at a time."""
    same = x is y
    gram = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    inner = Inner(gram, torch.zeros_like(gram))
    step = max(1, EXACT_BYTES[x.device.type] // (128 * max(x.rank, y.rank) * x.widths[0]))

    for i in range(0, len(x), step):
        block_x = _exact(x.take(slice(i, i + step)))
        for j in range(i if same else 0, len(y), step):
            own = same and i == j
            block_y = block_x if own else _exact(y.take(slice(j, j + step)))
            for whole, values in zip(inner, _multiplied(block_x, block_y, route), strict=True):
                whole[i : i + step, j : j + step] = values
                if same and not own:
                    whole[j : j + step, i : i + step] = values.mT
    return inner


def _exact(heads: Heads) -> Heads:
    """The same forms in float64, from factors no larger than they are."""
    return heads.to(torch.float64) if heads.is_symmetric else with_orthonormal_left(heads)


class _Scaled(NamedTuple):
    """Forms of factors that are each divided by the power of two below their Frobenius norm, where that is far from 1.

    In float32; in bfloat16, where that is multiplied with float32 results.
    """

    heads: Heads
    unit: Float[Tensor, " n"]  # of each form, the product of those powers, float64
    norm: Float[Tensor, " n"]  # `‖A‖ ‖B‖` after it; NaN where it is not known; float64
    uneven: Float[Tensor, " n"]  # how far few columns outweigh the rest, see `_UNEVEN`


class _Factors(NamedTuple):
    """Factors that are divided so, and of each the power, the norm after it, and `Σ‖a_j‖⁴ / ‖A‖⁴` over its columns."""

    factors: Float[Tensor, "n rank width"]
    unit: Float[Tensor, " n"]
    norm: Float[Tensor, " n"]
    uneven: Float[Tensor, " n"]


def _scaled(heads: Heads, dtype: torch.dtype) -> _Scaled:
    a = _scaled_factors(heads.a, dtype)
    b = a if heads.is_symmetric else _scaled_factors(heads.b, dtype)
    of_forms = [read(of_a, heads.reads_a) * read(of_b, heads.reads_b) for of_a, of_b in zip(a[1:], b[1:], strict=True)]
    return _Scaled(heads.with_factors(a.factors, b.factors), *of_forms)


def _scaled_factors(factors: Float[Tensor, "n rank width"], dtype: torch.dtype) -> _Factors:
    columns = _column_squares(factors)
    norm_sq = columns.sum(-1)
    norm = norm_sq.sqrt()
    alive = (factors != 0).any(-1).any(-1) if at_once(factors.device) or bool((norm < _NORMS[0]).any()) else norm > 0
    uneven = ratio(columns, norm_sq[:, None]).square().sum(-1)
    # Where squares may under- or overflow, no norm is known; nothing is accurate then.
    norm = norm.double().where(~alive | ((norm > _NORMS[0]) & (norm < _NORMS[1])), torch.nan)
    unit = torch.ldexp(torch.ones_like(norm), norm.log2().floor().where((norm > 0) & ~((norm > 1 / _FAR) & (norm < _FAR)), 0))
    if not at_once(factors.device) and bool((unit == 1).all()):
        return _Factors(factors.to(dtype), unit, norm, uneven)
    return _Factors(factors * (1 / unit).to(dtype)[:, None, None], unit, norm / unit, uneven)


def _column_squares(factors: Float[Tensor, "n rank width"]) -> Float[Tensor, "n width"]:
    """`‖a_j‖²` of every column, in float32; on a CPU one factor after the other, which stays in a cache."""
    if at_once(factors.device):
        norms: Tensor = torch.linalg.vector_norm(factors, dim=-2, dtype=torch.float32)
        return norms.square()
    return torch.stack([each.float().square().sum(0) for each in factors])


def _in_float32(x: Heads, y: Heads, route: Route, dtype: torch.dtype, norms_sq: Norms | None) -> _Part:
    """Products in float32 of weights in `dtype`; rows and columns of heads for which that is not accurate, in float64."""
    same = x is y
    of_x = _scaled(x, dtype)
    of_y = of_x if same else _scaled(y, dtype)
    inner = _multiplied(of_x.heads, of_y.heads, route)
    scaled = (of_x,) if same else (of_x, of_y)
    if norms_sq:
        norms = [norm_sq / each.unit.square() for norm_sq, each in zip(norms_sq, scaled, strict=False)]
    else:
        norms = [inner.gram.diagonal()] if same else [_norms_sq(each.heads) for each in scaled]
    few = x.widths[0] <= _FEW_COLUMNS
    rough = [
        ~(norm_sq >= _SMALL[route] ** 2 * each.norm.square() / each.heads.rank)  # also where one is not finite
        | ~((each.uneven <= _UNEVEN) | few)
        for each, norm_sq in zip(scaled, norms, strict=True)
    ]
    of_both = torch.cat(rough).cpu()  # which a GPU is waited for
    rough_x, rough_y = of_both[: len(x)], of_both[-len(y) :]
    whole = Inner(*(values * of_x.unit[:, None] * of_y.unit for values in inner))
    if bool(rough_x.any()):
        places = rough_x.nonzero().flatten()
        some = x.take(places)
        for values, exact in zip(whole, _in_float64(some, y, _route(some, y, torch.float64)), strict=True):
            values[places.to(values.device)] = exact
            if same:
                values[:, places.to(values.device)] = exact.mT
    if bool(rough_y.any()) and not same:
        places = rough_y.nonzero().flatten()
        some = y.take(places)
        for values, exact in zip(whole, _in_float64(x, some, _route(x, some, torch.float64)), strict=True):
            values[:, places.to(values.device)] = exact
    return _Part(whole, rough_x, rough_y)


def _norms_sq(heads: Heads) -> Float[Tensor, " n"]:
    """`‖X‖²` of every form."""
    of_a = multiplied(heads.a, heads.a.mT)
    of_b = of_a if heads.is_symmetric else multiplied(heads.b, heads.b.mT)
    return (read(of_a, heads.reads_a) * read(of_b, heads.reads_b)).sum((-1, -2), dtype=torch.float64)
