"""Grouped-query attention: which key head a query head reads."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def key_head(heads: int, kv_heads: int) -> Int[Tensor, " heads"]:
    """The key head of each of `H` query heads, of `K`: `h * K // H`."""
    return torch.arange(heads) * kv_heads // heads
