"""What the routes to inner products cost, counted. Imports no torch: the plan of a run reads it too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

#: Of a set with itself, only blocks on and above the diagonal are multiplied, of so many in a row.
TRIANGLE = 8
#: Of a set with itself, so many long vectors at a time are multiplied with themselves and all that follow.
TRIANGLE_ROWS = 128

Route = Literal["products", "strips"]


@dataclass(frozen=True)
class Prices:
    """What things cost, in operations of large products of the weights."""

    vector: int  # an operation of a product of forms, which are float32
    byte: int  # a byte to or from memory
    longest: int = 2**31  # how many products of weights are added up at once


#: On a CPU, memory traffic is not counted: blocks are small enough to stay in cache.
CPU = Prices(vector=1, byte=0)
#: Of a GPU, roughly: 60 TFLOP/s in float32 and 4 TB/s; tensor cores multiply weights in bfloat16 a dozen times faster.
GPU = Prices(vector=1, byte=15)
TENSOR_CORES = Prices(vector=12, byte=200)


@dataclass(frozen=True)
class Sizes:
    """Two sets of heads whose forms are multiplied, or one set with itself: heads, and factors where heads share them."""

    heads: tuple[int, int]
    left: tuple[int, int]  # how many left factors the heads of each set read
    right: tuple[int, int]
    rank: tuple[int, int]
    width: int
    same: bool  # both are one set
    symmetric: bool = False  # all forms are `B^T B`

    @classmethod
    def unshared(cls, heads_x: int, heads_y: int, rank: int, width: int, same: bool) -> Sizes:
        """Sets of one rank in which no two heads share a factor."""
        heads = heads_x, heads_y
        return cls(heads, heads, heads, (rank, rank), width, same)

    @property
    def entries(self) -> float:
        """Entries of all products of factors: `r_x r_y` for every pair of factors."""
        (a_x, a_y), (b_x, b_y) = self.left, self.right
        pairs = b_x * b_y if self.symmetric else (a_x + b_x) * (a_y + b_y)
        share = (1 + math.ceil(self.heads[0] / TRIANGLE) / self.heads[0]) / 2 if self.same else 1
        return float(pairs * share * self.rank[0] * self.rank[1])

    @property
    def formed(self) -> int:
        """Operations that form all forms."""
        each = [2 * n * rank * self.width**2 for n, rank in zip(self.heads, self.rank, strict=True)]
        return (each[0] if self.same else sum(each)) // (2 if self.symmetric else 1)

    @property
    def summed(self) -> float:
        """Operations of the inner products of all forms, once they are formed."""
        (n_x, n_y) = self.heads
        share = min(1.0, (1 + TRIANGLE_ROWS / n_x) / 2) if self.same else 1
        return float((1 if self.symmetric else 2) * share * n_x * n_y * self.width**2)


def flops(route: Route, sizes: Sizes) -> float:
    """Floating-point operations."""
    return float(2 * sizes.entries * sizes.width if route == "products" else sizes.formed + sizes.summed)


def cheapest(sizes: Sizes, prices: Prices = CPU) -> Route:
    """The route that costs less."""
    # Each entry of a product is written, read with another's, written and read again; entries of forms likewise. Where sums are
    # made of pieces, each but the first is written, read with the sum, and that written.
    pieces = math.ceil(sizes.width / prices.longest)
    products = flops("products", sizes) + prices.byte * (12 + 16 * (pieces - 1)) * sizes.entries
    forms = (sizes.heads[0] if sizes.same else sum(sizes.heads)) * sizes.width**2
    strips = sizes.formed + prices.vector * sizes.summed + prices.byte * 20 * forms
    return "products" if products <= strips else "strips"
