"""Extraction: the query and key weights of a group of layers, out of a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headgram.checkpoints.checkpoint import Checkpoint, open_checkpoint
from headgram.errors import HeadgramError
from headgram.geometry.checks import is_finite
from headgram.results.factors import write_factors
from headgram.results.record import Provenance, record_of, seal

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def extract(
    output: Path, source: Mapping[str, Any], layers: Sequence[int], digests: Sequence[str], dtype: str, provenance: Provenance
) -> None:
    """Write `W_Q (n, H, r, d)` and `W_K (n, K, r, d)` of a group of layers.

    Parameters
    ----------
    source
        `source`, `revision` and `overrides`, as locked.
    digests
        What `Checkpoint.digest` said of each layer when it was locked.
    dtype
        `stored`, `bfloat16` or `float32`.

    Raises
    ------
    HeadgramError
        If the checkpoint cannot be opened or is not what was locked, or a weight is not finite.
    """
    assert provenance.stack is not None
    try:
        with open_checkpoint(**source) as checkpoint:
            checkpoint.prefetch(provenance.stack, layers)
            before = _states(checkpoint)
            for layer, digest in zip(layers, digests, strict=True):
                if not checkpoint.holds(provenance.stack, layer, digest):
                    raise HeadgramError(_changed(f"layer {layer} changed since it was locked", provenance.model))
            w_q, w_k = read_layers(checkpoint, provenance.stack, layers, dtype)
            for name, state in _states(checkpoint).items():
                if state != before[name]:
                    raise HeadgramError(_changed(f"{name} changed while it was read", provenance.model))
    except HeadgramError as error:
        raise HeadgramError(f"model {provenance.model}, stack {provenance.stack}: {error}") from None
    write_factors(output, layers, {"query": w_q, "key": w_k})
    seal(record_of(output), provenance, [output])


def _states(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    location = checkpoint.location
    return {name: location.state(name) for name in location.weights}


def _changed(what: str, model: str) -> str:
    return f"{what}; if that is meant, run `headgram lock --upgrade {model}` and measure it anew, else restore it"


def read_layers(checkpoint: Checkpoint, stack: str, layers: Sequence[int], dtype: str) -> tuple[Tensor, Tensor]:
    """Stacked weights of some layers, `(n, H, r, d)` and `(n, K, r, d)`, rounded to `dtype`.

    Raises
    ------
    HeadgramError
        If a weight is not finite, before or after rounding.
    """
    checkpoint.prefetch(stack, layers)
    pairs = [[_rounded(weight, dtype, layer) for weight in checkpoint.qk(stack, layer)] for layer in layers]
    w_q, w_k = (_stacked(list(weights)) for weights in zip(*pairs, strict=True))
    return w_q, w_k


def _stacked(weights: list[Tensor]) -> Tensor:
    """One tensor in the widest precision among the layers: a checkpoint may store them in several."""
    widest = functools.reduce(torch.promote_types, (weight.dtype for weight in weights))
    return torch.stack([weight.to(widest) for weight in weights])


def _rounded(weight: Tensor, dtype: str, layer: int) -> Tensor:
    if dtype == "stored":
        return weight
    rounded = weight.to(_DTYPES[dtype])
    if not is_finite(rounded):
        raise HeadgramError(f"layer {layer}: a weight is too large for weights.dtype = {dtype}: use 'stored'")
    return rounded
