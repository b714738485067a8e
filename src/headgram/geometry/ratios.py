"""Ratios of what may be zero."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

#: What is below so many units of rounding of the numbers that it was made of cannot be told from zero.
ZERO = 16 * torch.finfo(torch.float64).eps


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`numerator / denominator`, and 0 where the denominator is 0."""
    safe = denominator.where(denominator != 0, 1)
    return (numerator / safe).where(denominator != 0, 0)


def effective_rank(values: Float[Tensor, "*n rank"]) -> Float[Tensor, "*n"]:
    """The exponential of the entropy of `s² / Σ s²`, of singular values in descending order; 0 where all are 0."""
    energy = values.square()
    share = ratio(energy, energy.sum(-1, keepdim=True))
    return torch.exp(-torch.special.xlogy(share, share).sum(-1)) * (energy[..., 0] > 0)


def cosines(products: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products over the norms of both sides, in `[-1, 1]`; 0 where a norm is 0.

    Divided in two steps: the product of two tiny norms may underflow.
    """
    alive = (a > 0) & (b > 0)
    ratios: np.ndarray = np.where(alive, products / np.where(alive, a, 1) / np.where(alive, b, 1), 0.0).clip(-1, 1)
    return ratios
