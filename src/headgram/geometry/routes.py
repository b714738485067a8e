"""Two exact routes to the inner products of forms `X = A^T B`; `headgram.geometry.costs` chooses between them.

*Products*: all that is needed is in `r × r` matrices,

    <X, Y>   = sum((A_x A_y^T) * (B_x B_y^T))
    <X, Y^T> = sum((B_x A_y^T) * (A_x B_y^T))

which costs four products for every pair of factors; heads that share a factor share its products. *Strips*: form each `X`, block
by block, and take inner products of vectors. Of a block `X[I, J]` and its mirror `X[J, I]^T`, the sum and the difference are
blocks of
twice the symmetric part `S` and twice the antisymmetric part `T`, so both inner products follow from one pass:
`<X, Y> = <S_x, S_y> + <T_x, T_y>`, and with a minus `<X, Y^T>`. Forming costs every head once, not every pair: it wins where
there are many heads for the width. Symmetric forms need a quarter of the products, and no `T`.

Results are float64; products are taken in the precision of the sides. Those of bfloat16 are exact in float32, which is what
tensor cores deliver them in; sums of them are cut into pieces that the device adds up accurately.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgram.forms.heads import Heads
from headgram.geometry.batches import at_once
from headgram.geometry.costs import TRIANGLE

#: Bytes of the four products of a block of heads, and of one block of all forms. Constants, so that the blocking, and with it
#: the last bit of the result, does not depend on the machine. A block of forms should lie in a cache.
PRODUCT_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
STRIP_BYTES = {"cpu": 24 * 2**20, "cuda": 512 * 2**20}

#: On a GPU or by several threads, so many long vectors of a set at a time are multiplied with themselves and all that follow.
_TRIANGLE_ROWS = 128

#: Terms that one product sums in its own precision. Most of BLAS on a CPU cuts sums into a few hundred terms itself. Where it
#: does not, as for few rows without AVX-512, 8,192 positive terms are off by 1e-7 of their sum, and 16,384 by twice as much.
_TERMS = {"cpu": 2**13, "cuda": 2**10}
#: Relative error of sums of positive terms that is borne, and the most terms that are tried.
_BIAS = 1e-7
_LONGEST = 2**14


class Inner(NamedTuple):
    """`<X, Y>` and `<X, Y^T>`."""

    gram: Float[Tensor, "n_x n_y"]
    transposed: Float[Tensor, "n_x n_y"]


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


def by_products(x: Heads, y: Heads) -> Inner:
    """Inner products of every form of `x` with every form of `y`, square forms of one width, from products of their factors."""
    same = x is y
    symmetric = x.is_symmetric and y.is_symmetric
    # Of one set: rows of blocks, from the diagonal on.
    rows = math.ceil(len(x) / TRIANGLE) if same else len(x)
    most = max(1, PRODUCT_BYTES[x.device.type] // (4 * max(4, x.a.itemsize) * x.rank * y.rank))
    rows = max(1, min(rows, math.isqrt(most)))
    columns = most // rows
    gram = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    transposed = gram if symmetric else torch.zeros_like(gram)
    for i in range(0, len(x), rows):
        some_x = x.take(slice(i, i + rows))
        for j in range(i if same else 0, len(y), columns):
            some_y = y.take(slice(j, j + columns))
            block = slice(i, i + rows), slice(j, j + columns)
            bb = _products(some_x.b, some_x.reads_b, some_y.b, some_y.reads_b)
            if symmetric:
                gram[block] = bb.square_().sum((1, 3), dtype=torch.float64)
                continue
            aa = _products(some_x.a, some_x.reads_a, some_y.a, some_y.reads_a)
            gram[block] = bb.mul_(aa).sum((1, 3), dtype=torch.float64)
            ba = _products(some_x.b, some_x.reads_b, some_y.a, some_y.reads_a)
            ab = _products(some_x.a, some_x.reads_a, some_y.b, some_y.reads_b)
            transposed[block] = ba.mul_(ab).sum((1, 3), dtype=torch.float64)
    if same:
        gram = gram.triu() + gram.triu(1).mT
        transposed = gram if symmetric else transposed.triu() + transposed.triu(1).mT
    return Inner(gram, transposed)


def _products(
    x: Float[Tensor, "some m width"],
    reads_x: Int[Tensor, " n_x"],
    y: Float[Tensor, "some_more l width"],
    reads_y: Int[Tensor, " n_y"],
) -> Float[Tensor, "n_x m n_y l"]:
    """`W_x W_y^T` of every pair of heads: one large product, repeated where heads share a factor."""
    wide = multiplied(x.reshape(1, -1, x.shape[2]), y.reshape(1, -1, y.shape[2]).mT)
    products = wide.view(len(x), x.shape[1], len(y), y.shape[1])
    for axis, reads in ((0, reads_x), (2, reads_y)):
        if not torch.equal(reads, torch.arange(products.shape[axis])):
            products = products.index_select(axis, reads.to(products.device))
    return products


def by_strips(x: Heads, y: Heads) -> Inner:
    """The same, from blocks of the forms themselves."""
    same = x is y
    symmetric = x.is_symmetric and y.is_symmetric
    padded_x, padded_y = (len(heads) if at_once(x.device) else _padded(len(heads)) for heads in (x, y))
    rows = (padded_x if same else padded_x + padded_y) * (1 if symmetric else 2)
    width = x.widths[0]
    size = _block(STRIP_BYTES[x.device.type] // (rows * max(4, x.a.itemsize)), width)
    blocks_x = _Blocks(x, size, padded_x, symmetric)
    blocks_y = blocks_x if same else _Blocks(y, size, padded_y, symmetric)
    even = torch.zeros(padded_x, padded_y, dtype=torch.float64, device=x.device)
    odd = torch.zeros_like(even)
    for i in range(0, width, size):
        for j in range(i, width, size):
            even_x, odd_x = blocks_x.parts(i, j)
            even_y, odd_y = (even_x, odd_x) if same else blocks_y.parts(i, j)
            share = 1.0 if i == j else 2.0  # a block off the diagonal stands for its mirror too
            if symmetric:
                even.add_(_summed(even_x, even_y), alpha=share)
                continue
            share /= 4  # both parts are twice theirs
            even.add_(_summed(even_x, even_y), alpha=share)
            odd.add_(_summed(odd_x, odd_y), alpha=share)
    if same:
        even, odd = (whole.triu() + whole.triu(1).mT for whole in (even, odd))
    return Inner((even + odd)[: len(x), : len(y)], (even - odd)[: len(x), : len(y)])


def _summed(x: Float[Tensor, "padded_x block"], y: Float[Tensor, "padded_y block"]) -> Float[Tensor, "padded_x padded_y"]:
    """`x y^T`; of `x` with itself, only what lies on and above the diagonal counts.

    With several threads all is left to torch's BLAS: threads of two libraries would wait for each other.
    """
    if x is not y:
        return _summed_whole(x, y)
    if not at_once(x.device) and torch.get_num_threads() == 1:
        return _summed_triangle(x)
    total = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), _TRIANGLE_ROWS):
        total[start : start + _TRIANGLE_ROWS, start:] = _summed_whole(x[start : start + _TRIANGLE_ROWS], x[start:])
    return total


def _summed_triangle(x: Float[Tensor, "padded block"]) -> Float[Tensor, "padded padded"]:
    """The upper triangle of `x x^T`, by BLAS' routine for that: torch calls none."""
    from scipy.linalg.blas import dsyrk, ssyrk  # costs time where nothing is multiplied

    syrk = ssyrk if x.dtype == torch.float32 else dsyrk
    pieces = x.numpy().T  # BLAS' matrices are transposed
    total = np.zeros((len(x), len(x)))
    for start in range(0, x.shape[1], _TERMS["cpu"]):
        total += syrk(1.0, pieces[start : start + _TERMS["cpu"]], trans=1)
    return torch.from_numpy(total)


def _summed_whole(x: Float[Tensor, "some block"], y: Float[Tensor, "more block"]) -> Float[Tensor, "some more"]:
    """`x y^T`, long sums in float64: in float32 the rounding of 65,000 positive terms would show."""
    terms = _TERMS[x.device.type]
    whole = x.shape[1] - x.shape[1] % terms
    pieces_x, pieces_y = (side[:, :whole].unflatten(1, (-1, terms)).transpose(0, 1) for side in (x, y))
    total: Tensor = (pieces_x @ pieces_y.mT).sum(0, dtype=torch.float64)
    return total + x[:, whole:] @ y[:, whole:].mT


class _Blocks:
    """Blocks of the forms of a set, in memory that is used again; zero forms fill up to `padded` heads.

    Where all forms that are multiplied are symmetric, a block is enough; else it takes its mirror too.
    """

    def __init__(self, heads: Heads, size: int, padded: int, alone: bool) -> None:
        self._alone = alone
        self._a = heads.left()
        self._b = self._a if heads.is_symmetric else heads.right()
        self._heads, self._width, self._size = len(heads), heads.widths[0], size
        last = self._width % size or size
        dtype = torch.promote_types(heads.b.dtype, torch.float32)
        self._memory = {
            (rows, columns): heads.b.new_zeros(1 if alone else 2, padded, rows * columns, dtype=dtype)
            for rows in {min(size, self._width), last}
            for columns in {min(size, self._width), last}
        }

    def parts(self, i: int, j: int) -> tuple[Float[Tensor, "padded block"], Float[Tensor, "padded block"]]:
        """Twice the symmetric and (up to sign) twice the antisymmetric part at rows `i…`, columns `j…`, flattened.

        Of symmetric forms alone, the block itself, for both.
        """
        a, b = self._a, self._b
        rows, columns = slice(i, min(i + self._size, self._width)), slice(j, min(j + self._size, self._width))
        x, *mirrors = self._memory[rows.stop - i, columns.stop - j]
        shape = (self._heads, rows.stop - i, columns.stop - j)
        block = x[: self._heads].view(shape)
        multiplied(a[:, :, rows].mT, b[:, :, columns], out=block)
        if self._alone:
            return x, x
        (y,) = mirrors
        mirror = y[: self._heads].view(shape)
        if i == j:
            mirror.copy_(block.mT)
        else:
            multiplied(b[:, :, rows].mT, a[:, :, columns], out=mirror)
        x.add_(y)
        torch.sub(x, y, alpha=2, out=y)
        return x, y


def _block(elements: int, width: int) -> int:
    """The side of a square block of at most about so many elements; the width is cut into nearly equal blocks."""
    count = math.ceil(width / max(16, math.isqrt(elements)))
    return min(width, 16 * math.ceil(width / count / 16))


def _padded(heads: int) -> int:
    """A multiple of four: on a CPU, matrix products of 30 rows run at half the speed of 32."""
    return 4 * math.ceil(heads / 4)
