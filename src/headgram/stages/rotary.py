"""How scores depend on the offset of query and key, and on each token alone: of every head, at offsets and by frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from headgram.forms.circuits import CIRCUITS
from headgram.forms.heads import Heads
from headgram.forms.reading import Frame, Frames, Rotary
from headgram.forms.transforms import constant, folded
from headgram.forms.variants import FOLDED, RAW, Variant, needs
from headgram.geometry.frequencies import (
    AtOffsets,
    Energies,
    RotaryHeads,
    Turning,
    at_offsets,
    by_chance,
    energies,
    offsets_up_to,
    turning,
    wavelengths,
)
from headgram.geometry.ratios import ratio
from headgram.results.around import read_around
from headgram.results.factors import FactorFiles
from headgram.results.record import Provenance, seal
from headgram.results.tables import FREQUENCIES, LINEAR, ROTARY, TURNING, TURNS, labelled, write_table

if TYPE_CHECKING:
    from headgram.study.options import Config

#: A layer that does not turn: all of its rows are still.
_STILL = Rotary(torch.empty(0, dtype=torch.float64), interleaved=False)


@dataclass(frozen=True)
class Turned:
    """The files that this stage writes: two tables, numbers of heads for the table `heads`, and the record."""

    rotary: Path
    frequencies: Path
    turning: Path
    record: Path


def measure_rotary(
    around: tuple[Path, Path],
    weights: Mapping[str, Sequence[Path]],
    written: Turned,
    options: Config,
    provenance: Provenance,
) -> None:
    """Measure every head of every stack, of factors as they are stored and, where that is proven, with norms folded in.

    Layers that positions do not turn have no rows in the tables `rotary` and `frequencies`.

    Parameters
    ----------
    around
        What stands around the projections, and its record.
    weights
        By stack, the extracted queries and keys of all of its layers.
    options
        The section `export` is read.

    Raises
    ------
    HeadgramError
        If an artifact is damaged or has another key than the job was told.
    """
    extract_key, around_key = provenance.recipe.upstream
    stacks = read_around(*around, around_key)
    tables: dict[pa.Schema, list[pa.Table]] = {schema: [schema.empty_table()] for schema in (ROTARY, FREQUENCIES, TURNING)}
    for stack, paths in weights.items():
        source, frames = FactorFiles(paths, extract_key, "qk"), stacks[stack]
        for form in (Variant("qk", norm) for norm in (RAW, FOLDED)):
            if unknown := [role for role in needs(form) if role in frames.missing]:
                print(f"{stack}: without {form.name}: {frames.missing[unknown[0]]}", flush=True)
                continue
            for layer in source.layers:
                found = _layer(source.read([layer], device=provenance.device), form, frames, layer)
                for schema, columns in found.items():
                    tables[schema].append(labelled(_table(columns), schema, circuit=form.name, stack=stack))
    for path, schema in ((written.rotary, ROTARY), (written.frequencies, FREQUENCIES), (written.turning, TURNING)):
        write_table(path, [pa.concat_tables(tables[schema])], provenance, options.export.compression)
    seal(written.record, provenance, [written.rotary, written.frequencies, written.turning])


def _layer(stored: Heads, form: Variant, frames: Frames, layer: int) -> dict[pa.Schema, dict[str, Any]]:
    """The columns of each table, of one layer."""
    frame, count = frames.layers[layer], len(stored)
    query, key = stored.b, stored.a
    if form.norm == FOLDED:
        query, key = folded("query", query, frame), folded("key", key, frame)
    turned = RotaryHeads.of(CIRCUITS["qk"].heads(query, key, stored.reads_a), frame.rotary or _STILL)
    of_heads = {"layer": torch.full((count,), layer), "head": torch.arange(count)}
    numbers = dict.fromkeys((*TURNS, *(f"{name}_expected" for name in TURNS))) | _linear(stored, turned, form, frames, frame)
    if frame.rotary is None or "rotary" in frames.missing:
        return {TURNING: of_heads | numbers}
    measured, chance = turning(turned, frames.context), _chance(frame.rotary, turned.heads.rank, frames.context)
    for name in TURNS:
        field = name.removeprefix("rotary_")
        value, expected = getattr(measured, field), getattr(chance.turning, field)
        numbers[name] = None if value is None else value.cpu()
        numbers[f"{name}_expected"] = None if value is None or name == TURNS[0] else expected.expand(count)
    offsets = offsets_up_to(frames.context)
    return {
        TURNING: of_heads | numbers,
        ROTARY: _rows(of_heads, offsets) | _at_offsets(turned, offsets, chance),
        FREQUENCIES: _frequencies(turned, of_heads, chance.energies),
    }


@dataclass(frozen=True)
class _Chance:
    """What random weights of the same shape give."""

    at_offsets: AtOffsets
    turning: Turning
    energies: Energies


def _chance(rotary: Rotary, rank: int, context: int | None) -> _Chance:
    """Worked out once for layers that turn alike."""
    return _chance_of(tuple(rotary.frequencies.tolist()), rotary.interleaved, rotary.start, rotary.factor, rank, context)


@lru_cache(maxsize=64)
def _chance_of(
    frequencies: tuple[float, ...], interleaved: bool, start: int, factor: float, rank: int, context: int | None
) -> _Chance:
    rotary = Rotary(torch.tensor(frequencies, dtype=torch.float64), interleaved, start, factor)
    head = RotaryHeads.of(by_chance(rotary, rank), rotary)
    return _Chance(at_offsets(head, offsets_up_to(context)), turning(head, context), energies(head))


def _at_offsets(turned: RotaryHeads, offsets: Sequence[int], chance: _Chance) -> dict[str, Any]:
    expected = chance.at_offsets.cosine.expand(len(turned.heads), -1)
    columns = {name: value.cpu() for name, value in vars(at_offsets(turned, offsets)).items()} | {"expected": expected}
    return {name: value.flatten() for name, value in columns.items()}


def _frequencies(turned: RotaryHeads, of_heads: Mapping[str, Tensor], chance: Energies) -> dict[str, Any]:
    """A row for every plane, and a last one for what is still, where anything is."""
    found = energies(turned)
    planes = list(range(len(turned.rotary.frequencies)))
    rest = [None] if float(chance.still) else []
    lengths = [length if length < float("inf") else None for length in wavelengths(turned.rotary).tolist()]

    def joined(turns: Float[Tensor, "n planes"], still: Float[Tensor, " n"]) -> Tensor:
        return torch.cat([turns, still[:, None]] if rest else [turns], 1).cpu()

    energy = joined(found.planes, found.still)
    nothing = torch.full_like(found.still, torch.nan)
    columns = {
        "energy": energy,
        "share": ratio(energy, found.total[:, None].cpu()),
        "cosine_norm": joined(found.cosine.sqrt(), nothing),
        "sine_norm": joined(found.sine.sqrt(), nothing),
        "expected": (joined(chance.planes, chance.still) / chance.total[:, None]).expand_as(energy),
    }
    repeated = {"plane": planes + rest, "wavelength": lengths + rest}
    rows = {name: pa.array(values * len(turned.heads)) for name, values in repeated.items()}
    flat = {name: pa.array(value.flatten().numpy(), from_pandas=True) for name, value in columns.items()}
    return {name: value.repeat_interleave(len(planes + rest)) for name, value in of_heads.items()} | rows | flat


def _rows(of_heads: Mapping[str, Tensor], offsets: Sequence[int]) -> dict[str, Tensor]:
    """Layer, head and offset of every row."""
    repeated = {name: value.repeat_interleave(len(offsets)) for name, value in of_heads.items()}
    return repeated | {"offset": torch.tensor(offsets).repeat(len(of_heads["head"]))}


def _linear(stored: Heads, turned: RotaryHeads, form: Variant, frames: Frames, frame: Frame) -> dict[str, Tensor | None]:
    """Norms of the terms that are linear in the query's token and in the key's, over the form's, all averaged over offsets."""
    none: dict[str, Tensor | None] = dict.fromkeys(LINEAR)
    own = frame.query_norm, frame.key_norm
    if {"query_bias", "key_bias", "rotary"} & set(frames.missing) or any(norm and norm.bias is not None for norm in own):
        return none  # a bias of such a norm is added after a division by one number per token, which the form leaves out
    biases = frame.query_bias, frame.key_bias
    if form.norm == FOLDED:
        biases = constant("query", stored.b, biases[0], frame), constant("key", stored.a, biases[1], frame)
    heads, size = turned.heads, energies(turned).total.sqrt()
    query, key = (None if bias is None else bias.to(heads.device).double()[..., None] for bias in biases)
    # A key that is the same for every token has a form with queries, of which one side is of width 1; and so the other way.
    terms = {} if key is None else {LINEAR[0]: heads.with_factors(key, heads.b)}
    terms |= {} if query is None else {LINEAR[1]: heads.with_factors(heads.a, query)}
    of_terms = {name: energies(replace(turned, heads=term)).total.sqrt() for name, term in terms.items()}
    return none | {name: ratio(value, size).cpu() for name, value in of_terms.items()}


def _table(columns: Mapping[str, Any]) -> pa.Table:
    count = len(columns["layer"])
    return pa.table(
        {
            name: pa.nulls(count) if value is None else value.numpy() if isinstance(value, Tensor) else value
            for name, value in columns.items()
        }
    )
