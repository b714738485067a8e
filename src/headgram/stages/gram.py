"""Gram rows: the inner products of one tile of layers with itself and all later ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from headgram.geometry.inner import Precision, inner_products
from headgram.results.asked import still_asked_for
from headgram.results.factors import FactorFiles
from headgram.results.record import Provenance, record_of, seal
from headgram.results.tables import GRAM, read_table, write_table

if TYPE_CHECKING:
    from headgram.study.options import Gram

_TILE = pa.schema([field for field in GRAM if field.name in ("layer_a", "layer_b", "head", "gram", "transposed")])


def measure_row(
    output: Path, weights: Sequence[Path], tiles: Sequence[Sequence[int]], options: Gram, provenance: Provenance
) -> None:
    """Measure a row of tiles, upper triangle only.

    Each finished tile is kept beside the row until the row is whole, so that an interrupted job resumes at the tile
    where it stopped.

    Parameters
    ----------
    output
        The row's Parquet file: layer_a, layer_b, head, gram, transposed.
    weights
        Extracted weights that hold all the layers.
    tiles
        The layers of the row's own tile, then those of every later tile.
    """
    precision = options.precision
    provenance = replace(provenance, precision="float32 where accurate" if precision == "auto" else precision)
    source = FactorFiles(weights, provenance.identity.upstream[0])
    own = tiles[0]
    tables = []
    paths = [_tile_path(output, own, other) for other in tiles]
    for other, path in zip(tiles, paths, strict=True):
        table = _finished(path, provenance)
        if table is None:
            table = _tile(source, own, other, precision, provenance.device)
            write_table(path, table, provenance)
        tables.append(table)
    write_table(output, pa.concat_tables(tables), provenance)
    seal(record_of(output), provenance, [output])
    with still_asked_for():
        for path in paths:
            path.unlink(missing_ok=True)  # the same job of a killed run may still be at work beside this one


def _tile(source: FactorFiles, own: Sequence[int], other: Sequence[int], precision: Precision, device: str) -> pa.Table:
    """Equal head indices of every two layers; one index at a time is in memory."""
    parts = []
    for head in range(source.heads):
        of_own = source.read(own, range(head, head + 1)).to(device)
        of_other = of_own if other == own else source.read(other, range(head, head + 1)).to(device)
        parts.append(inner_products(of_own, of_other, precision))
    exact = sum(bool(part.exact_x.any() or part.exact_y.any()) for part in parts)
    print(f"layers {own[0]}-{own[-1]} with {other[0]}-{other[-1]}: by {parts[0].route}; {exact} heads in float64", flush=True)
    products = torch.stack([part.gram.cpu() for part in parts], -1)
    transposed = torch.stack([part.transposed.cpu() for part in parts], -1)
    return _tile_table(products, transposed, own, other)


def _tile_path(output: Path, own: Sequence[int], other: Sequence[int]) -> Path:
    """A hidden file beside the row, of a name that only headgram gives."""
    return output.with_name(f".{output.name}-tile-{own[0]:03d}-{own[-1]:03d}-{other[0]:03d}-{other[-1]:03d}")


def _finished(path: Path, provenance: Provenance) -> pa.Table | None:
    """A tile that an earlier run of this very job left whole."""
    try:
        table = read_table(path)
        mine = json.loads(table.schema.metadata[b"headgram"])["key"] == provenance.identity.key
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None
    return table.replace_schema_metadata(None) if mine else None


def _tile_table(products: torch.Tensor, transposed: torch.Tensor, own: Sequence[int], other: Sequence[int]) -> pa.Table:
    """A row per layer pair with `layer_a <= layer_b` and head."""
    a, b, head = np.meshgrid(own, other, np.arange(products.shape[2]), indexing="ij")
    upper = a <= b
    values = [values.numpy()[upper] for values in (products, transposed)]
    return pa.table([a[upper], b[upper], head[upper], *values], names=_TILE.names).cast(_TILE)
