"""Merge: one model's shards and rows into the atlas, and into the original script's two files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from headgram.errors import HeadgramError
from headgram.geometry.ratios import cosines
from headgram.results.files import scratch, written_whole
from headgram.results.original import directions_path, write_original_files
from headgram.results.paths import Place
from headgram.results.record import Provenance, Record, check, record_of, seal
from headgram.results.tables import (
    AT_TIMES,
    GRAM,
    HEADS,
    PAIRS,
    SPECTRA,
    TURNING,
    at_place,
    of_place,
    read_parts,
    read_table,
    square,
    write_table,
)

if TYPE_CHECKING:
    from headgram.study.options import Config


@dataclass(frozen=True)
class Parts:
    """What was measured of one circuit of a stack: tables of the eigen shards, each with a `.pt` beside it, and of Gram rows."""

    shards: Sequence[Path]
    rows: Sequence[Path]


@dataclass(frozen=True)
class MergedFiles:
    """The files that a merge writes."""

    heads: Path
    spectra: Path
    gram: Path
    pairs: Path
    directions: Path
    original: Path  # the JSON; its directions lie beside it
    record: Path


def merge(
    parts: Mapping[Place, Parts],
    atlas: MergedFiles,
    options: Config,
    provenance: Provenance,
    turning: tuple[Path, Path] | None = None,
) -> None:
    """Merge one model.

    The record also says how long its parts took, and where.

    Parameters
    ----------
    parts
        By circuit and stack, circuit by circuit, the stacks in the model's order.
    options
        Sections `export` and `original` are read.
    turning
        What the stage `rotary` says of the heads, and its record; None where there is nothing.

    Raises
    ------
    HeadgramError
        If an artifact is damaged or has another key than the job was told.
    """
    circuits = list(dict.fromkeys(circuit for circuit, _ in parts))
    keys = iter(provenance.recipe.upstream)
    eigen_keys, gram_keys = ({circuit: next(keys) for circuit in circuits} for _ in range(2))
    records = {
        "eigen": [check(record_of(path), eigen_keys[place[0]]) for place, part in parts.items() for path in part.shards],
        "gram": [check(record_of(path), gram_keys[place[0]]) for place, part in parts.items() for path in part.rows],
    }

    shards = {place: pa.concat_tables([read_table(path) for path in part.shards]) for place, part in parts.items()}
    rows = {place: _gram_table(place, shards[place], part.rows) for place, part in parts.items()}
    pairs = (table for place, part in parts.items() for table in _pair_tables(place, shards[place], part.rows))

    compression = options.export.compression
    turned = TURNING.empty_table()
    if turning is not None:
        check(turning[1], next(keys), [turning[0]])
        turned = read_table(turning[0])
    heads = [_heads_table(place, table, of_place(place, turned)) for place, table in shards.items()]
    write_table(atlas.heads, [pa.concat_tables(heads)], provenance, compression)
    write_table(atlas.spectra, [pa.concat_tables([_spectra_table(*item) for item in shards.items()])], provenance, compression)
    write_table(atlas.gram, [pa.concat_tables(rows.values())], provenance, compression)
    write_table(atlas.pairs, pairs, provenance, compression)
    with scratch(atlas.directions) as reserve:
        directions = {place: _directions(part.shards, "-".join(place), reserve) for place, part in parts.items()}
        by_circuit = {
            circuit: {stack: _public(directions[circuit, stack]) for each, stack in parts if each == circuit}
            for circuit in circuits
        }
        with written_whole(atlas.directions) as file:
            torch.save(by_circuit, file)
        written = [atlas.heads, atlas.spectra, atlas.gram, atlas.pairs, atlas.directions]
        if options.original.enabled and "qk" in circuits:
            main = next(place for place in parts if place[0] == "qk")  # the original knows one stack per model: the first
            _write_original(atlas.original, provenance.model, shards[main], rows[main], directions[main])
            written += [atlas.original, directions_path(atlas.original)]
    worst = max(record.residual or 0.0 for record in records["eigen"])
    jobs = {stage: _summary(found) for stage, found in records.items()}
    seal(atlas.record, replace(provenance, residual=worst), written, {"jobs": jobs})


def _summary(records: Sequence[Record]) -> dict[str, Any]:
    """How many jobs a stage took, where they ran and how long."""
    seconds = round(sum(record.seconds for record in records), 3)
    devices, machines = (sorted({getattr(record, name) for record in records}) for name in ("device", "machine"))
    return {"count": len(records), "seconds": seconds, "devices": devices, "machines": machines}


def _heads_table(place: Place, shards: pa.Table, turned: pa.Table) -> pa.Table:
    """The heads of all shards; what turns with the offset stays empty where the stage `rotary` says nothing."""
    if not len(turned):
        turned = shards.select(["layer", "head"])
        for name in AT_TIMES:
            turned = turned.append_column(name, pa.nulls(len(shards), pa.float64()))
    _by_layer(turned, turned["head"].to_numpy())
    for name in AT_TIMES:
        shards = shards.append_column(name, turned[name])
    return at_place(place, shards, HEADS)


def _spectra_table(place: Place, shards: pa.Table) -> pa.Table:
    """One row per head and index `0 … 2r-1`; of singular values and eigenvalues there are `r`, the rest are 0."""
    symmetric = _matrix(shards, "symmetric_eigenvalues")
    singular = np.zeros_like(symmetric)
    singular[:, : symmetric.shape[1] // 2] = _matrix(shards, "singular_values")
    own = {}
    for part in ("real", "imaginary"):
        known = shards[f"eigenvalues_{part}"].null_count == 0
        own[part] = np.zeros_like(symmetric) if known else np.full_like(symmetric, np.nan)
        if known:
            own[part][:, : symmetric.shape[1] // 2] = _matrix(shards, f"eigenvalues_{part}")
    count, length = symmetric.shape
    table = pa.table(
        {
            "layer": np.repeat(shards["layer"].to_numpy(), length),
            "head": np.repeat(shards["head"].to_numpy(), length),
            "index": np.tile(np.arange(length, dtype=np.int32), count),
            "singular_value": singular.ravel(),
            "symmetric_eigenvalue": symmetric.ravel(),
            **{f"eigenvalue_{part}": pa.array(values.ravel(), from_pandas=True) for part, values in own.items()},
        }
    )
    return at_place(place, table, SPECTRA)


def _matrix(shards: pa.Table, column: str) -> np.ndarray:
    """A column of equally long lists as an array (rows, length)."""
    values = shards[column].combine_chunks()
    matrix: np.ndarray = values.flatten().to_numpy().reshape(len(values), -1)
    return matrix


def _gram_table(place: Place, shards: pa.Table, paths: Sequence[Path]) -> pa.Table:
    """Equal head indices in order of the layers, with what follows from the two inner products of each pair."""
    tiles = (tile for path in paths for tile in read_parts(path))
    table = pa.concat_tables([tile.filter(pc.equal(tile["head_a"], tile["head_b"])) for tile in tiles])
    table = table.sort_by([("layer_a", "ascending"), ("layer_b", "ascending"), ("head_a", "ascending")])
    gram, transposed, norms = _products(table, shards)
    cosine = cosines(gram, *norms)
    columns = {
        "layer_a": table["layer_a"],
        "layer_b": table["layer_b"],
        "head": table["head_a"],
        "gram": gram,
        "cosine": cosine,
        "transposed": transposed,
        "symmetric": (gram + transposed) / 2,
        "antisymmetric": (gram - transposed) / 2,
        "z": cosine * shards["hidden"][0].as_py(),
    }
    return at_place(place, pa.table(columns), GRAM)


def _pair_tables(place: Place, shards: pa.Table, paths: Sequence[Path]) -> Iterator[pa.Table]:
    """Tile by tile, every pair of two heads, with cosines and whether they share a key head, or a value head."""
    kv_heads, positions = _by_layer(shards, shards["kv_head"].to_numpy())
    itself = (pc.field("layer_a") == pc.field("layer_b")) & (pc.field("head_a") == pc.field("head_b"))
    for tile in (part.filter(~itself) for path in paths for part in read_parts(path)):
        layer_a, head_a, layer_b, head_b = (tile[name].to_numpy() for name in ("layer_a", "head_a", "layer_b", "head_b"))
        gram, transposed, norms = _products(tile, shards)
        shared = kv_heads[positions[layer_a], head_a] == kv_heads[positions[layer_b], head_b]
        columns = {
            **{name: tile[name] for name in ("layer_a", "head_a", "layer_b", "head_b")},
            "shared": shared & (layer_a == layer_b),
            "cosine": cosines(gram, *norms).astype(np.float32),
            "transposed": cosines(transposed, *norms).astype(np.float32),
        }
        yield at_place(place, pa.table(columns), PAIRS)


def _products(pairs: pa.Table, shards: pa.Table) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """`<X, Y>` and `<X, Y^T>` of some pairs, 0 where a form is zero, and the norms of both sides."""
    norms, positions = _by_layer(shards, np.sqrt(shards["fro_sq"].to_numpy()))
    a, b = (norms[positions[pairs[f"layer_{side}"].to_numpy()], pairs[f"head_{side}"].to_numpy()] for side in "ab")
    alive = (a > 0) & (b > 0)
    # Where a form is zero but its weights are not, products leave a trace of rounding.
    gram, transposed = (np.where(alive, pairs[name].to_numpy(), 0.0) for name in ("gram", "transposed"))
    return gram, transposed, (a, b)


def _by_layer(shards: pa.Table, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of the heads as (layers, heads), and the position of every layer index in it."""
    layers = shards["layer"].to_numpy()
    unique = np.unique(layers)
    if len(values) % len(unique) or not np.array_equal(layers, np.repeat(unique, len(values) // len(unique))):
        raise HeadgramError(
            "the shards of a stack lack a layer, or hold one twice: run `headgram verify --repair`, and then again"
        )
    positions = np.zeros(unique[-1] + 1, dtype=int)
    positions[unique] = np.arange(len(unique))
    return values.reshape(len(unique), -1), positions


def _directions(shards: Sequence[Path], place: str, reserve: Callable[[str, int], Path]) -> dict[str, torch.Tensor]:
    """The shards' tensors, joined along the layers. They may exceed the memory of a job, so they are mapped, not loaded."""
    loaded = [torch.load(path.with_suffix(".pt"), mmap=True, weights_only=True) for path in shards]
    layers = torch.tensor([layer for part in loaded for layer in part["layers"]])
    names = [name for name in loaded[0] if name != "layers"]
    return {"layers": layers} | {name: _joined([part[name] for part in loaded], f"{place}-{name}", reserve) for name in names}


def _joined(parts: Sequence[torch.Tensor], name: str, reserve: Callable[[str, int], Path]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    path = reserve(name, math.prod(shape) * parts[0].element_size())
    whole = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=parts[0].dtype).view(shape)
    position = 0
    for part in parts:
        whole[position : position + len(part)] = part
        position += len(part)
    return whole


def _public(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith("original_")}


def _write_original(path: Path, model: str, shards: pa.Table, rows: pa.Table, directions: Mapping[str, torch.Tensor]) -> None:
    eig_dirs = directions["original_eig_dirs"]
    layers, heads = eig_dirs.shape[:2]
    eigenvalues = torch.from_numpy(_matrix(shards, "symmetric_eigenvalues").copy())
    write_original_files(
        path,
        model,
        head_dim=int(shards["rank"][0].as_py()),
        gram=torch.from_numpy(square(rows, "gram", np.unique(shards["layer"]), heads)),
        fro_sq=directions["original_fro_sq"],
        eig_dirs=eig_dirs,
        symmetric_eigenvalues=eigenvalues.reshape(layers, heads, -1),
    )
