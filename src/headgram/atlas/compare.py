"""Two measured models, head by head: how far each head moved, and which head became which."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from headgram.atlas.reader import Atlas, open_atlas
from headgram.described import Described
from headgram.errors import HeadgramError, door
from headgram.forms.variants import Variant, needs
from headgram.geometry.overlaps import paired_overlaps
from headgram.results.around import read_around
from headgram.results.factors import FactorFiles
from headgram.results.paths import LINEAGE, Place
from headgram.results.record import has_key, read_record
from headgram.results.tables import HEAD_NUMBERS, SIDES
from headgram.stages.lineage import Measured, measure

#: What two stacks must agree in, so that their heads' forms can be multiplied.
_SHAPE = {"kv_heads": "key heads", "rank": "rank", "hidden": "width"}
#: Heads of a stack up to which they are matched over all layers, where the pipeline did not do so.
_MOST_HEADS = 4096
_HEAD = ["circuit", "stack", "layer", "head"]


@dataclass(frozen=True, repr=False)
class Comparison(Described):
    """What `compare` found.

    Attributes
    ----------
    a, b
        The two models, the earlier one first.
    heads
        A row per circuit, stack, layer and head: all columns of the table `drift`, and every number of the table `heads` as
        `{number}_a` and `{number}_b`. Without what `why_no_drift` says; then still with `right`, `left`, `signed`, the overlaps
        of the two heads' directions, and `expected`, that of random subspaces, if both have one width. Of models that were
        compared in token space, a row per head of `b` that was matched, and `{number}_a` of the head of `a` that it was given.
    changes, matches
        The tables `changes` and `matches`; empty where there is no drift.
    why_no_drift
        A sentence if the forms of some heads cannot be multiplied.
    """

    a: str
    b: str
    heads: pd.DataFrame
    changes: pd.DataFrame
    matches: pd.DataFrame
    why_no_drift: str | None

    def _described(self) -> tuple[str, list[dict[str, object]]]:
        meanings = {
            "heads": "how far every head moved; numbers before (_a), after (_b)",
            "changes": "singular values of every head's change",
            "matches": "the head of the earlier model that each head was",
        }
        line = f"Comparison of {self.b} (after) with {self.a} (before)" + (f": {self.why_no_drift}" if self.why_no_drift else "")
        return line, [{"table": name, "rows": len(getattr(self, name)), "meaning": text} for name, text in meanings.items()]


@door
def compare(
    a: str, b: str, results: str | os.PathLike[str] = "results", stack: str | None = None, circuit: str | None = None
) -> Comparison:
    """Compare the heads of two measured models: two checkpoints of one training, a base and a fine-tune, two revisions.

    The tables of the stage `lineage` are read where the pipeline compared the two. Elsewhere the same is computed, from the
    extracted weights that the results folder still holds.

    Parameters
    ----------
    a, b
        The earlier model and the later one.
    stack, circuit
        Which stack and which circuit (`qk`, `ov`, or a form such as `qk-folded`) of both; all that both have if not given.

    Returns
    -------
    Comparison
        The tables `heads`, `changes` and `matches`, of all stacks and circuits that were compared.

    Raises
    ------
    HeadgramError
        If a model, its stack or the circuit was not measured, or the two differ in layers or heads.

    Examples
    --------
    >>> found = headgram.compare("step0", "step3")
    >>> found.heads.query("circuit == 'qk'").nsmallest(1, "norm_ratio")[["layer", "head"]].values.tolist()  # which died
    [[1, 0]]
    """
    atlas = open_atlas(results)
    parts = [_compared(atlas, a, b, place) for place in _places(atlas, a, b, stack, circuit)]
    heads, changes, matches = (pd.concat([part[i] for part in parts], ignore_index=True) for i in range(3))
    return Comparison(a, b, heads, changes, matches, next((part[3] for part in parts if part[3]), None))


def _places(atlas: Atlas, a: str, b: str, stack: str | None, circuit: str | None) -> list[Place]:
    """The circuits and stacks that both models have, of those that are asked for."""
    both: list[Place] = []
    for i, model in enumerate((a, b)):
        circuits = [circuit] if circuit else atlas.circuits(model)
        places = [(each, name) for each in circuits for name in atlas.stacks(model, each)]
        wanted = [place for place in places if stack in (None, place[1])]
        if not wanted:
            known = ", ".join(dict.fromkeys(name for _, name in places))
            raise HeadgramError(f"the model '{model}' has no stack '{stack}'; there are: {known}")
        both = [place for place in both if place in wanted] if i else wanted
    if not both:
        raise HeadgramError(f"'{a}' and '{b}' have no circuit of a stack in common: measure both with the same `circuits`")
    return both


def _compared(atlas: Atlas, a: str, b: str, place: Place) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, str | None]:
    """Of one circuit of a stack: heads, changes, matches, and why there are only numbers."""
    circuit, stack = place
    numbers = [atlas.of_heads("heads", model, stack, circuit).set_index(_HEAD).sort_index() for model in (a, b)]
    undrifted = a in atlas.others(b) and _planned(atlas, a, b, place, "drift").empty
    if undrifted and len(matches := _planned(atlas, a, b, place, "matches")):
        return _in_tokens(matches, numbers)
    if not numbers[0].index.equals(numbers[1].index):
        if b in atlas.others(a) and len(_planned(atlas, b, a, place, "matches")):
            raise HeadgramError(f"the two were compared in token space with {b} as the earlier one: name {b} first")
        sizes = [f"{model} has {_size(table)}" for model, table in zip((a, b), numbers, strict=True)]
        raise HeadgramError(
            f"only models with the same layers and heads can be compared head by head: {', '.join(sizes)}; "
            "to compare these two by what their heads do with tokens, give them one `lineage`, set lineage.basis to tokens, "
            "and run `snakemake` again"
        )
    joined = pd.concat([table[[*HEAD_NUMBERS]].add_suffix(f"_{name}") for table, name in zip(numbers, "ab", strict=True)], axis=1)
    tables, why_not = {name: pd.DataFrame() for name in LINEAGE}, None
    try:
        tables = dict(_tables(atlas, a, b, place, [_shape(table) for table in numbers]))
        found = tables["drift"].set_index(_HEAD)
    except HeadgramError as error:
        why_not, found = str(error), _overlaps(atlas, a, b, place, numbers[0])
    return found.join(joined, how="right").reset_index(), tables["changes"], tables["matches"], why_not


def _planned(atlas: Atlas, a: str, b: str, place: Place, name: str) -> pd.DataFrame:
    """A table about two models as the pipeline wrote it."""
    table = atlas.of_heads(name, b, place[1], place[0])
    return table[table["other"] == a].drop(columns=["model", "other"])


def _in_tokens(matches: pd.DataFrame, numbers: list[pd.DataFrame]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, str]:
    """Of heads that were matched in token space: numbers of both, no changes, the matches, and why there is no drift."""
    place = matches[_HEAD]
    there = place.assign(layer=matches["other_layer"], head=matches["other_head"])
    columns = [
        table.loc[pd.MultiIndex.from_frame(where), [*HEAD_NUMBERS]].add_suffix(f"_{name}").set_axis(matches.index)
        for table, where, name in zip(numbers, (there, place), "ab", strict=True)
    ]
    why_not = "the models were compared in token space, where no head of one is the same head of the other: see the matches"
    return pd.concat([place, *columns], axis=1), pd.DataFrame(), matches, why_not


def _size(table: pd.DataFrame) -> str:
    layers, heads = (table.index.get_level_values(name).unique() for name in ("layer", "head"))
    some = "" if list(layers) == list(range(len(layers))) else f" ({', '.join(map(str, layers))})"
    return f"{len(layers)} layers{some} of {len(heads)} heads"


def _shape(table: pd.DataFrame) -> Mapping[str, int]:
    first = table.iloc[0]
    return {"kv_heads": int(table["kv_head"].max()) + 1, "rank": int(first["rank"]), "hidden": int(first["hidden"])}


def _tables(atlas: Atlas, a: str, b: str, place: Place, shapes: list[Mapping[str, int]]) -> Iterator[tuple[str, pd.DataFrame]]:
    """The three tables as the pipeline wrote them, or else computed."""
    if a in atlas.others(b) and len(_planned(atlas, a, b, place, "drift")):  # which holds forms as they are stored
        yield from ((name, _planned(atlas, a, b, place, name)) for name in LINEAGE)
        return
    ours, theirs = shapes
    different = [f"{words} {ours[name]} and {theirs[name]}" for name, words in _SHAPE.items() if ours[name] != theirs[name]]
    if different:
        raise HeadgramError(f"the forms differ in shape ({', '.join(different)}), so they have no cosine")
    before, after = (Measured(_weights(atlas, model, place), _directions(atlas, model, place)) for model in (a, b))
    over_layers = len(after.factors.layers) * after.factors.heads <= _MOST_HEADS
    found = measure(place, before, after, over_layers, "cpu")
    yield from ((name, table.to_pandas()) for name, table in found.items())


def _weights(atlas: Atlas, model: str, place: Place) -> FactorFiles:
    """The extracted weights from which a form was measured, and what stands around them, if it follows from that."""
    name, stack = place
    form = Variant.of(name)
    stages = read_record(Path(atlas.paths.record("merge", model))).stages
    extract = stages.get("extract", {}).get(form.circuit)
    folder = Path(atlas.paths.record("extract", model, stack, form.circuit, "*")).parent
    current = [path for path in sorted(folder.glob("*.json")) if extract and has_key(path, extract.key)]
    factors = None
    if extract and current:
        around = Path(atlas.paths.around(model)), Path(atlas.paths.record("around", model))
        frames = read_around(*around, stages["around"][""].key)[stack] if needs(form) else None
        factors = FactorFiles([path.with_suffix(".pt") for path in current], extract.key, name, frames)
    if factors is None or set(factors.layers) != set(atlas.of_heads("layers", model, stack, name)["layer"]):
        raise HeadgramError(
            f"the extracted weights of {model} are no longer in {folder}, so there are no cosines: `headgram run "
            "--forcerun extract` extracts them again"
        )
    return factors


def _directions(atlas: Atlas, model: str, place: Place) -> Iterator[dict[str, torch.Tensor]]:
    """The directions of every layer, which are mapped."""
    found = atlas.directions(model, place[0])[place[1]]
    return ({side: found[side][i] for side in SIDES} for i in range(len(found["layers"])))


def _overlaps(atlas: Atlas, a: str, b: str, place: Place, heads: pd.DataFrame) -> pd.DataFrame:
    """Overlaps of directions alone, where the widths allow that."""
    layers = list(zip(_directions(atlas, a, place), _directions(atlas, b, place), strict=True))
    kept, width = layers[0][0]["right"].shape[1:]
    if layers[0][1]["right"].shape[2] != width:
        return heads[[]]
    columns = {side: torch.cat([paired_overlaps(old[side], new[side]) for old, new in layers]).numpy() for side in SIDES}
    return heads[[]].assign(**columns, expected=kept / width)
