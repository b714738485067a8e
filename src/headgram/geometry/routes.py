"""Two exact routes to the inner products of forms `g_i = K_i^T Q_i`; `headgram.geometry.costs` chooses between them.

*Products*: all that is needed is in `m × m` matrices,

    <g_a, g_b>   = sum((K_a K_b^T) * (Q_a Q_b^T))
    <g_a, g_b^T> = sum((Q_a K_b^T) * (K_a Q_b^T))

which costs four products per pair of layers. *Strips*: form each `g`, block by block, and take inner products of vectors. Of a
block `X = g[I, J]` and its mirror `Y = g[J, I]^T`, the sum and the difference are blocks of twice the symmetric and twice the
antisymmetric part, so both inner products follow from one pass: `<g_a, g_b> = <S_a, S_b> + <A_a, A_b>`, and with a minus
`<g_a, g_b^T>`. Forming costs every layer once, not every pair: it wins where there are many layers for the width.

Results are float64; products are taken in the precision of the sides.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.geometry.costs import TRIANGLE

#: Bytes of the four products of a block of layers, and of one block of all forms. Constants, so that the blocking, and with it
#: the last bit of the result, does not depend on the machine. A block of forms should lie in a cache.
PRODUCT_BYTES = 256 * 2**20
STRIP_BYTES = {"cpu": 12 * 2**20, "cuda": 512 * 2**20}

#: Terms that are summed in the precision of the products.
_TERMS = 1024


class Side(NamedTuple):
    """The forms of one head in some layers."""

    k: Float[Tensor, "layers m hidden"]
    q: Float[Tensor, "layers m hidden"]


class Inner(NamedTuple):
    """`<g_a, g_b>` and `<g_a, g_b^T>`."""

    gram: Float[Tensor, "layers_a layers_b"]
    transposed: Float[Tensor, "layers_a layers_b"]


def by_products(a: Side, b: Side) -> Inner:
    """Inner products of every layer of `a` with every layer of `b`, from products of their weights."""
    (n_a, rank, _), n_b = a.k.shape, len(b.k)
    same = a is b
    step = max(1, math.isqrt(PRODUCT_BYTES // (4 * a.k.itemsize * rank**2)))
    if same:
        step = min(step, math.ceil(n_a / TRIANGLE))
    gram = torch.zeros(n_a, n_b, dtype=torch.float64, device=a.k.device)
    transposed = torch.zeros_like(gram)
    for i in range(0, n_a, step):
        k_a, q_a = a.k[i : i + step], a.q[i : i + step]
        for j in range(i if same else 0, n_b, step):
            k_b, q_b = b.k[j : j + step], b.q[j : j + step]
            for whole, part in (
                (gram, _contracted(_products(k_a, k_b), _products(q_a, q_b))),
                (transposed, _contracted(_products(q_a, k_b), _products(k_a, q_b))),
            ):
                whole[i : i + step, j : j + step] = part
                if same and i < j:
                    whole[j : j + step, i : i + step] = part.T
    return Inner(gram, transposed)


def _products(
    a: Float[Tensor, "layers_a m hidden"], b: Float[Tensor, "layers_b m hidden"]
) -> Float[Tensor, "layers_a m layers_b m"]:
    """`W_a W_b^T` of every pair of layers: one large matrix product."""
    rows = a.flatten(0, 1) @ b.flatten(0, 1).T
    return rows.view(*a.shape[:2], *b.shape[:2])


def _contracted(x: Float[Tensor, "a m b m"], y: Float[Tensor, "a m b m"]) -> Float[Tensor, "a b"]:
    return x.mul_(y).sum((1, 3), dtype=torch.float64)


def by_strips(a: Side, b: Side) -> Inner:
    """The same, from blocks of the forms themselves."""
    (n_a, _, hidden), n_b = a.k.shape, len(b.k)
    same = a is b
    rows = _padded(n_a) if same else _padded(n_a) + _padded(n_b)
    size = _block(STRIP_BYTES[a.k.device.type] // (2 * rows * a.k.itemsize), hidden)
    forms_a = _Blocks(a, size)
    forms_b = forms_a if same else _Blocks(b, size)
    symmetric = torch.zeros(_padded(n_a), _padded(n_b), dtype=torch.float64, device=a.k.device)
    antisymmetric = torch.zeros_like(symmetric)
    for i in range(0, hidden, size):
        for j in range(i, hidden, size):
            s_a, a_a = forms_a.parts(i, j)
            s_b, a_b = (s_a, a_a) if same else forms_b.parts(i, j)
            share = 0.25 if i == j else 0.5  # a block off the diagonal stands for its mirror too; both parts are twice theirs
            symmetric.add_(_summed(s_a, s_b), alpha=share)
            antisymmetric.add_(_summed(a_a, a_b), alpha=share)
    return Inner((symmetric + antisymmetric)[:n_a, :n_b], (symmetric - antisymmetric)[:n_a, :n_b])


def _summed(x: Float[Tensor, "padded_a block"], y: Float[Tensor, "padded_b block"]) -> Float[Tensor, "padded_a padded_b"]:
    """`x y^T`, long sums in float64: in float32 the rounding of 65,000 positive terms would show."""
    whole = x.shape[1] - x.shape[1] % _TERMS
    pieces_x, pieces_y = (side[:, :whole].view(len(side), -1, _TERMS).transpose(0, 1) for side in (x, y))
    total: Tensor = (pieces_x @ pieces_y.mT).sum(0, dtype=torch.float64)
    return total + x[:, whole:] @ y[:, whole:].T


class _Blocks:
    """Blocks of the forms of one side, in memory that is used again."""

    def __init__(self, side: Side, size: int) -> None:
        self._side, self._size = side, size
        layers, _, hidden = side.k.shape
        last = hidden % size or size
        self._memory = {
            (rows, columns): side.k.new_zeros(2, _padded(layers), rows * columns)
            for rows in {min(size, hidden), last}
            for columns in {min(size, hidden), last}
        }

    def parts(self, i: int, j: int) -> tuple[Float[Tensor, "padded block"], Float[Tensor, "padded block"]]:
        """Twice the symmetric and (up to sign) twice the antisymmetric part at rows `i…`, columns `j…`, flattened."""
        k, q = self._side
        layers, _, hidden = k.shape
        rows, columns = slice(i, min(i + self._size, hidden)), slice(j, min(j + self._size, hidden))
        x, y = self._memory[rows.stop - i, columns.stop - j]
        block, mirror = (half[:layers].view(layers, rows.stop - i, columns.stop - j) for half in (x, y))
        torch.bmm(k[:, :, rows].mT, q[:, :, columns], out=block)
        if i == j:
            mirror.copy_(block.mT)
        else:
            torch.bmm(q[:, :, rows].mT, k[:, :, columns], out=mirror)
        x.add_(y)
        torch.sub(x, y, alpha=2, out=y)
        return x, y


def _block(elements: int, hidden: int) -> int:
    """The side of a square block of at most about so many elements; the width is cut into nearly equal blocks."""
    count = math.ceil(hidden / max(16, math.isqrt(elements)))
    return min(hidden, 16 * math.ceil(hidden / count / 16))


def _padded(layers: int) -> int:
    """Zero forms fill up to a multiple of four: matrix products of 30 rows run at half the speed of 32."""
    return 4 * math.ceil(layers / 4)
