"""Products of float32 that a GPU must not shorten."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def whole_float32() -> Iterator[None]:
    """Products of float32 keep all their bits here, even where the caller lets a GPU round factors to TF32."""
    matmul = torch.backends.cuda.matmul
    # Before torch 2.9 there is only the older name; later, the two must not be mixed.
    name, whole = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    allowed = getattr(matmul, name)
    setattr(matmul, name, whole)
    try:
        yield
    finally:
        setattr(matmul, name, allowed)
