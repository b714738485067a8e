"""Extraction: the two factors of every head of a group of layers, for one circuit, out of a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.checkpoints.checkpoint import Checkpoint
from headgram.checkpoints.known import open_checkpoint
from headgram.errors import MANIFEST, HeadgramError, upgrading
from headgram.forms.circuits import CIRCUITS
from headgram.geometry.checks import is_finite
from headgram.results.factors import write_factors
from headgram.results.record import Provenance, record_of, seal

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def extract(
    output: Path,
    source: Mapping[str, Any],
    layers: Sequence[int],
    digests: Sequence[str],
    dtype: str,
    provenance: Provenance,
    manifest: Path = MANIFEST,
) -> None:
    """Write the factors of a circuit in a group of layers, by role: of `qk`, `W_Q (n, H, r, d)` and `W_K (n, K, r, d)`.

    Parameters
    ----------
    source
        `source`, `revision` and `overrides`, as locked.
    digests
        What `Checkpoint.digest` said of each layer when it was locked.
    dtype
        `stored`, `bfloat16` or `float32`.
    manifest
        Named by what is said of a checkpoint that changed.

    Raises
    ------
    HeadgramError
        If the checkpoint cannot be opened or is not what was locked, or a weight is not finite.
    """
    assert provenance.stack is not None
    assert provenance.circuit is not None
    roles = CIRCUITS[provenance.circuit].roles
    try:
        with open_checkpoint(**source) as checkpoint:
            checkpoint.prefetch(provenance.stack, layers, roles)
            before = _states(checkpoint)
            read = []
            for layer, digest in zip(layers, digests, strict=True):
                if not checkpoint.holds(provenance.stack, layer, digest, roles):
                    raise HeadgramError(f"layer {layer} changed since it was locked; {upgrading(provenance.model, manifest)}")
                read.append(_rounded(checkpoint.factors(provenance.stack, layer, roles), dtype, layer))
            for name, state in _states(checkpoint).items():
                if state != before[name]:
                    raise HeadgramError(f"{name} changed while it was read; {upgrading(provenance.model, manifest)}")
    except HeadgramError as error:
        raise HeadgramError(f"model {provenance.model}, stack {provenance.stack}: {error}") from None
    write_factors(output, layers, _stacked(read))
    seal(record_of(output), provenance, [output])


def _states(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    location = checkpoint.location
    return {name: location.state(name) for name in location.weights}


def read_layers(
    checkpoint: Checkpoint, stack: str, layers: Sequence[int], roles: Sequence[str], dtype: str
) -> dict[str, Float[Tensor, "layers heads rank width"]]:
    """The factors of some layers, by role, rounded to `dtype`.

    Raises
    ------
    HeadgramError
        If a weight is not finite, before or after rounding.
    """
    checkpoint.prefetch(stack, layers, roles)
    return _stacked([_rounded(checkpoint.factors(stack, layer, roles), dtype, layer) for layer in layers])


def _stacked(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """By role, one tensor in the widest precision among the layers: a checkpoint may store them in several."""
    of_roles = {role: [factors[role] for factors in layers] for role in layers[0]}
    widest = {role: functools.reduce(torch.promote_types, (weight.dtype for weight in some)) for role, some in of_roles.items()}
    return {role: torch.stack([weight.to(widest[role]) for weight in some]) for role, some in of_roles.items()}


def _rounded(factors: Mapping[str, Tensor], dtype: str, layer: int) -> Mapping[str, Tensor]:
    if dtype == "stored":
        return factors
    rounded = {role: weight.to(_DTYPES[dtype]) for role, weight in factors.items()}
    if not all(map(is_finite, rounded.values())):
        raise HeadgramError(f"layer {layer}: a weight is too large for weights.dtype = {dtype}: use 'stored'")
    return rounded
