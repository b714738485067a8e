"""What the routes to inner products cost, counted. Imports no torch: the plan of a run reads it too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

#: Of a run of layers with itself, only blocks on and above the diagonal are multiplied, of so many in a row.
TRIANGLE = 8

Route = Literal["products", "strips"]


@dataclass(frozen=True)
class Prices:
    """What things cost, in operations of large products of the weights."""

    vector: int  # an operation of a product of forms, which are float32
    byte: int  # a byte to or from memory
    longest: int = 2**31  # how many products of weights are added up at once


#: A CPU works in its caches.
CPU = Prices(vector=1, byte=0)
#: Of a GPU, roughly: 60 TFLOP/s in float32 and 4 TB/s; tensor cores multiply weights in bfloat16 a dozen times faster.
GPU = Prices(vector=1, byte=15)
TENSOR_CORES = Prices(vector=12, byte=200)


def flops(route: Route, layers_a: int, layers_b: int, rank: int, hidden: int, same: bool) -> int:
    """Floating-point operations of one head; `same` where both sides are one run of layers."""
    if route == "products":
        return 4 * 2 * _pairs(layers_a, layers_b, same) * rank**2 * hidden
    return _forming(layers_a, layers_b, rank, hidden, same) + 2 * layers_a * layers_b * hidden**2


def cheapest(layers_a: int, layers_b: int, rank: int, hidden: int, same: bool, prices: Prices = CPU) -> Route:
    """The route that costs less."""
    entries = _pairs(layers_a, layers_b, same) * rank**2
    # Of four products each entry is written, read with another's, written and read again; entries of forms likewise. Where sums
    # are made of pieces, each but the first is written, read with the sum, and that written.
    pieces = math.ceil(hidden / prices.longest)
    products = flops("products", layers_a, layers_b, rank, hidden, same) + prices.byte * (48 + 64 * (pieces - 1)) * entries
    forms = (layers_a if same else layers_a + layers_b) * hidden**2
    vectors = prices.vector * 2 * layers_a * layers_b * hidden**2
    strips = _forming(layers_a, layers_b, rank, hidden, same) + vectors + prices.byte * 20 * forms
    return "products" if products <= strips else "strips"


def _pairs(layers_a: int, layers_b: int, same: bool) -> int:
    """Pairs of layers of which products are taken."""
    return layers_a * (layers_a + math.ceil(layers_a / TRIANGLE)) // 2 if same else layers_a * layers_b


def _forming(layers_a: int, layers_b: int, rank: int, hidden: int, same: bool) -> int:
    """Operations that form all forms."""
    return 2 * (layers_a if same else layers_a + layers_b) * rank * hidden**2
