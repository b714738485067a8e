"""An ordered set of heads, each with one bilinear form `X = A^T B`.

A *factor* is a weight of a head as `(r, width)`: query, key, value, or output (the columns of `W_O` that the head owns,
transposed). With grouped-query attention several heads read one key or value factor, so a set holds every factor once, and for
each side a map from heads to factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """`n` forms `X_i = a[reads_a[i]]^T b[reads_b[i]]`, in order.

    Attributes
    ----------
    a : (n_a, r, width_a)
        Left factors, any floating dtype, any device.
    b : (n_b, r, width_b)
        Right factors. A set of symmetric forms `B^T B` holds the same tensor and the same map on both sides.
    reads_a, reads_b : (n,) int64, on the CPU
        The factors of each form.

    Examples
    --------
    >>> import torch
    >>> from headgram.forms.heads import Heads
    >>> queries, keys = torch.randn(4, 2, 8), torch.randn(2, 2, 8)  # two heads read each key
    >>> heads = Heads(keys, queries, torch.tensor([0, 0, 1, 1]), torch.arange(4))
    >>> len(heads), heads.rank, heads.form(3).shape
    (4, 2, torch.Size([8, 8]))
    """

    a: Float[Tensor, "n_a rank width_a"]
    b: Float[Tensor, "n_b rank width_b"]
    reads_a: Int[Tensor, " n"]
    reads_b: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.reads_a)

    @property
    def rank(self) -> int:
        """`r`, the rows of every factor."""
        return int(self.a.shape[1])

    @property
    def widths(self) -> tuple[int, int]:
        """Rows and columns of every form."""
        return int(self.a.shape[2]), int(self.b.shape[2])

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.a.device

    @property
    def is_symmetric(self) -> bool:
        """Whether every form is `B^T B`, with one factor for both sides."""
        return self.a is self.b and self.reads_a is self.reads_b

    def left(self, heads: slice | Sequence[int] = slice(None)) -> Float[Tensor, "some rank width_a"]:
        """The left factor of each of some heads, repeated where they share one."""
        return read(self.a, self.reads_a[heads])

    def right(self, heads: slice | Sequence[int] = slice(None)) -> Float[Tensor, "some rank width_b"]:
        """The right factor of each of some heads, repeated where they share one."""
        return read(self.b, self.reads_b[heads])

    def form(self, head: int) -> Float[Tensor, "width_a width_b"]:
        """One form as a matrix, in the precision of its factors: for tests and for small models."""
        matrix: Tensor = self.a[self.reads_a[head]].mT @ self.b[self.reads_b[head]]
        return matrix

    def take(self, heads: slice | Iterable[int] | Tensor) -> Heads:
        """Some of the heads, in the order given, with no factor that they do not read."""
        places = heads if isinstance(heads, slice | Tensor) else torch.tensor(list(heads), dtype=torch.int64)
        a, reads_a = _only(self.a, self.reads_a[places])
        b, reads_b = (a, reads_a) if self.is_symmetric else _only(self.b, self.reads_b[places])
        return replace(self, a=a, b=b, reads_a=reads_a, reads_b=reads_b)

    def with_factors(self, a: Float[Tensor, "n_a m width_a"], b: Float[Tensor, "n_b m width_b"]) -> Heads:
        """The same heads with other factors in the place of each."""
        return replace(self, a=a, b=b)

    def to(self, where: torch.device | str | torch.dtype) -> Heads:
        """On another device, or in another precision."""
        a = self.a.to(where)
        return self.with_factors(a, a if self.is_symmetric else self.b.to(where))

    @classmethod
    def symmetric(cls, factors: Float[Tensor, "n rank width"]) -> Heads:
        """The forms `B_i^T B_i`.

        Parameters
        ----------
        factors : (n, r, width)
            One factor for each form; orthonormal rows make it the projector onto their span.
        """
        places = torch.arange(len(factors))
        return cls(factors, factors, places, places)


def below(parts: Sequence[Float[Tensor, "_ _ width"]]) -> Float[Tensor, "n rank width"]:
    """Factors of several sets, one after the other; rows of zeros fill up those of a lower rank, which changes no form."""
    most = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, most - part.shape[1])) for part in parts])


def read(factors: Inexact[Tensor, "some ..."], reads: Int[Tensor, " n"]) -> Inexact[Tensor, "n ..."]:
    """What of each factor is read at each place; the factors themselves where each is read once, in order."""
    return factors if torch.equal(reads, torch.arange(len(factors))) else factors[reads.to(factors.device)]


def _only(factors: Float[Tensor, "some rank width"], reads: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """The factors that are read, and the map to them; a view where they lie in equal steps."""
    if not len(reads):
        return factors[:0], reads
    used, places = torch.unique(reads, return_inverse=True)
    first, last = int(used[0]), int(used[-1])
    step = int(used[1]) - first if len(used) > 1 else 1
    regular = torch.equal(used, torch.arange(first, last + 1, step))
    return factors[first : last + 1 : step] if regular else factors[used.to(factors.device)], places
