"""Two exact routes to the inner products of forms `g_i = K_i^T Q_i`; `headgram.geometry.costs` chooses between them.

*Products*: all that is needed is in `m × m` matrices,

    <g_a, g_b>   = sum((K_a K_b^T) * (Q_a Q_b^T))
    <g_a, g_b^T> = sum((Q_a K_b^T) * (K_a Q_b^T))

which costs four products per pair of layers. *Strips*: form each `g`, block by block, and take inner products of vectors. Of a
block `X = g[I, J]` and its mirror `Y = g[J, I]^T`, the sum and the difference are blocks of twice the symmetric and twice the
antisymmetric part, so both inner products follow from one pass: `<g_a, g_b> = <S_a, S_b> + <A_a, A_b>`, and with a minus
`<g_a, g_b^T>`. Forming costs every layer once, not every pair: it wins where there are many layers for the width.

Results are float64; products are taken in the precision of the sides. Those of bfloat16 are exact in float32, which is what
tensor cores deliver them in; sums of them are cut into pieces that the device adds up accurately.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.geometry.batches import at_once
from headgram.geometry.costs import TRIANGLE

#: Bytes of the four products of a block of layers, and of one block of all forms. Constants, so that the blocking, and with it
#: the last bit of the result, does not depend on the machine. A block of forms should lie in a cache.
PRODUCT_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
STRIP_BYTES = {"cpu": 12 * 2**20, "cuda": 512 * 2**20}

#: Terms that are summed in the precision of the products.
_TERMS = 1024
#: Relative error of sums of positive terms that is borne, and the most terms that are tried.
_BIAS = 1e-7
_LONGEST = 2**14


class Side(NamedTuple):
    """The forms of some heads in some layers; every key head is read by `H / K` query heads, which are neighbours."""

    k: Float[Tensor, "kv_heads layers m hidden"]
    q: Float[Tensor, "heads layers m hidden"]


class Inner(NamedTuple):
    """`<g_a, g_b>` and `<g_a, g_b^T>`."""

    gram: Float[Tensor, "heads layers_a layers_b"]
    transposed: Float[Tensor, "heads layers_a layers_b"]


def multiplied(
    a: Float[Tensor, "n rows inner"], b: Float[Tensor, "n inner columns"], out: Tensor | None = None
) -> Float[Tensor, "n rows columns"]:
    """`a b`, of bfloat16 in float32."""
    if a.dtype != torch.bfloat16:
        return torch.bmm(a, b, out=out)
    longest = longest_sum(a.device)
    total = _by_tensor_cores(a[:, :, :longest], b[:, :longest], out)
    for start in range(longest, a.shape[2], longest):
        total += _by_tensor_cores(a[:, :, start : start + longest], b[:, start : start + longest])
    return total


@cache
def longest_sum(device: torch.device) -> int:
    """How many products of bfloat16 a device adds up to within `_BIAS`, at least 64 and at most 16,384: measured once.

    Tensor cores cut partial sums off where others round (Fasi et al., PeerJ Computer Science 7:e330, 2021), so the error of a sum
    of many positive terms grows with their number.
    """
    # On a GPU as many rows as of a real model: a small product would itself be cut into pieces.
    count = 64 if device.type == "cpu" else 4096
    rows = 1 + torch.rand(1, count, _LONGEST, generator=torch.Generator().manual_seed(0))
    rows = rows.bfloat16().to(device)
    for terms in (_LONGEST >> i for i in range(8)):
        product = _by_tensor_cores(rows[..., :terms], rows[..., :terms].mT)[:, :64, :64]
        some = rows[:, :64, :terms].double()
        bias = (product / (some @ some.mT) - 1).mean().abs()
        if bias.item() <= _BIAS:
            return terms
    return 64


def _by_tensor_cores(
    a: Float[Tensor, "n rows inner"], b: Float[Tensor, "n inner columns"], out: Tensor | None = None
) -> Float[Tensor, "n rows columns"]:
    """A product of bfloat16 in float32, where there are tensor cores for that."""
    if a.device.type == "cuda":
        return torch.bmm(a, b, torch.float32, out=out)
    return torch.bmm(a.float(), b.float(), out=out)


def by_products(a: Side, b: Side) -> Inner:
    """Inner products of every layer of `a` with every layer of `b`, from products of their weights."""
    heads, n_a, rank, _ = a.q.shape
    n_b = b.q.shape[1]
    same = a is b
    # Of a run of layers with itself: rows of blocks, from the diagonal on.
    rows = math.ceil(n_a / TRIANGLE) if same else n_a
    most = max(1, PRODUCT_BYTES[a.q.device.type] // (4 * max(4, a.q.itemsize) * heads * rank**2))
    rows = max(1, min(rows, math.isqrt(most)))
    columns = most // rows
    gram = torch.zeros(heads, n_a, n_b, dtype=torch.float64, device=a.q.device)
    transposed = torch.zeros_like(gram)
    for i in range(0, n_a, rows):
        k_a, q_a = a.k[:, i : i + rows], a.q[:, i : i + rows]
        for j in range(i if same else 0, n_b, columns):
            k_b, q_b = b.k[:, j : j + columns], b.q[:, j : j + columns]
            block = slice(None), slice(i, i + rows), slice(j, j + columns)
            gram[block] = _contracted(_products(q_a, q_b), _products(k_a, k_b))
            transposed[block] = _contracted(_products(q_a, k_b), _products(k_a, q_b))
    if same:
        gram, transposed = (whole.triu() + whole.triu(1).mT for whole in (gram, transposed))
    return Inner(gram, transposed)


def _products(
    a: Float[Tensor, "heads_a layers_a m hidden"], b: Float[Tensor, "heads_b layers_b m hidden"]
) -> Float[Tensor, "heads layers_a m layers_b m"]:
    """`W_a W_b^T` of every pair of layers and every head, of as many as the side of more heads has."""
    (heads_a, n_a, rank, hidden), (heads_b, n_b, _, _) = a.shape, b.shape
    if heads_a < heads_b:
        a = a.repeat_interleave(heads_b // heads_a, 0)
    # Heads that share `b` are rows of one product.
    wide = multiplied(a.reshape(heads_b, -1, hidden), b.reshape(heads_b, -1, hidden).mT)
    return wide.view(max(heads_a, heads_b), n_a, rank, n_b, rank)


def _contracted(x: Float[Tensor, "heads a m b m"], y: Float[Tensor, "some_heads a m b m"]) -> Float[Tensor, "heads a b"]:
    """Sums of the products of entries, in float64; each of `y` belongs to as many neighbours of `x`."""
    x.view(len(y), -1, *x.shape[1:]).mul_(y[:, None])
    return x.sum((2, 4), dtype=torch.float64)


def by_strips(a: Side, b: Side) -> Inner:
    """The same, from blocks of the forms themselves."""
    heads, n_a, _, hidden = a.q.shape
    n_b = b.q.shape[1]
    same = a is b
    padded_a, padded_b = (layers if at_once(a.q.device) else _padded(layers) for layers in (n_a, n_b))
    rows = heads * (padded_a if same else padded_a + padded_b)
    size = _block(STRIP_BYTES[a.q.device.type] // (2 * rows * max(4, a.q.itemsize)), hidden)
    forms_a = _Blocks(a, size, padded_a)
    forms_b = forms_a if same else _Blocks(b, size, padded_b)
    symmetric = torch.zeros(heads, padded_a, padded_b, dtype=torch.float64, device=a.q.device)
    antisymmetric = torch.zeros_like(symmetric)
    for i in range(0, hidden, size):
        for j in range(i, hidden, size):
            s_a, a_a = forms_a.parts(i, j)
            s_b, a_b = (s_a, a_a) if same else forms_b.parts(i, j)
            share = 0.25 if i == j else 0.5  # a block off the diagonal stands for its mirror too; both parts are twice theirs
            symmetric.add_(_summed(s_a, s_b), alpha=share)
            antisymmetric.add_(_summed(a_a, a_b), alpha=share)
    return Inner((symmetric + antisymmetric)[:, :n_a, :n_b], (symmetric - antisymmetric)[:, :n_a, :n_b])


def _summed(
    x: Float[Tensor, "heads padded_a block"], y: Float[Tensor, "heads padded_b block"]
) -> Float[Tensor, "heads padded_a padded_b"]:
    """`x y^T`, long sums in float64: in float32 the rounding of 65,000 positive terms would show."""
    whole = x.shape[2] - x.shape[2] % _TERMS
    pieces_x, pieces_y = (side[..., :whole].unflatten(2, (-1, _TERMS)).transpose(1, 2) for side in (x, y))
    total: Tensor = (pieces_x @ pieces_y.mT).sum(1, dtype=torch.float64)
    return total + x[..., whole:] @ y[..., whole:].mT


class _Blocks:
    """Blocks of the forms of one side, in memory that is used again; zero forms fill up to `padded` layers."""

    def __init__(self, side: Side, size: int, padded: int) -> None:
        self._k, self._q = side.k.repeat_interleave(len(side.q) // len(side.k), 0).flatten(0, 1), side.q.flatten(0, 1)
        self._heads, self._layers, _, self._hidden = side.q.shape
        self._size = size
        last = self._hidden % size or size
        dtype = torch.promote_types(side.q.dtype, torch.float32)
        self._memory = {
            (rows, columns): side.q.new_zeros(2, self._heads, padded, rows * columns, dtype=dtype)
            for rows in {min(size, self._hidden), last}
            for columns in {min(size, self._hidden), last}
        }

    def parts(self, i: int, j: int) -> tuple[Float[Tensor, "heads padded block"], Float[Tensor, "heads padded block"]]:
        """Twice the symmetric and (up to sign) twice the antisymmetric part at rows `i…`, columns `j…`, flattened."""
        k, q = self._k, self._q
        rows, columns = slice(i, min(i + self._size, self._hidden)), slice(j, min(j + self._size, self._hidden))
        x, y = self._memory[rows.stop - i, columns.stop - j]
        shape = (len(q), rows.stop - i, columns.stop - j)
        block, mirror = (half[:, : self._layers].view(shape) for half in (x, y))
        multiplied(k[:, :, rows].mT, q[:, :, columns], out=block)
        if i == j:
            mirror.copy_(block.mT)
        else:
            multiplied(q[:, :, rows].mT, k[:, :, columns], out=mirror)
        x.add_(y)
        torch.sub(x, y, alpha=2, out=y)
        return x, y


def _block(elements: int, hidden: int) -> int:
    """The side of a square block of at most about so many elements; the width is cut into nearly equal blocks."""
    count = math.ceil(hidden / max(16, math.isqrt(elements)))
    return min(hidden, 16 * math.ceil(hidden / count / 16))


def _padded(layers: int) -> int:
    """A multiple of four: on a CPU, matrix products of 30 rows run at half the speed of 32."""
    return 4 * math.ceil(layers / 4)
