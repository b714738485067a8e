"""Derivation: what follows from one model's part of the atlas, about pairs of layers, near heads, layers, and the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from headgram.geometry.blocks import at_once
from headgram.geometry.neighbours import BY_FORM, BY_SPAN, Neighbours, nearest_heads, span_overlaps
from headgram.geometry.nulls import Null, cosine_null, overlap_null
from headgram.geometry.overlaps import overlaps
from headgram.results.around import around_of, read_around
from headgram.results.paths import Place
from headgram.results.record import Provenance, canonical, check, record_of, seal
from headgram.results.tables import (
    AROUND_MODELS,
    LAYER_SCORES,
    LAYERS,
    MODELS,
    NEIGHBOURS,
    OVERLAP,
    QUARTILES,
    SIDES,
    SUMMARISED,
    at_place,
    of_place,
    pair_indices,
    read_parts,
    read_table,
    square,
    write_table,
)

if TYPE_CHECKING:
    from headgram.forms.reading import Frames
    from headgram.study.options import Export

#: How many of the nearest heads are kept, by each measure.
NEAREST = 8
#: Bytes of the directions that a GPU is given at once, in float64.
_TOGETHER_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Merged:
    """What a merge wrote of a model; by circuit and stack, tables of the eigen shards, which also hold the scores of layers."""

    heads: Path
    gram: Path
    pairs: Path
    directions: Path
    record: Path
    shards: Mapping[Place, Sequence[Path]]
    around: tuple[Path, Path] | None = None  # what stands around the projections, and its record


@dataclass(frozen=True)
class Derived:
    """The files that a derivation writes."""

    overlap: Path
    neighbours: Path
    layers: Path
    models: Path
    record: Path


@dataclass(frozen=True)
class _Stack:
    """What was measured of one circuit of a stack, as arrays: `L` layers, `H` heads."""

    place: Place
    layers: np.ndarray  # (L,) true indices
    facts: dict[str, int]  # layers, heads, kv_heads, rank, hidden, directions
    numbers: dict[str, np.ndarray]  # of heads (L, H)
    layer_scores: dict[str, np.ndarray]  # (L,)
    cosine: np.ndarray  # (L, L, H)
    overlap: dict[str, np.ndarray]  # by side (L, L, H)
    neighbours: dict[str, Neighbours]  # by measure


def derive(merged: Merged, derived: Derived, facts: Mapping[str, Any], options: Export, provenance: Provenance) -> None:
    """Derive one model's tables.

    Parameters
    ----------
    facts
        `{"architecture": name, "stored_dtypes": [[circuit, stack, name], …]}`, as locked, and `labels`, as in the manifest.

    Raises
    ------
    HeadgramError
        If an artifact is damaged or has another key than the job was told.
    """
    circuits = list(dict.fromkeys(circuit for circuit, _ in merged.shards))
    merge_key, *keys = provenance.recipe.upstream
    frames = read_around(*merged.around, keys.pop()) if merged.around else {}
    eigen_keys = dict(zip(circuits, keys, strict=True))
    check(merged.record, merge_key, [merged.heads, merged.gram, merged.pairs, merged.directions])
    for (circuit, _), paths in merged.shards.items():
        for path in paths:
            check(record_of(path), eigen_keys[circuit])
    heads, gram = read_table(merged.heads), read_table(merged.gram)
    stacks = [
        _stack(place, of_place(place, heads), of_place(place, gram), merged, shards, provenance.device)
        for place, shards in merged.shards.items()
    ]
    compression = options.compression
    write_table(derived.overlap, [pa.concat_tables([_overlap_table(stack) for stack in stacks])], provenance, compression)
    neighbours = pa.concat_tables([_neighbours_table(stack) for stack in stacks])
    write_table(derived.neighbours, [neighbours], provenance, compression)
    write_table(derived.layers, [pa.concat_tables([_layers_table(stack) for stack in stacks])], provenance, compression)
    models = [_models_table(stack, facts, frames.get(stack.place[1])) for stack in stacks]
    write_table(derived.models, [pa.concat_tables(models)], provenance, compression)
    seal(derived.record, provenance, [derived.overlap, derived.neighbours, derived.layers, derived.models])


def _stack(place: Place, heads: pa.Table, gram: pa.Table, merged: Merged, shards: Sequence[Path], device: str) -> _Stack:
    mapped = _mapped(merged.directions, place)
    layers = mapped["layers"].clone().numpy()
    count, per_layer, kept, hidden = mapped["right"].shape
    measured = pa.concat_tables([read_table(path).select(LAYER_SCORES) for path in shards])
    return _Stack(
        place=place,
        layers=layers,
        facts={
            "layers": count,
            "heads": per_layer,
            "kv_heads": pc.max(heads["kv_head"]).as_py() + 1,
            "rank": heads["rank"][0].as_py(),
            "hidden": hidden,
            "directions": kept,
        },
        numbers={column: _by_layer(heads, column, count) for column in SUMMARISED},
        layer_scores={column: _by_layer(measured, column, count)[:, 0] for column in LAYER_SCORES},
        cosine=square(gram, "cosine", layers, per_layer),
        overlap={side: _overlaps(merged.directions, place, side, device) for side in SIDES},
        neighbours=dict(_neighbours(merged, place, layers, per_layer, device)),
    )


def _neighbours(merged: Merged, place: Place, layers: np.ndarray, heads: int, device: str) -> Iterator[tuple[str, Neighbours]]:
    """The nearest heads by each measure; by forms only where all heads were multiplied with all heads."""
    for measure in BY_FORM:  # one at a time: of many heads, a measure of all pairs is as large as all else
        values = _all_pairs(merged.pairs, place, layers, heads, measure)
        if not bool(values.isnan().any()):
            yield measure, nearest_heads(values, NEAREST)
        del values
    for measure in BY_SPAN:
        yield measure, nearest_heads(span_overlaps(_mapped(merged.directions, place)[measure], device), NEAREST)


def _all_pairs(path: Path, place: Place, layers: np.ndarray, heads: int, measure: str) -> torch.Tensor:
    """A measure of the table `pairs` as (N, N), `N = L H`; 0 on the diagonal, NaN where a pair was not measured."""
    values = torch.full((len(layers) * heads,) * 2, torch.nan).fill_diagonal_(0)
    circuit, stack = place
    for part in read_parts(path, circuit=circuit, stack=stack):
        a, b = map(torch.from_numpy, pair_indices(part, layers, heads))
        values[a, b] = values[b, a] = torch.tensor(part[measure].to_numpy())
    return values


def _by_layer(table: pa.Table, column: str, layers: int) -> np.ndarray:
    """A column of heads, which lie layer by layer, as (L, H)."""
    values: np.ndarray = table[column].to_numpy().reshape(layers, -1)
    return values


def _overlaps(path: Path, place: Place, side: str, device: str) -> np.ndarray:
    """(L, L, H). A few heads at a time: the directions may exceed the memory of a job, of which pages once read are a part."""
    layers, heads, kept, width = _mapped(path, place)[side].shape
    together = max(1, _TOGETHER_BYTES // (8 * layers * kept * width)) if at_once(torch.device(device)) else 1
    starts = range(0, heads, together)
    found = [overlaps(_mapped(path, place)[side][:, start : start + together], device).numpy() for start in starts]
    joined: np.ndarray = np.concatenate(found, axis=-1)
    return joined


def _mapped(path: Path, place: Place) -> dict[str, torch.Tensor]:
    circuit, stack = place
    directions: dict[str, torch.Tensor] = torch.load(path, mmap=True, weights_only=True)[circuit][stack]
    return directions


def _overlap_table(stack: _Stack) -> pa.Table:
    """A row per layer pair with `layer_a <= layer_b` and head."""
    a, b = np.triu_indices(len(stack.layers))
    heads = stack.facts["heads"]
    columns = {
        "layer_a": np.repeat(stack.layers[a], heads),
        "layer_b": np.repeat(stack.layers[b], heads),
        "head": np.tile(np.arange(heads), len(a)),
        **{side: values[a, b].ravel() for side, values in stack.overlap.items()},
        "expected": np.full(len(a) * heads, _expected_overlap(stack)),
    }
    return _table(stack, columns, OVERLAP)


def _neighbours_table(stack: _Stack) -> pa.Table:
    """A row per head, measure and place: the nearest head first."""
    heads, found = stack.facts["heads"], stack.neighbours
    values = np.stack([each.value.numpy() for each in found.values()], axis=1)  # (N, measures, n)
    other = np.stack([each.place.numpy() for each in found.values()], axis=1).ravel()
    own, measure, place = (index.ravel() for index in np.indices(values.shape))
    nulls = [_null(name, stack) for name in found]
    mean, deviation = (np.array([getattr(null, name) for null in nulls])[measure] for name in ("mean", "deviation"))
    columns = {
        "layer": stack.layers[own // heads],
        "head": own % heads,
        "measure": pa.array(list(found)).take(pa.array(measure)),
        "place": place,
        "other_layer": stack.layers[other // heads],
        "other_head": other % heads,
        "same_layer": own // heads == other // heads,
        "value": values.ravel(),
        "chance": np.array([null.best_of(len(values) - 1) for null in nulls])[measure] if len(values) > 1 else np.zeros(0),
        "deviations": np.divide(np.abs(values.ravel() - mean), deviation, out=np.zeros(values.size), where=deviation > 0),
    }
    return _table(stack, columns, NEIGHBOURS)


def _null(measure: str, stack: _Stack) -> Null:
    width = stack.facts["hidden"]
    return cosine_null(width) if measure in BY_FORM else overlap_null(stack.facts["directions"], width)


def _layers_table(stack: _Stack) -> pa.Table:
    count = len(stack.layers)
    columns: dict[str, np.ndarray] = {"layer": stack.layers}
    for name, values in stack.numbers.items():
        quartiles = np.quantile(values, list(QUARTILES.values()), axis=1)
        columns |= {f"{name}_{label}": quartile for label, quartile in zip(QUARTILES, quartiles, strict=True)}
    adjacent = _adjacent(stack.cosine).mean(-1)  # (L - 1,)
    columns |= {
        "cosine_previous": np.concatenate([np.zeros(1), adjacent]),
        "cosine_next": np.concatenate([adjacent, np.zeros(1)]),
        "cosine_all": _to_others(stack.cosine) if count > 1 else np.zeros(1),
        **stack.layer_scores,
    }
    return _table(stack, columns, LAYERS)


def _models_table(stack: _Stack, facts: Mapping[str, Any], frames: Frames | None) -> pa.Table:
    columns = {
        "architecture": facts["architecture"],
        "stored_dtype": next(dtype for *place, dtype in facts["stored_dtypes"] if tuple(place) == stack.place),
        "lineage": facts["labels"]["lineage"],
        "step": facts["labels"]["step"],
        "labels": canonical(facts["labels"]["others"]),
        **stack.facts,
        **{f"{name}_median": _median(values) for name, values in stack.numbers.items()},
        **{f"{name}_median": np.median(values) for name, values in stack.layer_scores.items()},
        "cosine_adjacent": _mean(_adjacent(stack.cosine)),
        "cosine_all": _mean(_to_others(stack.cosine)) if len(stack.layers) > 1 else 0.0,
        **{f"overlap_{side}_adjacent": _mean(_adjacent(values)) for side, values in stack.overlap.items()},
        "overlap_expected": _expected_overlap(stack),
        **(around_of(stack.place[0], frames) if frames else dict.fromkeys(AROUND_MODELS)),
    }
    return _table(stack, {name: [value] for name, value in columns.items()}, MODELS)


def _table(stack: _Stack, columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """Columns as a schema has them: NaN is null where it allows that."""
    nullable = {name: pa.array(columns[name], from_pandas=True) for name in columns if schema.field(name).nullable}
    return at_place(stack.place, pa.table({**columns, **nullable}), schema)


def _expected_overlap(stack: _Stack) -> float:
    """The mean overlap of two random subspaces of this many directions."""
    return stack.facts["directions"] / stack.facts["hidden"]


def _adjacent(values: np.ndarray) -> np.ndarray:
    """Values of each layer and the next, (L - 1, H)."""
    first = np.arange(len(values) - 1)
    adjacent: np.ndarray = values[first, first + 1]
    return adjacent


def _to_others(values: np.ndarray) -> np.ndarray:
    """The mean over heads and all other layers, (L,)."""
    others = ~np.eye(len(values), dtype=bool)
    means: np.ndarray = values.mean(-1)[others].reshape(len(values), -1).mean(1)
    return means


def _median(values: np.ndarray) -> float:
    """The median of what there is; NaN where there is nothing."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else math.nan


def _mean(values: np.ndarray) -> float:
    """The mean, 0 where there is nothing."""
    return float(values.mean()) if values.size else 0.0
