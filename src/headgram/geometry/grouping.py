"""Grouped-query attention: which key head a query head reads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor


def key_head(heads: int, kv_heads: int) -> Int[Tensor, " heads"]:
    """The key head of each of `H` query heads, of `K`: `h * K // H`."""
    return torch.arange(heads) * kv_heads // heads


def groups(heads: int, kv_heads: int) -> Iterator[tuple[int, range]]:
    """Every key head with the query heads that read it, in order: they are neighbours."""
    reads = key_head(heads, kv_heads)
    starts = torch.searchsorted(reads, torch.arange(kv_heads + 1)).tolist()
    for kv in range(kv_heads):
        yield kv, range(starts[kv], starts[kv + 1])
