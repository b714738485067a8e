"""How the query and key weights of one layer lie in the tensors of a checkpoint.

A layout takes the named tensors of one layer, as stored, and returns `W_Q (H, r, d)` and `W_K (K, r, d)`. Every function
checks what it is given against the head counts: a shape that merely happens to divide is not enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headgram.errors import HeadgramError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Dimensions:
    """`H` query heads and `K` key heads of rank `r`, reading a residual stream of width `d`.

    `sizes` holds what a layout needs besides, such as the widths of latent attention's factors.
    """

    heads: int
    kv_heads: int
    rank: int
    hidden: int
    sizes: Mapping[str, int] = field(default_factory=dict)


Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """A layout: the shape that every named tensor must have, and the function that takes them apart.

    `sizes` names the entries of `Dimensions.sizes` that it reads.
    """

    shapes: Callable[[Dimensions], Shapes]
    split: Callable[..., tuple[Tensor, Tensor]]
    sizes: tuple[str, ...] = ()


def _separate_shapes(dims: Dimensions) -> Shapes:
    return {"query": (dims.heads * dims.rank, dims.hidden), "key": (dims.kv_heads * dims.rank, dims.hidden)}


def separate(dims: Dimensions, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Two `nn.Linear` weights, head after head: `(H·r, d)` and `(K·r, d)`."""
    return query.view(dims.heads, dims.rank, dims.hidden), key.view(dims.kv_heads, dims.rank, dims.hidden)


def _gated_shapes(dims: Dimensions) -> Shapes:
    return {"query": (dims.heads * 2 * dims.rank, dims.hidden), "key": (dims.kv_heads * dims.rank, dims.hidden)}


def gated(dims: Dimensions, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """As `separate`, but every query head is followed by a gate of the same size: `(H·2·r, d)`."""
    return query.view(dims.heads, 2, dims.rank, dims.hidden)[:, 0], key.view(dims.kv_heads, dims.rank, dims.hidden)


def _fused_shapes(dims: Dimensions) -> Shapes:
    return {"fused": ((dims.heads + 2 * dims.kv_heads) * dims.rank, dims.hidden)}


def blocks(dims: Dimensions, fused: Tensor) -> tuple[Tensor, Tensor]:
    """One weight with the blocks `[q; k; v]`, each head after head: `((H + 2K)·r, d)`."""
    heads = fused.view(-1, dims.rank, dims.hidden)
    return heads[: dims.heads], heads[dims.heads : dims.heads + dims.kv_heads]


def _column_shapes(dims: Dimensions) -> Shapes:
    return {"fused": (dims.hidden, (dims.heads + 2 * dims.kv_heads) * dims.rank)}


def column_blocks(dims: Dimensions, fused: Tensor) -> tuple[Tensor, Tensor]:
    """As `blocks`, but stored `(in, out)`, as GPT-2's `Conv1D` does."""
    return blocks(dims, fused.t().contiguous())


def interleaved(dims: Dimensions, fused: Tensor) -> tuple[Tensor, Tensor]:
    """One weight, key head after key head: its query heads, the key head, its value head, `(K·(H/K + 2)·r, d)`."""
    group = dims.heads // dims.kv_heads
    heads = fused.view(dims.kv_heads, group + 2, dims.rank, dims.hidden)
    return heads[:, :group].reshape(dims.heads, dims.rank, dims.hidden), heads[:, group]


def _quarter_shapes(dims: Dimensions) -> Shapes:
    if dims.heads % 4:
        raise HeadgramError(f"{dims.heads} heads do not divide into the 4 parts that this layout stores them in")
    return _fused_shapes(dims)


def quarters(dims: Dimensions, fused: Tensor) -> tuple[Tensor, Tensor]:
    """CodeGen's one weight in four parts, each a quarter of all heads as `[q; v; k]`: `(4·3·(H/4)·r, d)`."""
    parts = fused.view(4, 3, dims.heads // 4, dims.rank, dims.hidden)
    return parts[:, 0].reshape(dims.heads, dims.rank, dims.hidden), parts[:, 2].reshape(dims.heads, dims.rank, dims.hidden)


def _latent_key_shapes(dims: Dimensions) -> Shapes:
    nope, rope, value, latent = (dims.sizes[name] for name in ("nope", "rope", "value", "key_latent"))
    return {
        "key_down": (latent + rope, dims.hidden),
        "key_gain": (latent,),
        "key_up": (dims.heads * (nope + value), latent),
    }


def _latent_shapes(dims: Dimensions) -> Shapes:
    latent = dims.sizes["query_latent"]
    query: Shapes = {"query_down": (latent, dims.hidden), "query_gain": (latent,), "query_up": (dims.heads * dims.rank, latent)}
    return query | _latent_key_shapes(dims)


def _latent_direct_shapes(dims: Dimensions) -> Shapes:
    return {"query": (dims.heads * dims.rank, dims.hidden)} | _latent_key_shapes(dims)


def latent(
    dims: Dimensions, query_down: Tensor, query_gain: Tensor, query_up: Tensor, key_down: Tensor, key_gain: Tensor, key_up: Tensor
) -> tuple[Tensor, Tensor]:
    """Multi-head latent attention: `W_Q` and `W_K` as products of their factors, in float32 or better.

    A norm between the factors contributes its gain; its data-dependent scale, one number per token, is left out. The last
    `rope` rows of every key head are shared by all heads.
    """
    query = _exact(query_up) @ (_exact(query_gain)[:, None] * _exact(query_down))
    return latent_direct(dims, query, key_down, key_gain, key_up)


def latent_direct(dims: Dimensions, query: Tensor, key_down: Tensor, key_gain: Tensor, key_up: Tensor) -> tuple[Tensor, Tensor]:
    """As `latent`, but the queries are projected in one step: `(H·r, d)`."""
    down, gain = _exact(key_down), _exact(key_gain)
    up = _exact(key_up).view(dims.heads, dims.sizes["nope"] + dims.sizes["value"], -1)[:, : dims.sizes["nope"]]
    own = up @ (gain[:, None] * down[: len(gain)])
    shared = down[len(gain) :].expand(dims.heads, -1, -1)
    key = own.new_empty(dims.heads, dims.rank, dims.hidden)
    key[:, : dims.sizes["nope"]], key[:, dims.sizes["nope"] :] = own, shared
    return _exact(query).view_as(key), key


def _exact(tensor: Tensor) -> Tensor:
    """At least float32: a product of two rounded factors should not be rounded a third time."""
    return tensor if tensor.element_size() >= 4 else tensor.float()


LAYOUTS: dict[str, Layout] = {
    "separate": Layout(_separate_shapes, separate),
    "gated": Layout(_gated_shapes, gated),
    "blocks": Layout(_fused_shapes, blocks),
    "column_blocks": Layout(_column_shapes, column_blocks),
    "interleaved": Layout(_fused_shapes, interleaved),
    "quarters": Layout(_quarter_shapes, quarters),
    "latent": Layout(_latent_shapes, latent, ("nope", "rope", "value", "key_latent", "query_latent")),
    "latent_direct": Layout(_latent_direct_shapes, latent_direct, ("nope", "rope", "value", "key_latent")),
}


def check_shapes(layout: str, dims: Dimensions, shapes: Shapes, names: dict[str, str]) -> None:
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
