"""What weights must be before anything is measured of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headgram.errors import HeadgramError

#: Entries of 8-bit floats, of which torch compares none, that are widened at once.
_PIECE = 2**24


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds no NaN and no infinity: its extremes are looked at, in one pass."""
    if not tensor.numel():
        return True
    pieces = torch.split(tensor.flatten(), _PIECE) if tensor.element_size() == 1 else (tensor,)
    extremes = (torch.aminmax(piece.float() if piece.element_size() == 1 else piece) for piece in pieces)
    return all(math.isfinite(low.item()) and math.isfinite(high.item()) for low, high in extremes)


def check_weights(name: str, weights: Tensor) -> None:
    """Refuse what is not a finite floating-point tensor.

    Raises
    ------
    HeadgramError
        Says which weights, and why.
    """
    if not weights.is_floating_point():
        raise HeadgramError(f"The {name} weights are {weights.dtype}, not floating point.")
    if not is_finite(weights):
        raise HeadgramError(f"The {name} weights hold a NaN or an infinity.")
