"""Inner products of the heads of one index in every two layers, as the original script has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headgram.errors import HeadgramError
from headgram.forms.heads import Heads
from headgram.geometry.costs import Route
from headgram.geometry.inner import Precision, inner_products


@dataclass(frozen=True)
class SameIndexProducts:
    """Inner products of equal head indices of two ranges of layers; float64, on the device of the weights.

    Attributes
    ----------
    gram : (n_x, n_y, H)
        `[i, j, h] = <X_ih, Y_jh>`.
    transposed : (n_x, n_y, H)
        `[i, j, h] = <X_ih, Y_jh^T>`.
    exact : (H,)
        The head indices that were measured in float64 in any layer.
    route
        `products` or `strips`, see `headgram.geometry.routes`.
    """

    gram: Float[Tensor, "n_x n_y heads"]
    transposed: Float[Tensor, "n_x n_y heads"]
    exact: Bool[Tensor, " heads"]
    route: Route


def same_index_products(x: Heads, y: Heads, heads: int, precision: Precision = "auto") -> SameIndexProducts:
    """Inner products of equal head indices.

    Parameters
    ----------
    x, y
        Layers of `heads` heads each, layer by layer; one triangle is computed where both are the same object.
    precision
        As for `headgram.geometry.inner.inner_products`.

    Raises
    ------
    HeadgramError
        If a set is not made of whole layers, and as `inner_products` does.
    """
    if len(x) % heads or len(y) % heads:
        raise HeadgramError(f"{len(x)} and {len(y)} heads are not whole layers of {heads}.")
    parts = []
    for head in range(heads):
        own = x.take(slice(head, None, heads))
        parts.append(inner_products(own, own if y is x else y.take(slice(head, None, heads)), precision))
    return SameIndexProducts(
        gram=torch.stack([part.gram for part in parts], -1),
        transposed=torch.stack([part.transposed for part in parts], -1),
        exact=torch.stack([part.exact_x.any() | part.exact_y.any() for part in parts]),
        route=parts[0].route,
    )
