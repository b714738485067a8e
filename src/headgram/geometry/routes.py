"""Two exact routes to the inner products of forms `X = A^T B`; `headgram.geometry.costs` chooses between them.

*Products*: all that is needed is in `r × r` matrices,

    <X, Y>   = sum((A_x A_y^T) * (B_x B_y^T))
    <X, Y^T> = sum((B_x A_y^T) * (A_x B_y^T))

which costs four products for every pair of factors; heads that share a factor share its products. *Strips*: form each `X`, block
by block, and take inner products of vectors. The sum of a block `X[I, J]` and its mirror `X[J, I]^T` is a block of `2 S`, twice
the symmetric part. Their difference is a block of `2 T`, twice the antisymmetric part. So both products follow from one pass:
`<X, Y> = <S_x, S_y> + <T_x, T_y>`, and with a minus `<X, Y^T>`. Each head is formed once, not each pair, which is cheaper where
there are many heads for the width. Symmetric forms need a quarter of the products, and no `T`.

Results are float64; products are taken in the precision of the sides. Those of bfloat16 are exact in float32, which is what
tensor cores deliver them in; sums of them are cut into pieces that the device adds up accurately.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgram.forms.heads import Heads, read
from headgram.geometry.blocks import at_once
from headgram.geometry.costs import PRODUCT_BYTES, STRIP_BYTES, TRIANGLE_ROWS, product_block, strip_side

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
    most = max(1, PRODUCT_BYTES[x.device.type] // (4 * max(4, x.a.itemsize) * x.rank * y.rank))
    rows, columns = product_block(len(x), same, most)
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
    most = STRIP_BYTES[x.device.type] // (rows * max(4, x.a.itemsize))
    size = strip_side(most if at_once(x.device) else min(most, _TERMS["cpu"]), x.widths[0])
    blocks_x = _Blocks(x, size, padded_x, symmetric)
    blocks_y = blocks_x if same else _Blocks(y, size, padded_y, symmetric)
    sums = _Sums(blocks_x, blocks_y)
    for block in _upper(blocks_x.pieces):
        of_x = blocks_x.parts(block)
        sums.add(of_x, of_x if same else blocks_y.parts(block), 1.0 if block.is_diagonal else 2.0)
    inner = sums.total[:, : len(x), : len(y)]
    if same:
        inner = inner.triu() + inner.triu(1).mT
    if symmetric:
        return Inner(inner[0], inner[0])
    even, odd = inner / 4  # both parts are twice theirs
    return Inner(even + odd, even - odd)


class _Block(NamedTuple):
    """A block of a form: some rows of one piece of its width, some columns of another."""

    i: int
    rows: slice
    j: int
    columns: slice

    @property
    def is_diagonal(self) -> bool:
        """Whether the block is its own mirror; any other stands for its mirror too."""
        return self.i == self.j and self.rows == self.columns


def _upper(pieces: list[slice]) -> Iterator[_Block]:
    """Blocks on and above the diagonal. One on it holds all twice: it is cut in four, and its lower left part is left out."""
    whole = [slice(0, piece.stop - piece.start) for piece in pieces]
    for i, rows in enumerate(whole):
        half = 16 * math.ceil(rows.stop / 32)
        if half < rows.stop:
            first, second = slice(0, half), slice(half, rows.stop)
            yield from (_Block(i, first, i, first), _Block(i, first, i, second), _Block(i, second, i, second))
        else:
            yield _Block(i, rows, i, rows)
        yield from (_Block(i, rows, j, whole[j]) for j in range(i + 1, len(whole)))


class _Blocks:
    """Blocks of the forms of a set, in memory that is used again; zero forms fill up to `padded` heads.

    Where all forms that are multiplied are symmetric, a block is enough; else it takes its mirror too.
    """

    def __init__(self, heads: Heads, size: int, padded: int, alone: bool) -> None:
        width = heads.widths[0]
        self.pieces = [slice(start, min(start + size, width)) for start in range(0, width, size)]
        self._a = self._cut(heads.a, heads.reads_a)
        self._b = self._a if heads.is_symmetric else self._cut(heads.b, heads.reads_b)
        self._alone = alone
        self.shape = (1 if alone else 2, padded)
        self._heads = len(heads)
        self._memory: dict[tuple[int, int], Tensor] = {}
        self.empty = heads.b.new_empty(0, dtype=torch.promote_types(heads.b.dtype, torch.float32))

    def _cut(self, factors: Float[Tensor, "some rank width"], reads: Int[Tensor, " n"]) -> list[Float[Tensor, "n rank _"]]:
        """The factor of each head, each piece by itself, so that what is multiplied lies together in memory."""
        return [read(factors[:, :, piece], reads).contiguous() for piece in self.pieces]

    def parts(self, at: _Block) -> Float[Tensor, "parts padded block"]:
        """Twice the symmetric and (up to sign) twice the antisymmetric part at a block, flattened.

        Of symmetric forms alone, the block itself.
        """
        shape = (at.rows.stop - at.rows.start, at.columns.stop - at.columns.start)
        elements = math.prod(shape)
        if shape not in self._memory:
            # Rows a multiple of 4 KiB apart compete for the same places of the cache, so such rows get a few zeros more.
            self._memory[shape] = self.empty.new_zeros(*self.shape, elements + (0 if elements % 1024 else 16))
        memory = self._memory[shape]
        block, *mirrors = memory[:, : self._heads, :elements].unflatten(2, shape)
        multiplied(self._a[at.i][:, :, at.rows].mT, self._b[at.j][:, :, at.columns], out=block)
        if self._alone:
            return memory
        (mirror,) = mirrors
        if at.is_diagonal:
            mirror.copy_(block.mT)
        else:
            multiplied(self._b[at.i][:, :, at.rows].mT, self._a[at.j][:, :, at.columns], out=mirror)
        block.add_(mirror)
        torch.sub(block, mirror, alpha=2, out=mirror)
        return memory


class _Sums:
    """Sums of `share x y^T` over blocks, in float64; of a set with itself, only what lies on and above the diagonal counts."""

    def __init__(self, x: _Blocks, y: _Blocks) -> None:
        (parts, rows), (_, columns) = x.shape, y.shape
        self.total = x.empty.new_zeros(parts, rows, columns, dtype=torch.float64)
        self._products = x.empty.new_empty(parts * rows * columns)  # of one block, in memory that is used again

    def add(self, x: Float[Tensor, "parts padded_x block"], y: Float[Tensor, "parts padded_y block"], share: float) -> None:
        """Add a block's products."""
        if x is not y:
            self._add(x, y, share)
        elif not at_once(x.device) and torch.get_num_threads() == 1:
            self._add_triangles(x, share)
        else:  # by torch's BLAS: with several threads, those of two libraries would wait for each other
            step = TRIANGLE_ROWS[x.device.type]
            for start in range(0, x.shape[1], step):
                self._add(x[:, start : start + step], x[:, start:], share, start)

    def _add(
        self, x: Float[Tensor, "parts some block"], y: Float[Tensor, "parts more block"], share: float, start: int = 0
    ) -> None:
        """Add the products of both from row and column `start` on."""
        shape = len(x), x.shape[1], y.shape[1]
        if x.shape[2] <= _TERMS[x.device.type]:
            products = torch.bmm(x, y.mT, out=self._products[: math.prod(shape)].view(shape))
        else:
            products = torch.stack([_long_sums(*part) for part in zip(x, y, strict=True)])
        self.total[:, start : start + shape[1], start : start + shape[2]].add_(products, alpha=share)

    def _add_triangles(self, x: Float[Tensor, "parts padded block"], share: float) -> None:
        """Add the upper triangles of `x x^T`, by BLAS' routine for that: torch calls none."""
        from scipy.linalg.blas import dsyrk, ssyrk  # costs time where nothing is multiplied

        syrk = ssyrk if x.dtype == torch.float32 else dsyrk
        for total, products, part in zip(self.total, self._products.view_as(self.total), x, strict=True):
            # BLAS' matrices are transposed: it writes what is the upper triangle here.
            syrk(1.0, part.numpy().T, trans=1, lower=1, c=products.numpy().T, overwrite_c=1)
            total.add_(products, alpha=share)


def _long_sums(x: Float[Tensor, "some block"], y: Float[Tensor, "more block"]) -> Float[Tensor, "some more"]:
    """`x y^T`, long sums in float64: in float32 the rounding of 65,000 positive terms would show."""
    terms = _TERMS[x.device.type]
    whole = x.shape[1] - x.shape[1] % terms
    pieces_x, pieces_y = (side[:, :whole].unflatten(1, (-1, terms)).transpose(0, 1) for side in (x, y))
    total: Tensor = (pieces_x @ pieces_y.mT).sum(0, dtype=torch.float64)
    return total + x[:, whole:] @ y[:, whole:].mT


def _padded(heads: int) -> int:
    """A multiple of four: on a CPU, matrix products of 30 rows run at half the speed of 32."""
    return 4 * math.ceil(heads / 4)
