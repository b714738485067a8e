"""What weights must be before anything is measured of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from headgram.errors import HeadgramError

#: Entries of 8-bit floats, of which torch compares none, that are widened at once.
_PIECE = 2**24


def is_finite(*tensors: Tensor) -> bool:
    """Whether floating-point tensors of one device hold no NaN and no infinity.

    The extremes of each are looked at, in one pass; a GPU is waited for once.
    """
    pieces = (piece for tensor in tensors if tensor.numel() for piece in _pieces(tensor))
    extremes = [extreme.double() for piece in pieces for extreme in torch.aminmax(piece)]
    return not extremes or all(map(math.isfinite, torch.stack(extremes).tolist()))


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    """The tensor itself, or parts of it that torch compares."""
    return (piece.float() for piece in torch.split(tensor.flatten(), _PIECE)) if tensor.element_size() == 1 else (tensor,)


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
