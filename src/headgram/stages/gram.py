"""Gram rows: the inner products of one tile of layers with itself and all later ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from headgram.artifacts import Provenance, record_of, seal
from headgram.geometry.pairs import gram
from headgram.tables import GRAM, read_table, write_table
from headgram.weights_file import Weights

_TILE = pa.schema([field for field in GRAM if field.name in ("layer_a", "layer_b", "head", "gram")])


def measure_row(output: Path, weights: Sequence[Path], tiles: Sequence[Sequence[int]], provenance: Provenance) -> None:
    """Measure a row of tiles, upper triangle only.

    Each finished tile is kept beside the row until the row is whole, so that an interrupted job resumes at the tile
    where it stopped.

    Parameters
    ----------
    output
        The row's Parquet file: layer_a, layer_b, head, gram.
    weights
        Extracted weights that hold all the layers.
    tiles
        The layers of the row's own tile, then those of every later tile.
    """
    source = Weights(weights, provenance.identity.upstream[0])
    own = tiles[0]
    rows_a = None
    tables = []
    paths = [_tile_path(output, own, other) for other in tiles]
    for other, path in zip(tiles, paths, strict=True):
        table = _finished(path, provenance)
        if table is None:
            rows_a = rows_a or source.run(own, provenance.device)
            rows_b = rows_a if other == own else source.run(other, provenance.device)
            table = _tile_table(gram(*rows_a, *rows_b), own, other)
            write_table(path, table, provenance)
        tables.append(table)
    write_table(output, pa.concat_tables(tables), provenance)
    seal(record_of(output), provenance, [output])
    for path in paths:
        path.unlink(missing_ok=True)  # the same job of a killed run may still be at work beside this one


def _tile_path(output: Path, own: Sequence[int], other: Sequence[int]) -> Path:
    return output.with_name(f"tile-{own[0]:03d}-{own[-1]:03d}-{other[0]:03d}-{other[-1]:03d}.parquet")


def _finished(path: Path, provenance: Provenance) -> pa.Table | None:
    """A tile that an earlier run of this very job left whole."""
    try:
        table = read_table(path)
        mine = json.loads(table.schema.metadata[b"headgram"])["key"] == provenance.identity.key
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None
    return table.replace_schema_metadata(None) if mine else None


def _tile_table(values: torch.Tensor, own: Sequence[int], other: Sequence[int]) -> pa.Table:
    """A row per layer pair with `layer_a <= layer_b` and head."""
    a, b, head = np.meshgrid(own, other, np.arange(values.shape[2]), indexing="ij")
    upper = a <= b
    return pa.table([a[upper], b[upper], head[upper], values.cpu().numpy()[upper]], names=_TILE.names).cast(_TILE)
