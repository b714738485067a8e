"""Inner products of forms of two models that share no basis, in the space that they do share: tokens of the same texts.

A form `X = A^T B` becomes a matrix of tokens by tokens, `T = E X F^T`: how the row `e_s` of every token on the left meets the row
`f_t` of every token on the right. `E` and `F` hold one row for each of `n` common tokens, less their mean row. With `E', F'` the
tables of another model, of any width,

    <T, T'> = <X, (E^T E') X' (F^T F')^T>

so the form of the other model is brought into the coordinates of the first, and multiplied there. `T` is never formed, and each
of the products `E^T E'`, widths by widths, is made once.

Turning a model's residual stream, or giving its tokens other numbers, changes none of these. Chance: if the rows of `E'` and `F'`
are permuted, so that each token meets one of another text, what remains is what the tables share apart from meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgram.errors import HeadgramError
from headgram.forms.heads import Heads, read
from headgram.geometry.checks import is_finite
from headgram.geometry.eigenvalues import Eigenvalues, eigenvalues
from headgram.geometry.ratios import ratio

#: Bytes of the rows of one table that are in memory at once, as stored; the other table's pass by.
_KEPT_BYTES = 512 * 2**20
#: A squared norm below this part of what its factors allow cannot be told from zero.
_ZERO = 1e-13


@dataclass(frozen=True)
class TokenRows:
    """Where a table of tokens has the rows of some of them.

    Attributes
    ----------
    slices
        Begins to read the table: `(_, width)` each, from the first row to the last, any floating dtype.
    rows : (n,) int64
        The row of each of the tokens.
    width
        Of a row.
    """

    slices: Callable[[], Iterable[Float[Tensor, "_ width"]]]
    rows: Int[Tensor, " n"]
    width: int

    def reordered(self, order: Int[Tensor, " n"]) -> TokenRows:
        """The rows of the same tokens in another order."""
        return TokenRows(self.slices, self.rows[order], self.width)


@torch.no_grad()
def row_products(x: TokenRows, y: TokenRows) -> Float[Tensor, "width_x width_y"]:
    """`sum_t (x_t - mean x) (y_t - mean y)^T` over tokens; float64, on the CPU.

    Raises
    ------
    HeadgramError
        If a row is not finite.

    Examples
    --------
    >>> import torch
    >>> from headgram.geometry.token_space import TokenRows, row_products
    >>> table = torch.tensor([[1.0], [9.0], [3.0]])
    >>> rows = TokenRows(lambda: table.split(2), torch.tensor([0, 2]), 1)
    >>> row_products(rows, rows)
    tensor([[2.]], dtype=torch.float64)
    """
    order = x.rows.argsort()  # as they pass by
    x, y = x.reordered(order), y.reordered(order)
    back = y.rows.argsort().argsort()
    count, parts = max(1, len(order)), []
    step = max(1, _KEPT_BYTES // (4 * count))
    for start in range(0, y.width, step):
        kept = torch.cat([rows[:, start : start + step].clone() for rows in _passing(y)])[back]
        product, sum_x, at = torch.zeros(x.width, kept.shape[1]).double(), torch.zeros(x.width).double(), 0
        for rows in _passing(x):
            wide = rows.double()
            product += wide.T @ kept[at : at + len(rows)].double()
            sum_x += wide.sum(0)
            at += len(rows)
        parts.append(product - torch.outer(sum_x, kept.sum(0, dtype=torch.float64)) / count)
    found = torch.cat(parts, 1)
    return _finite(found)


def _finite(products: Tensor) -> Tensor:
    if not is_finite(products):
        raise HeadgramError("a table of tokens holds a NaN or an infinity: the checkpoint is damaged")
    return products


def _passing(table: TokenRows) -> Iterator[Float[Tensor, "_ width"]]:
    """The rows that are asked for, in the table's own order."""
    wanted, start = table.rows.sort().values, 0
    for piece in table.slices():
        places = wanted[torch.searchsorted(wanted, start) : torch.searchsorted(wanted, start + len(piece))]
        yield piece[places - start]
        start += len(piece)


@torch.no_grad()
def norms(heads: Heads, left: Float[Tensor, "width width"], right: Float[Tensor, "width width"]) -> Float[Tensor, " n"]:
    """`‖T‖` of every head, from the products `E^T E` and `F^T F` of its own model's tables; float64."""
    a, b = ((factors.double() @ own) @ factors.double().mT for factors, own in ((heads.a, left), (heads.b, right)))
    a, b = read(a, heads.reads_a), read(b, heads.reads_b)
    squares: Tensor = (a * b).sum((-1, -2))
    return squares.where(squares > _ZERO * a.norm(dim=(-1, -2)) * b.norm(dim=(-1, -2)), 0).sqrt()


@torch.no_grad()
def moved(heads: Heads, left: Float[Tensor, "width_x width_y"], right: Float[Tensor, "width_x width_y"]) -> Heads:
    """The heads of another model in the coordinates of the first, `E^T E' X' (F^T F')^T`; float64.

    The inner product of a form `X` with one of these is `<T, T'>`.

    Parameters
    ----------
    left, right
        `E^T E'` and `F^T F'`.
    """
    return heads.with_factors(heads.a.double() @ left.T, heads.b.double() @ right.T)


@dataclass(frozen=True)
class TokenProducts:
    """Products of the tables that forms of one model meet, over its tokens, each less its mean row; float64.

    Attributes
    ----------
    left, right
        `E^T E` and `F^T F`, of the tables on both sides.
    across
        `F^T E`.
    """

    left: Float[Tensor, "width width"]
    right: Float[Tensor, "width width"]
    across: Float[Tensor, "width width"]


@torch.no_grad()
def centred_gram(slices: Iterable[Float[Tensor, "_ width"]]) -> Float[Tensor, "width width"]:
    """`sum_t (x_t - mean x) (x_t - mean x)^T` over rows that pass by once, in float64, on their device.

    Raises
    ------
    HeadgramError
        If there is no row, or one is not finite.

    Examples
    --------
    >>> import torch
    >>> from headgram.geometry.token_space import centred_gram
    >>> centred_gram(torch.tensor([[1.0], [9.0], [2.0]]).split(2))
    tensor([[38.]], dtype=torch.float64)
    """
    gram: Tensor | None = None
    total, count = torch.zeros(()).double(), 0
    for rows in slices:
        wide = rows.double()
        gram = wide.T @ wide if gram is None else gram.addmm_(wide.T, wide)  # in place: it may be as large as all else
        total, count = total.to(wide.device) + wide.sum(0), count + len(wide)
    if gram is None:
        raise HeadgramError("a table of tokens has no rows: the checkpoint is damaged")
    found = gram.addr_(total, total, alpha=-1 / max(1, count))
    return _finite(found)


@torch.no_grad()
def between_tokens(heads: Heads, tables: TokenProducts) -> Eigenvalues:
    """The eigenvalues of `T = E X F^T` of every head, and the scores that follow.

    The non-zero ones are those of `(F^T E) X`, in the residual stream: of `W_U W_O W_V W_E`, those of `W_V (W_E W_U) W_O`. Chance
    is that of this form, if what a head reads is turned at random: the means of `copying`, `positive` and `trace_z` are exactly
    0, 1/2 and 0, the variance of the last 1. The departure from normality is that of `T` itself.

    Examples
    --------
    >>> import torch
    >>> from headgram.forms.circuits import qk
    >>> from headgram.geometry.token_space import TokenProducts, between_tokens, centred_gram
    >>> weights = torch.randn(1, 2, 4)
    >>> embedding = centred_gram([torch.randn(9, 4)])
    >>> tables = TokenProducts(embedding, embedding, embedding)
    >>> between_tokens(qk(weights, weights), tables).copying  # a query looks for keys of its own token
    tensor([1.], dtype=torch.float64)
    """
    found = eigenvalues(heads.with_factors(heads.a.double() @ tables.across.T, heads.b.double()))
    size = norms(heads, tables.left, tables.right).cpu()
    energy = found.values.abs().square().sum(-1)
    return replace(found, departure=ratio((size.square() - energy).clamp_min(0).sqrt(), size).clamp(max=1))
