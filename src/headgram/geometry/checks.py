"""What weights must be before anything is measured of them."""

from __future__ import annotations

import torch
from torch import Tensor

from headgram.errors import HeadgramError


def check_floating(name: str, weights: Tensor) -> None:
    """Refuse what is no floating-point tensor.

    Raises
    ------
    HeadgramError
        Says which weights.
    """
    if not weights.is_floating_point():
        raise HeadgramError(f"The {name} weights are {weights.dtype}, not floating point.")


def check_weights(name: str, weights: Tensor) -> None:
    """Refuse what is not a finite floating-point tensor.

    Raises
    ------
    HeadgramError
        Says which weights, and why.
    """
    check_floating(name, weights)
    wide = weights.float() if weights.element_size() == 1 else weights  # torch asks nothing of 8-bit floats
    if not bool(torch.isfinite(wide).all()):
        raise HeadgramError(f"The {name} weights hold a NaN or an infinity.")
