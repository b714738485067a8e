"""What the routes to inner products cost, counted. Imports no torch: the plan of a run reads it too."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: A set that is multiplied with itself is cut into so many rows of blocks. Only blocks on and above the diagonal are multiplied.
TRIANGLE = 8

#: Bytes of the own factors of one block of heads in float32; all heads of two blocks are multiplied at once. A GPU is given
#: larger ones, since each block is copied to it again for every other.
BLOCK_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}

#: Bytes of the four products of a block of heads, and of one block of all forms. Constants, so that the blocking, and with it
#: the last bit of the result, does not depend on the machine. A block of forms should lie in a cache.
PRODUCT_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
STRIP_BYTES = {"cpu": 24 * 2**20, "cuda": 512 * 2**20}

#: On a GPU or by several threads, so many long vectors of a set at a time are multiplied with themselves and all that follow.
TRIANGLE_ROWS = {"cpu": 64, "cuda": 128}

#: Bytes of the weights, as stored, of the layers whose spectra a GPU is asked for at once.
LAYERS_BYTES = 512 * 2**20
#: Bytes of float64 working memory that the spectra of one block of heads may take; bounds the peak, never the result.
SPECTRA_BYTES = {"cpu": 128 * 2**20, "cuda": 4 * 2**30}

#: As many blocks of spans are kept as fit into about one GiB; on a GPU those two that are multiplied.
KEPT_SPANS = {"cpu": 8, "cuda": 2}
#: Bytes of float32 weights of the heads that are measured at once as the original script has it. A constant, so that the last
#: bit of the result does not depend on the machine.
ORIGINAL_BYTES = 128 * 2**20

#: Neighbouring heads of some layers.
Block = tuple[Sequence[int], range]

Route = Literal["products", "strips"]


@dataclass(frozen=True)
class Prices:
    """What things cost, in operations of large products of the weights."""

    vector: int  # an operation of a product of forms, which are float32
    byte: int  # a byte to or from memory
    longest: int = 2**31  # how many products of weights are added up at once
    forming: float = 1.0  # an operation that forms a block


#: On a CPU, memory traffic is not counted: blocks are small enough to stay in cache. So short a sum as of a block's rank keeps
#: two thirds of the rate of large products in float32, and a third to a half of it in float64.
CPU = Prices(vector=1, byte=0, forming=1.5)
CPU_FLOAT64 = Prices(vector=1, byte=0, forming=2.5)
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
        """Operations of the inner products of all forms, once they are formed: of a set with itself, of one triangle."""
        (n_x, n_y) = self.heads
        pairs = n_x * (n_x + 1) / 2 if self.same else n_x * n_y
        return float((1 if self.symmetric else 2) * pairs * self.width**2)


def flops(route: Route, sizes: Sizes) -> float:
    """Floating-point operations."""
    return float(2 * sizes.entries * sizes.width if route == "products" else sizes.formed + sizes.summed)


def traffic(route: Route, sizes: Sizes, longest: int) -> float:
    """Bytes to and from memory, of float32 results: where sums are of at most `longest` terms, they are made of pieces."""
    # Each entry of a product is written, read with another's, written and read again; entries of forms likewise. Of pieces, each
    # but the first is written, read with the sum, and that written.
    if route == "products":
        return (12 + 16 * (math.ceil(sizes.width / longest) - 1)) * sizes.entries
    return 20.0 * (sizes.heads[0] if sizes.same else sum(sizes.heads)) * sizes.width**2


def cheapest(sizes: Sizes, prices: Prices = CPU) -> Route:
    """The route that costs less."""
    products, strips = (prices.byte * traffic(route, sizes, prices.longest) for route in ("products", "strips"))
    products += flops("products", sizes)
    strips += prices.forming * sizes.formed + prices.vector * sizes.summed
    return "products" if products <= strips else "strips"


def product_block(heads: int, same: bool, most: int) -> tuple[int, int]:
    """How many heads of each side are multiplied at once, so that there are at most so many pairs."""
    rows = math.ceil(heads / TRIANGLE) if same else heads  # of one set: rows of blocks, from the diagonal on
    rows = max(1, min(rows, math.isqrt(most)))
    return rows, most // rows


def strip_side(elements: int, width: int) -> int:
    """The side of a square block of at most so many elements, but at least 16; the width is cut into nearly equal blocks."""
    most = 16 * max(1, math.isqrt(elements) // 16)
    count = math.ceil(width / most)
    return min(width, 16 * math.ceil(width / count / 16))


def launches(route: Route, sizes: Sizes, longest: int, exact: bool = False) -> int:
    """How many kernels a GPU is told to run, about; the tests hold it against those that a pretended one counts.

    Parameters
    ----------
    longest
        How many terms are added up at once.
    exact
        In float64, where nobody looks at how large each factor is, and at which heads are accurate.
    """
    (n_x, n_y), (rank_x, rank_y) = sizes.heads, sizes.rank
    factors = (1 if sizes.symmetric else 2) * (1 if sizes.same else 2)
    around = (13 if sizes.symmetric else 25) if exact else 15 + 48 * factors
    itemsize = 8 if exact else 4
    if route == "products":
        most = max(1, PRODUCT_BYTES["cuda"] // (4 * itemsize * rank_x * rank_y))
        rows, columns = product_block(n_x, sizes.same, most)
        down, across = math.ceil(n_x / rows), math.ceil(n_y / columns)
        blocks = down * (across + 1) // 2 if sizes.same else down * across
        each = 2 * math.ceil(sizes.width / longest) - 1  # products of pieces, and their sums
        shared = 4 * (sizes.left != sizes.heads or sizes.right != sizes.heads)  # repeated where heads read one factor
        return around + blocks * (each + 3 if sizes.symmetric else 4 * each + 6 + shared)
    parts = 1 if sizes.symmetric else 2
    vectors = parts * (n_x if sizes.same else n_x + n_y)
    side = strip_side(STRIP_BYTES["cuda"] // (itemsize * vectors), sizes.width)
    pieces = math.ceil(sizes.width / side)
    blocks = pieces * (pieces - 1) // 2 + pieces * (3 if side > 16 else 1)  # one on the diagonal is cut in four
    sums = math.ceil(n_x / TRIANGLE_ROWS["cuda"]) if sizes.same else 1
    return around + blocks * (parts * factors + sums * (2 + 5 * parts))


def spectrum_bytes(rank: int, width: int, topk: int) -> int:
    """Working memory of a head's spectrum: the weights of both sides and products of their size, directions, and small change."""
    return 8 * width * (4 * rank + 6 * min(topk, rank)) + 8 * 32 * rank * rank


def spectra_flops(heads: int, left: int, rank: int, width: int) -> float:
    """Operations of the spectra and scores of a layer's heads, which read so many left factors; in float64.

    Products of width d, one symmetric `2r` and one `r` problem for every head; then the scores: triangles and products of every
    head, and the form of the layer.
    """
    per_head = 6 * width * rank**2 + 30 * (2 * rank) ** 3 + 8 * width * rank**2
    return float(heads * per_head + left * rank * width**2)


def blocks(layers: Sequence[int], heads: int, rank: int, width: int, size: int) -> list[Block]:
    """The heads of some layers in order, in blocks of at most so many bytes: of whole layers, or of a layer's heads."""
    most = max(1, size // (4 * rank * width))
    if most >= heads:
        step = most // heads
        return [(layers[start : start + step], range(heads)) for start in range(0, len(layers), step)]
    some = [range(start, min(start + most, heads)) for start in range(0, heads, most)]
    return [([layer], each) for layer in layers for each in some]


def block_sizes(layers: int, heads: int, rank: int, width: int, size: int) -> Counter[int]:
    """How many of `blocks` have each number of heads."""
    most = max(1, size // (4 * rank * width))
    if most >= heads:
        return Counter({count * heads: times for count, times in block_lengths(layers, most // heads).items()})
    return Counter({count: layers * times for count, times in block_lengths(heads, most).items()})


def block_lengths(count: int, size: int) -> Counter[int]:
    """By length, how many blocks a count is cut into: all of one size, but for what is left at the end."""
    whole, rest = divmod(count, size)
    return Counter({length: times for length, times in ((size, whole), (rest, 1)) if length * times})


def pairs_of(lengths: Counter[int]) -> Counter[tuple[int, int, bool]]:
    """How many products of two blocks there are, by both lengths and by whether both are the same: every pair counts once."""
    kinds, met = list(lengths.items()), Counter[tuple[int, int, bool]]()
    for i, (one, times) in enumerate(kinds):
        met[one, one, True] = times
        met[one, one, False] = times * (times - 1) // 2
        for other, more in kinds[i + 1 :]:
            met[one, other, False] = times * more
    return +met
