"""Ratios of what may be zero."""

from __future__ import annotations

from torch import Tensor


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`numerator / denominator`, and 0 where the denominator is 0."""
    safe = denominator.where(denominator != 0, 1)
    return (numerator / safe).where(denominator != 0, 0)
