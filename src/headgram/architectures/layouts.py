"""How the query and key weights of one layer lie in the tensors of a checkpoint.

A layout takes the named tensors of one layer, as stored, and returns `W_Q (H, r, d)` and `W_K (K, r, d)`. Every function
checks what it is given against the head counts: a shape that merely happens to divide is not enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headgram.errors import HeadgramError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Dimensions:
    """`H` query heads and `K` key heads of rank `r`, reading a residual stream of width `d`."""

    heads: int
    kv_heads: int
    rank: int
    hidden: int


def separate(dims: Dimensions, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Two `nn.Linear` weights, head after head: `(H·r, d)` and `(K·r, d)`."""
    return query.view(dims.heads, dims.rank, dims.hidden), key.view(dims.kv_heads, dims.rank, dims.hidden)


def separate_shapes(dims: Dimensions) -> dict[str, tuple[int, ...]]:
    return {"query": (dims.heads * dims.rank, dims.hidden), "key": (dims.kv_heads * dims.rank, dims.hidden)}


@dataclass(frozen=True)
class Layout:
    """A layout: the shape that every named tensor must have, and the function that takes them apart."""

    shapes: Callable[[Dimensions], dict[str, tuple[int, ...]]]
    split: Callable[..., tuple[Tensor, Tensor]]


LAYOUTS: dict[str, Layout] = {"separate": Layout(separate_shapes, separate)}


def check_shapes(layout: str, dims: Dimensions, shapes: dict[str, tuple[int, ...]], names: dict[str, str]) -> None:
    """Refuse tensors whose shapes disagree with the head counts.

    Raises
    ------
    HeadgramError
        Names the tensor, its shape and the shape that the configuration asks for.
    """
    for role, expected in LAYOUTS[layout].shapes(dims).items():
        if tuple(shapes[role]) != expected:
            raise HeadgramError(
                f"tensor {names[role]} has shape {tuple(shapes[role])}, but {dims.heads} query and {dims.kv_heads} key heads "
                f"of rank {dims.rank} reading width {dims.hidden} need {expected}: the configuration and the weights disagree"
            )


def undo_gguf_permutation(weight: Tensor, heads: int) -> Tensor:
    """Restore the row order that llama.cpp's converter changed: `(heads · r, d)` in, the same shape out.

    The converter interleaves the two halves of every head for its rotary encoding,
    `reshape(n, 2, r/2, d).swapaxes(1, 2)`; this is the inverse.
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)
