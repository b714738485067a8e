"""Lineage: what changed from one model to a later one that shares its residual basis, and which head became which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from headgram.geometry.blocks import in_fitting_blocks
from headgram.geometry.drift import Drift, drift, joined
from headgram.geometry.inner import inner_products
from headgram.geometry.matches import matches
from headgram.geometry.nulls import cosine_null
from headgram.geometry.overlaps import paired_overlaps
from headgram.geometry.ratios import ratio
from headgram.results.factors import FactorFiles
from headgram.results.paths import Place
from headgram.results.record import Provenance, check, record_of, seal
from headgram.results.tables import CHANGES, DRIFT, DRIFT_NUMBERS, MATCHES, SIDES, at_place, write_table

if TYPE_CHECKING:
    from headgram.study.options import Config


@dataclass(frozen=True)
class FactorsAndDirections:
    """Files of one circuit of a stack: of factors, and of the directions of its shards in the order of their layers."""

    weights: Sequence[Path]
    directions: Sequence[Path]


@dataclass(frozen=True)
class Measured:
    """What is known of one circuit of a stack: its factors, and layer by layer the directions of every side, (H, k, d) each."""

    factors: FactorFiles
    directions: Iterable[Mapping[str, Tensor]]


def write_pair(
    sides: Sequence[Mapping[Place, FactorsAndDirections]],
    tables: Mapping[str, Path],
    record: Path,
    options: Config,
    provenance: Provenance,
) -> None:
    """Measure a pair of models and write its tables.

    Parameters
    ----------
    sides
        Of the earlier model and of the later one, by circuit and stack, the same ones of both.
    tables
        The files of `drift`, `changes` and `matches`.
    options
        `gram.pairs`: with `all`, heads are matched over all layers too; and the section `export`.

    Raises
    ------
    HeadgramError
        If an artifact is damaged or has another key than the job was told.
    """
    before, after = open_sides(sides, provenance)
    over_layers = options.gram.pairs == "all"
    found = [measure(place, before[place], after[place], over_layers, provenance.device) for place in after]
    provenance = replace(provenance, precision="float64; of matches, float32 where accurate")
    for name, path in tables.items():
        write_table(path, [each[name] for each in found], provenance, options.export.compression)
    seal(record, provenance, list(tables.values()))


def open_sides(sides: Sequence[Mapping[Place, FactorsAndDirections]], provenance: Provenance) -> list[dict[Place, Measured]]:
    """What the files of both models hold; they are of the artifacts whose keys a pair's key follows from.

    Raises
    ------
    HeadgramError
        If an artifact is damaged or has another key than the job was told.
    """
    circuits = list(dict.fromkeys(circuit for circuit, _ in sides[0]))
    keys = iter(provenance.recipe.upstream)
    return [_checked(parts, *({circuit: next(keys) for circuit in circuits} for _ in range(2))) for parts in sides]


def _checked(
    parts: Mapping[Place, FactorsAndDirections], extract: Mapping[str, str], eigen: Mapping[str, str]
) -> dict[Place, Measured]:
    """What a model's files hold, given the keys of every circuit's artifacts."""
    found = {}
    for (circuit, stack), files in parts.items():
        for path in files.directions:
            check(record_of(path), eigen[circuit], [path])
        factors = FactorFiles(files.weights, extract[circuit], circuit)
        found[circuit, stack] = Measured(factors, _directions(files.directions))
    return found


def _directions(paths: Sequence[Path]) -> Iterator[dict[str, Tensor]]:
    """The directions of every layer. They are mapped: a layer at a time is in memory."""
    for path in paths:
        shard = torch.load(path, mmap=True, weights_only=True)
        for i in range(len(shard["layers"])):
            yield {side: shard[side][i] for side in SIDES}


def measure(place: Place, before: Measured, after: Measured, over_layers: bool, device: str) -> dict[str, pa.Table]:
    """The rows of `drift`, `changes` and `matches` about one circuit of a stack.

    Parameters
    ----------
    over_layers
        Whether heads are matched over all layers too, not only within each.

    Raises
    ------
    HeadgramError
        If the shapes of the two models differ.
    """
    old, new = before.factors, after.factors

    def drifts(size: int) -> Drift:
        blocks = [block for layer in new.layers for block in new.blocks([layer], size)]
        return joined([drift(old.read(*block, device=device), new.read(*block, device=device)) for block in blocks])

    found = in_fitting_blocks(device, drifts)
    heads = {"layer": np.repeat(new.layers, new.heads), "head": np.tile(np.arange(new.heads), len(new.layers))}
    columns = {
        **heads,
        **{name: getattr(found, name).numpy() for name in DRIFT_NUMBERS},
        **_overlaps(before.directions, after.directions),
    }
    return {
        "drift": at_place(place, pa.table(columns), DRIFT),
        "changes": at_place(place, _changes(heads, found), CHANGES),
        "matches": at_place(place, pa.concat_tables(_matches(old, new, found, over_layers, device)), MATCHES),
    }


def _overlaps(before: Iterable[Mapping[str, Tensor]], after: Iterable[Mapping[str, Tensor]]) -> dict[str, np.ndarray]:
    """Of the directions of every side, head by head, and what random ones give."""
    found: dict[str, list[Tensor]] = {side: [] for side in SIDES}
    for old, new in zip(before, after, strict=True):
        for side in SIDES:
            found[side].append(paired_overlaps(old[side], new[side]))
    kept, width = max(old["right"].shape[1], new["right"].shape[1]), new["right"].shape[2]
    columns = {side: torch.cat(values).numpy() for side, values in found.items()}
    return {**columns, "expected": np.full(len(columns["right"]), kept / width)}


def _changes(heads: Mapping[str, np.ndarray], found: Drift) -> pa.Table:
    """A row per head and singular value of its change."""
    count, length = found.change_values.shape
    columns = {name: np.repeat(values, length) for name, values in heads.items()}
    index = np.tile(np.arange(length), count)
    return pa.table({**columns, "index": index, "singular_value": found.change_values.numpy().ravel()})


def _matches(old: FactorFiles, new: FactorFiles, found: Drift, over_layers: bool, device: str) -> Iterator[pa.Table]:
    """Heads assigned within each layer, and over all layers where all heads are multiplied with all heads."""
    layers, heads = new.layers, new.heads
    norms = found.norm_after, found.norm_before

    def cosines(some: Sequence[int], rows: slice) -> Tensor:
        return in_fitting_blocks(device, partial(_cosines, new, old, some, (norms[0][rows], norms[1][rows]), device))

    if over_layers:
        whole = cosines(layers, slice(None))
        yield matched("stack", (layers, heads), (layers, heads), whole, _chance(whole, new.width))
    for i, layer in enumerate(layers):
        rows = slice(i * heads, (i + 1) * heads)
        own = whole[rows, rows] if over_layers else cosines([layer], rows)
        yield matched("layer", ([layer], heads), ([layer], heads), own, _chance(own, new.width))


def _cosines(
    new: FactorFiles, old: FactorFiles, layers: Sequence[int], norms: tuple[Tensor, Tensor], device: str, size: int
) -> Tensor:
    """Of all heads of some layers of one model with all of another, (N, N) float32; two blocks at a time are in memory."""
    blocks = new.blocks(layers, size)
    found, start = torch.empty(len(norms[0]), len(norms[1])), 0
    for block in blocks:
        own = new.read(*block, device=device)
        products = torch.cat([inner_products(own, old.read(*other, device=device)).gram.cpu() for other in blocks], 1)
        rows = slice(start, start + len(own))
        found[rows] = ratio(ratio(products, norms[0][rows, None]), norms[1]).clamp(-1, 1)
        start = rows.stop
    return found


def _chance(cosines: Tensor, width: int) -> Tensor:
    """What the best of as many random forms reaches, for each row."""
    return torch.full((len(cosines),), cosine_null(width).best_of(cosines.shape[1]), dtype=torch.float64)


def matched(
    among: str, own: tuple[Sequence[int], int], other: tuple[Sequence[int], int], cosines: Tensor, chance: Tensor
) -> pa.Table:
    """A row per head, with the head of the other model that it was given; of both, the layers and the heads of each."""
    found = matches(cosines)
    places = [
        (f"{side}layer", np.asarray(layers)[place.numpy() // heads], f"{side}head", place.numpy() % heads)
        for side, (layers, heads), place in (("", own, found.row), ("other_", other, found.place))
    ]
    columns = {
        "among": [among] * len(found.row),
        **{name: values for place in places for name, values in zip(place[::2], place[1::2], strict=True)},
        "cosine": found.value.double().numpy(),
        "margin": found.margin.double().numpy(),
        "chance": chance[found.row].numpy(),
        "mutual": found.mutual.numpy(),
    }
    return pa.table(columns)
