"""The nearest heads in other layers, by what the top directions of two heads have in common.

Head indices mean nothing across layers, so every head is compared with every head of every other layer:

    form                  cosine of the parts of g that the top k singular triples span, sum_i s_i u_i v_i^T
    right, left, signed   overlap of the spans of the top k directions, ‖V_a V_b^T‖_F² / k

Products are taken in float32, the precision in which directions are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: What heads are compared by.
MEASURES = ("form", "right", "left", "signed")


@dataclass(frozen=True)
class Neighbours:
    """The nearest heads by one measure, nearest first.

    Attributes
    ----------
    layer, head : (L, H, n) int64
        Which head; `layer` counts along the leading axis of the directions.
    value : (L, H, n) float32
        The measure. Cosines are ordered by magnitude: a negative one is nearly the opposite form.
    """

    layer: Int[Tensor, "layers heads n"]
    head: Int[Tensor, "layers heads n"]
    value: Float[Tensor, "layers heads n"]


@torch.no_grad()
def nearest_heads(
    singular_values: Float[Tensor, "layers heads k"],
    right: Float[Tensor, "layers heads k hidden"],
    left: Float[Tensor, "layers heads k hidden"],
    signed: Float[Tensor, "layers heads k hidden"],
    count: int,
    device: str = "cpu",
) -> dict[str, Neighbours]:
    """For every head, the nearest heads of all other layers of its stack.

    Parameters
    ----------
    singular_values : (L, H, k)
        The `k` largest of every head, descending.
    right, left, signed : (L, H, k, d)
        The directions, as `headgram.Spectrum` has them; may be mapped from a file, two layers are read at a time.
    count
        How many neighbours; at most `(L - 1) H` are found.
    device
        Where the products are taken.

    Returns
    -------
    dict of str to Neighbours
        By measure, in the order of `MEASURES`. Equally near heads are in the order of layer and head.
    """
    layers, heads, k, _ = right.shape
    scale = _unit(singular_values).to(device, torch.float32)
    best = {measure: [_Best(heads, count) for _ in range(layers)] for measure in MEASURES}
    for a in range(layers):
        rows = [each[a].to(device, torch.float32) for each in (right, left, signed)]
        for b in range(a + 1, layers):
            others = (each[b].to(device, torch.float32) for each in (right, left, signed))
            products = [_products(*pair) for pair in zip(rows, others, strict=True)]
            weights = scale[a][:, :, None, None] * scale[b]
            tables = {"form": (products[0] * products[1] * weights).sum((1, 3)).clamp(-1, 1)}
            tables |= {measure: (each**2).sum((1, 3)) / k for measure, each in zip(MEASURES[1:], products, strict=True)}
            for measure, table in tables.items():
                best[measure][a].offer(b, table.cpu())
                best[measure][b].offer(a, table.T.cpu())
    return {measure: _stacked(found) for measure, found in best.items()}


def _unit(values: Float[Tensor, "*heads k"]) -> Float[Tensor, "*heads k"]:
    """Values over their norm, and zeros as they are."""
    norm = values.norm(dim=-1, keepdim=True)
    return values / torch.where(norm > 0, norm, 1)


def _products(a: Float[Tensor, "heads k hidden"], b: Float[Tensor, "heads k hidden"]) -> Float[Tensor, "heads k heads k"]:
    """Inner products of all directions of two layers: one matrix product."""
    return (a.flatten(0, 1) @ b.flatten(0, 1).T).view(*a.shape[:2], *b.shape[:2])


class _Best:
    """The nearest heads that one layer's heads have met, by magnitude; of equal ones, those that came first."""

    def __init__(self, heads: int, count: int) -> None:
        self.count = count
        self.value = torch.zeros(heads, 0)
        self.place = torch.zeros(heads, 0, dtype=torch.int64)

    def offer(self, layer: int, table: Float[Tensor, "heads others"]) -> None:
        others = table.shape[1]
        place = layer * others + torch.arange(others).expand(len(table), -1)
        value, place = torch.cat([self.value, table], 1), torch.cat([self.place, place], 1)
        order = value.abs().sort(dim=1, descending=True, stable=True).indices[:, : self.count]
        self.value, self.place = value.gather(1, order), place.gather(1, order)


def _stacked(found: list[_Best]) -> Neighbours:
    place = torch.stack([each.place for each in found])
    heads = place.shape[1]
    return Neighbours(layer=place // heads, head=place % heads, value=torch.stack([each.value for each in found]))
