"""Eigen shards: the spectra of every head of some layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from headgram.errors import HeadgramError
from headgram.forms.circuits import shared_head
from headgram.forms.heads import Heads
from headgram.forms.variants import Variant
from headgram.geometry.blocks import at_once
from headgram.geometry.costs import LAYERS_BYTES
from headgram.geometry.eigenvalues import Eigenvalues, eigenvalues
from headgram.geometry.original import original_quantities
from headgram.geometry.scores import LayerScores, layer_scores, symmetry_score
from headgram.geometry.spectra import Spectrum, spectra
from headgram.results.factors import factors_of
from headgram.results.files import written_whole
from headgram.results.paths import between_streams
from headgram.results.record import Provenance, record_of, seal
from headgram.results.tables import AT_TIMES, COPYING, HEADS, LAYER_SCORES, SCALARS, WHERE, write_table

if TYPE_CHECKING:
    from headgram.study.options import Config

_SHARD = pa.schema(
    [field for field in HEADS if field.name not in (*WHERE, *AT_TIMES)]
    + [(name, pa.float64()) for name in LAYER_SCORES]  # the same for every head of a layer
    + [("singular_values", pa.list_(pa.float64())), ("symmetric_eigenvalues", pa.list_(pa.float64()))]
    + [(name, pa.list_(pa.float64())) for name in ("eigenvalues_real", "eigenvalues_imaginary")]  # null where COPYING is
)


def measure_shard(
    table: Path,
    tensors: Path,
    weights: Sequence[Path],
    layers: Sequence[int],
    options: Config,
    provenance: Provenance,
    around: tuple[Path, Path] | None = None,
) -> None:
    """Measure a shard and write its table and its directions.

    Parameters
    ----------
    table, tensors
        The Parquet file (a row per head: scalars and values) and the `.pt` file (directions, float32).
    weights
        Extracted weights that hold all the layers.
    options
        Sections `eigen` and `original` are read.
    around
        As in `factors_of`.

    Raises
    ------
    HeadgramError
        If a residual exceeds the tolerance: names model, stack, layer and head.
    """
    source = factors_of(weights, around, provenance)
    device, topk = provenance.device, options.eigen.topk
    place = f"model {provenance.model}, stack {provenance.stack}, circuit {provenance.circuit}"
    together = max(1, LAYERS_BYTES // source.layer_bytes) if at_once(torch.device(device)) else 1
    reads = shared_head(source.heads, source.kv_heads).tolist()
    rows: list[dict[str, Any]] = []
    kept: dict[str, list[torch.Tensor]] = {}
    worst = 0.0
    copies = Variant.of(str(provenance.circuit)).circuit == "ov" and not between_streams(str(provenance.stack))
    for start in range(0, len(layers), together):
        block = layers[start : start + together]
        heads = source.read(block, device=device)
        result, scores = _measured(heads, block, topk, place)
        found = eigenvalues(heads) if copies else None
        residual = torch.maximum(result.residual.cpu(), found.residual) if found else result.residual
        worst = max(worst, _largest_residual(residual, options.eigen.tolerance, block, place))
        rows += _rows(result, found, scores, block, reads, rank=source.rank, hidden=source.width)
        tensors_of_run = _directions(result)
        if options.original.enabled:
            fro_sq, eig_dirs = original_quantities(heads, topk)
            tensors_of_run |= {"original_fro_sq": fro_sq, "original_eig_dirs": eig_dirs}
        for name, value in tensors_of_run.items():
            kept.setdefault(name, []).append(value.cpu().unflatten(0, (len(block), -1)))
    write_table(table, [pa.Table.from_pylist(rows, schema=_SHARD)], provenance)
    with written_whole(tensors) as file:
        torch.save({"layers": list(layers)} | {name: torch.cat(values) for name, values in kept.items()}, file)
    seal(record_of(table), replace(provenance, residual=worst), [table, tensors])


def _measured(heads: Heads, layers: Sequence[int], topk: int, place: str) -> tuple[Spectrum, list[LayerScores]]:
    """Spectra of all heads of some layers, and the scores of these layers."""
    count = len(heads) // len(layers)
    apart = [heads.take(slice(start, start + count)) for start in range(0, len(heads), count)]
    try:
        return spectra(heads, topk), [layer_scores(each) for each in apart]
    except HeadgramError as error:
        if len(layers) > 1:  # one by one, to say which
            for each, layer in zip(apart, layers, strict=True):
                _measured(each, [layer], topk, place)
        raise HeadgramError(f"{place}, layer {layers[0]}: {error}") from None


def _largest_residual(residual: torch.Tensor, tolerance: float, layers: Sequence[int], place: str) -> float:
    worst, row = residual.max(0)
    if not worst.item() <= tolerance:
        layer, head = divmod(int(row), len(residual) // len(layers))
        raise HeadgramError(
            f"{place}, layer {layers[layer]}, head {head}: the result fails its identities by {worst.item():.1e}, "
            f"more than eigen.tolerance = {tolerance:.1e}; nothing was written: raise the tolerance if that is meant, or report "
            "the checkpoint"
        )
    return float(worst)


def _rows(
    result: Spectrum,
    found: Eigenvalues | None,
    scores: Sequence[LayerScores],
    layers: Sequence[int],
    reads: Sequence[int],
    rank: int,
    hidden: int,
) -> list[dict[str, Any]]:
    """A row per head, layer by layer."""
    values = {name: getattr(result, name).tolist() for name in (*SCALARS, "singular_values", "symmetric_eigenvalues")}
    values["directionality"] = result.directionality.tolist()
    values["symmetry_score"] = symmetry_score(result.fro_sq, result.self_overlap).tolist()
    if found:
        values |= {name: getattr(found, name).tolist() for name in COPYING}
        values |= {"eigenvalues_real": found.values.real.tolist(), "eigenvalues_imaginary": found.values.imag.tolist()}
    heads = itertools.product(zip(layers, scores, strict=True), enumerate(reads))
    return [
        {"layer": layer, "head": head, "kv_head": kv, "rank": rank, "hidden": hidden}
        | {"layer_symmetry_score": of_layer.symmetry_score, "layer_directionality": of_layer.directionality}
        | {name: column[row] for name, column in values.items()}
        for row, ((layer, of_layer), (head, kv)) in enumerate(heads)
    ]


def _directions(result: Spectrum) -> dict[str, torch.Tensor]:
    kept = result.signed.shape[1]
    return {
        "right": result.right.float(),
        "left": result.left.float(),
        "signed": result.signed.float(),
        "signed_values": result.symmetric_eigenvalues[:, :kept].float(),
    }
