"""Gram rows: the inner products of one tile of layers with itself and all later ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from headgram.geometry.batches import at_once
from headgram.geometry.grouping import key_head
from headgram.geometry.pairs import Precision, pair_products
from headgram.results.asked import still_asked_for
from headgram.results.factors import Weights
from headgram.results.record import Provenance, record_of, seal
from headgram.results.tables import GRAM, read_table, write_table

if TYPE_CHECKING:
    from headgram.study.options import Gram

#: Bytes of the weights of the heads that a GPU works on at once, as stored.
_BATCH_BYTES = 512 * 2**20

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
    source = Weights(weights, provenance.identity.upstream[0])
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


def _tile(source: Weights, own: Sequence[int], other: Sequence[int], precision: Precision, device: str) -> pa.Table:
    """So many heads at a time are in memory."""
    products, transposed, exact = [], [], 0
    for heads, kv_heads in _batches(source, len({*own, *other}), device):
        q_a, k_a = (weights.to(device) for weights in source.of_heads(own, heads, kv_heads))
        q_b, k_b = (q_a, k_a) if other == own else (weights.to(device) for weights in source.of_heads(other, heads, kv_heads))
        result = pair_products(q_a, k_a, q_b, k_b, precision)
        products.append(result.gram.cpu())
        transposed.append(result.transposed.cpu())
        exact += int(result.exact.sum())
    print(f"layers {own[0]}-{own[-1]} with {other[0]}-{other[-1]}: by {result.route}; {exact} heads in float64", flush=True)
    return _tile_table(torch.cat(products, 2), torch.cat(transposed, 2), own, other)


def _batches(source: Weights, layers: int, device: str) -> Iterator[tuple[range, range]]:
    """Query heads and the key heads that they read: on a CPU one after the other; else as many as may be in memory."""
    heads, kv_heads = source.heads
    if not at_once(torch.device(device)) or heads % kv_heads:
        for head, kv in enumerate(key_head(heads, kv_heads).tolist()):
            yield range(head, head + 1), range(kv, kv + 1)
        return
    readers = heads // kv_heads
    count = max(1, _BATCH_BYTES * kv_heads // (layers * source.layer_bytes))
    for start in range(0, kv_heads, count):
        stop = min(start + count, kv_heads)
        yield range(start * readers, stop * readers), range(start, stop)


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


def _tile_table(products: torch.Tensor, transposed: torch.Tensor, own: Sequence[int], other: Sequence[int]) -> pa.Table:
    """A row per layer pair with `layer_a <= layer_b` and head."""
    a, b, head = np.meshgrid(own, other, np.arange(products.shape[2]), indexing="ij")
    upper = a <= b
    values = [values.numpy()[upper] for values in (products, transposed)]
    return pa.table([a[upper], b[upper], head[upper], *values], names=_TILE.names).cast(_TILE)
