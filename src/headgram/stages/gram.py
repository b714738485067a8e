"""Gram rows: the inner products of the heads of one tile of layers with those of the same and of all later tiles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from headgram.geometry.blocks import at_once, in_fitting_blocks
from headgram.geometry.inner import Precision, inner_products
from headgram.geometry.same_index import same_index_products
from headgram.results.asked import still_asked_for
from headgram.results.factors import FactorFiles, factors_of
from headgram.results.files import part_of
from headgram.results.record import Provenance, record_of, seal
from headgram.results.tables import read_table, write_table

if TYPE_CHECKING:
    from headgram.study.options import Gram

#: Bytes of the factors of both sides, in float32, that a GPU is given at once of equal head indices.
_TOGETHER_BYTES = 128 * 2**20

_TILE = pa.schema(
    [(name, pa.int32()) for name in ("layer_a", "head_a", "layer_b", "head_b")]
    + [(name, pa.float64()) for name in ("gram", "transposed")]
)


def measure_row(
    output: Path,
    weights: Sequence[Path],
    tiles: Sequence[Sequence[int]],
    all_pairs: bool,
    options: Gram,
    provenance: Provenance,
    around: tuple[Path, Path] | None = None,
) -> None:
    """Measure a row of tiles: each pair of heads once, the first in the order of layer and head first; each head with itself.

    Each finished tile is kept beside the row until the row is whole, so that an interrupted job resumes at the tile
    where it stopped.

    Parameters
    ----------
    output
        The row's Parquet file: layer_a, head_a, layer_b, head_b, gram, transposed.
    weights
        Extracted weights that hold all the layers.
    tiles
        The layers of the row's own tile, then those of every later tile.
    all_pairs
        Whether all heads are multiplied with all heads, or only those of the same index.
    around
        As in `factors_of`.
    """
    precision = options.precision
    provenance = replace(provenance, precision="float32 where accurate" if precision == "auto" else precision)
    source, device = factors_of(weights, around, provenance), provenance.device
    own = tiles[0]
    tables = []
    paths = [part_of(output, f"{own[0]:03d}-{own[-1]:03d}-{other[0]:03d}-{other[-1]:03d}") for other in tiles]
    for other, path in zip(tiles, paths, strict=True):
        table = _finished(path, provenance)
        if table is None:
            if all_pairs:
                table = in_fitting_blocks(device, partial(_all_pairs, source, own, other, precision, device))
            else:
                table = _same_index(source, own, other, precision, device)
            write_table(path, [table], provenance)
        tables.append(table)
    write_table(output, tables, provenance)
    seal(record_of(output), provenance, [output])
    with still_asked_for():
        for path in paths:
            path.unlink(missing_ok=True)  # the same job of a killed run may still be at work beside this one


def _all_pairs(
    source: FactorFiles, own: Sequence[int], other: Sequence[int], precision: Precision, device: str, size: int
) -> pa.Table:
    """All heads of a tile with all heads of another, or of itself; two blocks of heads at a time are in memory."""
    same = own == other
    blocks = [source.blocks(layers, size) for layers in (own, other)]
    places = [np.array([(layer, head) for layers, heads in each for layer in layers for head in heads]) for each in blocks]
    starts = [np.cumsum([0, *(len(layers) * len(heads) for layers, heads in each)]) for each in blocks]
    products, transposed = (np.zeros((len(places[0]), len(places[1]))) for _ in range(2))
    exact, routes = np.zeros(len(places[0]), dtype=bool), set()
    for i, block in enumerate(blocks[0]):
        x = source.read(*block, device=device)
        for j in range(i if same else 0, len(blocks[1])):
            y = x if same and i == j else source.read(*blocks[1][j], device=device)
            found = inner_products(x, y, precision)
            rows, columns = slice(*starts[0][i : i + 2]), slice(*starts[1][j : j + 2])
            products[rows, columns], transposed[rows, columns] = found.gram.cpu().numpy(), found.transposed.cpu().numpy()
            exact[rows] |= found.exact_x.numpy()
            routes.add(found.route)
    _say(own, other, " and ".join(sorted(routes)), int(exact.sum()))
    wanted = np.triu(np.ones_like(products, dtype=bool)) if same else np.ones_like(products, dtype=bool)
    first, second = np.nonzero(wanted)
    return _tile_table(places[0][first], places[1][second], products[wanted], transposed[wanted])


def _same_index(source: FactorFiles, own: Sequence[int], other: Sequence[int], precision: Precision, device: str) -> pa.Table:
    """Equal head indices of every two layers; on a CPU one index at a time is in memory."""
    of_index = 4 * source.rank * source.width * (len(own) + len(other))
    together = max(1, _TOGETHER_BYTES // of_index) if at_once(torch.device(device)) else 1
    parts = []
    for start in range(0, source.heads, together):
        indices = range(start, min(start + together, source.heads))
        of_own = source.read(own, indices, device)
        of_other = of_own if other == own else source.read(other, indices, device)
        parts.append(same_index_products(of_own, of_other, len(indices), precision))
    _say(own, other, parts[0].route, sum(int(part.exact.sum()) for part in parts))
    layer_a, layer_b, head = np.meshgrid(own, other, np.arange(source.heads), indexing="ij")
    upper = layer_a <= layer_b
    heads_a, heads_b = (np.stack([layers[upper], head[upper]], -1) for layers in (layer_a, layer_b))
    products = np.concatenate([part.gram.cpu().numpy() for part in parts], -1)[upper]
    transposed = np.concatenate([part.transposed.cpu().numpy() for part in parts], -1)[upper]
    return _tile_table(heads_a, heads_b, products, transposed)


def _say(own: Sequence[int], other: Sequence[int], route: str, exact: int) -> None:
    print(f"layers {own[0]}-{own[-1]} with {other[0]}-{other[-1]}: by {route}; {exact} heads in float64", flush=True)


def _finished(path: Path, provenance: Provenance) -> pa.Table | None:
    """A tile that an earlier run of this very job left whole."""
    try:
        table = read_table(path)
        mine = json.loads(table.schema.metadata[b"headgram"])["key"] == provenance.recipe.key
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return None
    return table.replace_schema_metadata(None) if mine else None


def _tile_table(first: np.ndarray, second: np.ndarray, products: np.ndarray, transposed: np.ndarray) -> pa.Table:
    """A row per pair of heads, each given as layer and head."""
    return pa.table([*first.T, *second.T, products, transposed], names=_TILE.names).cast(_TILE)
