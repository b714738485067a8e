"""What the routes to inner products cost, counted. Imports no torch: the plan of a run reads it too."""

from __future__ import annotations

import math
from typing import Literal

#: Of a run of layers with itself, only blocks on and above the diagonal are multiplied, of so many in a row.
TRIANGLE = 8

Route = Literal["products", "strips"]


def flops(route: Route, layers_a: int, layers_b: int, rank: int, hidden: int, same: bool) -> int:
    """Floating-point operations of one head; `same` where both sides are one run of layers."""
    if route == "products":
        pairs = layers_a * (layers_a + math.ceil(layers_a / TRIANGLE)) // 2 if same else layers_a * layers_b
        return 4 * 2 * pairs * rank**2 * hidden
    forming = 2 * (layers_a if same else layers_a + layers_b) * rank * hidden**2
    return forming + 2 * layers_a * layers_b * hidden**2


def cheapest(layers_a: int, layers_b: int, rank: int, hidden: int, same: bool) -> Route:
    """The route with fewer operations."""
    routes: tuple[Route, Route] = ("products", "strips")
    return min(routes, key=lambda route: flops(route, layers_a, layers_b, rank, hidden, same))
