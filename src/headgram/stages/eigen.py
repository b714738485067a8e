"""Eigen shards: the spectra of every head of some layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from headgram.artifacts import Provenance, record_of, seal, written_whole
from headgram.errors import HeadgramError
from headgram.geometry.grouping import key_head
from headgram.geometry.heads import Spectrum, spectrum
from headgram.geometry.original import original_quantities
from headgram.geometry.scores import layer_scores, symmetry_score
from headgram.tables import HEADS, LAYER_SCORES, SCALARS, write_table
from headgram.weights_file import Weights

_SHARD = pa.schema(
    [field for field in HEADS if field.name != "stack"]
    + [(name, pa.float64()) for name in LAYER_SCORES]  # the same for every head of a layer
    + [("singular_values", pa.list_(pa.float64())), ("symmetric_eigenvalues", pa.list_(pa.float64()))]
)


def measure_shard(
    table: Path, tensors: Path, weights: Sequence[Path], layers: Sequence[int], config: Mapping[str, Any], provenance: Provenance
) -> None:
    """Measure a shard and write its table and its directions.

    Parameters
    ----------
    table, tensors
        The Parquet file (a row per head: scalars and values) and the `.pt` file (directions, float32).
    weights
        Extracted weights that hold all the layers.
    config
        `{"eigen": {"topk", "tolerance", …}, "original": {"enabled"}}`.

    Raises
    ------
    HeadgramError
        If a residual exceeds the tolerance: names model, stack, layer and head.
    """
    source = Weights(weights, provenance.identity.upstream[0])
    rows: list[dict[str, Any]] = []
    kept: dict[str, list[torch.Tensor]] = {}
    worst = 0.0
    for layer in layers:
        w_q, w_k = (weight.to(provenance.device) for weight in source.layer(layer))
        where = f"model {provenance.model}, stack {provenance.stack}, layer {layer}"
        try:
            result = spectrum(w_q, w_k, config["eigen"]["topk"])
            scores = _scores(result, w_q, w_k)
        except HeadgramError as error:
            raise HeadgramError(f"{where}: {error}") from None
        worst = max(worst, _largest_residual(result, config["eigen"]["tolerance"], where))
        reads = key_head(len(w_q), len(w_k)).tolist()
        rows += _rows(result, scores, layer=layer, reads=reads, rank=w_q.shape[1], hidden=w_q.shape[2])
        tensors_of_layer = _directions(result)
        if config["original"]["enabled"]:
            fro_sq, eig_dirs = original_quantities(w_q, w_k, config["eigen"]["topk"])
            tensors_of_layer |= {"original_fro_sq": fro_sq, "original_eig_dirs": eig_dirs}
        for name, value in tensors_of_layer.items():
            kept.setdefault(name, []).append(value.cpu())
    write_table(table, pa.Table.from_pylist(rows, schema=_SHARD), provenance)
    with written_whole(tensors) as file:
        torch.save({"layers": list(layers)} | {name: torch.stack(values) for name, values in kept.items()}, file)
    seal(record_of(table), replace(provenance, residual=worst), [table, tensors])


def _largest_residual(result: Spectrum, tolerance: float, where: str) -> float:
    worst, head = result.residual.max(0)
    if not worst.item() <= tolerance:
        raise HeadgramError(
            f"{where}, head {int(head)}: the result fails its identities by {worst.item():.1e}, more than eigen.tolerance = "
            f"{tolerance:.1e}; nothing was written: raise the tolerance if that is meant, or report the checkpoint"
        )
    return float(worst)


def _scores(result: Spectrum, w_q: torch.Tensor, w_k: torch.Tensor) -> dict[str, list[float]]:
    """The scores of every head, and those of the whole layer once per head."""
    of_layer = layer_scores(w_q, w_k)
    return {
        "symmetry_score": symmetry_score(result.fro_sq, result.self_overlap).tolist(),
        "directionality": result.directionality.tolist(),
        "layer_symmetry_score": [of_layer.symmetry_score] * len(w_q),
        "layer_directionality": [of_layer.directionality] * len(w_q),
    }


def _rows(
    result: Spectrum, scores: Mapping[str, Sequence[float]], layer: int, reads: Sequence[int], rank: int, hidden: int
) -> list[dict[str, Any]]:
    scalars = {name: getattr(result, name).tolist() for name in SCALARS} | dict(scores)
    singular, symmetric = result.singular_values.tolist(), result.symmetric_eigenvalues.tolist()
    return [
        {"layer": layer, "head": head, "kv_head": reads[head], "rank": rank, "hidden": hidden}
        | {name: values[head] for name, values in scalars.items()}
        | {"singular_values": singular[head], "symmetric_eigenvalues": symmetric[head]}
        for head in range(len(singular))
    ]


def _directions(result: Spectrum) -> dict[str, torch.Tensor]:
    kept = result.signed.shape[1]
    return {
        "right": result.right.float(),
        "left": result.left.float(),
        "signed": result.signed.float(),
        "signed_values": result.symmetric_eigenvalues[:, :kept].float(),
    }
