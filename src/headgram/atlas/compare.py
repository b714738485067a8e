"""Two models of one shape, head by head: how far each head moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from headgram.atlas.reader import Atlas
from headgram.errors import HeadgramError, require
from headgram.geometry.ratios import cosines
from headgram.geometry.same_index import same_index_products
from headgram.results.factors import FactorFiles
from headgram.results.record import has_key, read_record
from headgram.results.tables import HEAD_NUMBERS, SIDES

if TYPE_CHECKING:
    import pandas as pd

#: What two stacks must agree in, so that their heads' forms can be multiplied.
_SHAPE = {"kv_heads": "key heads", "rank": "rank", "hidden": "width"}


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes
    ----------
    a, b, stack, circuit
        The two models, the stack of theirs, and the circuit.
    heads
        A row per layer and head: every number of the table `heads` as `{number}_a` and `{number}_b`; `right`, `left`, `signed`,
        the overlaps of the two heads' directions, if both have one width; and `cosine`, of the two heads' forms.
    expected
        The overlap that random subspaces have on average; None if the widths differ.
    why_no_cosine
        A sentence if there is no column `cosine`.
    """

    a: str
    b: str
    stack: str
    circuit: str
    heads: pd.DataFrame
    expected: float | None
    why_no_cosine: str | None


def compare(atlas: Atlas, a: str, b: str, stack: str | None = None, circuit: str = "qk") -> Comparison:
    """Compare the heads of two measured models, or of two revisions of one.

    Cosines are exact: they are taken of the extracted weights that the results folder still holds.

    Parameters
    ----------
    stack
        Which stack of both; the first of `a` if not given.
    circuit
        `qk` or `ov`.

    Raises
    ------
    HeadgramError
        If a model, its stack or the circuit was not measured, or the two differ in layers or heads.
    """
    require(atlas, Atlas, "compare takes what `open_atlas` gives")
    stack = stack or atlas.stacks(a)[0]
    tables = {model: atlas.of_heads("heads", model, stack, circuit).set_index(["layer", "head"]).sort_index() for model in (a, b)}
    if not tables[a].index.equals(tables[b].index):
        sizes = [f"{model} has {_size(table)}" for model, table in tables.items()]
        raise HeadgramError(f"only models with the same layers and heads can be compared head by head: {', '.join(sizes)}")
    numbers = [tables[model][list(HEAD_NUMBERS)].add_suffix(suffix) for model, suffix in ((a, "_a"), (b, "_b"))]
    heads = numbers[0].join(numbers[1])

    shapes = [_shape(tables[model]) for model in (a, b)]
    expected = None
    if shapes[0]["hidden"] == shapes[1]["hidden"]:
        directions = [atlas.directions(model, circuit)[stack] for model in (a, b)]
        for side in SIDES:
            heads[side] = _overlaps(directions[0][side], directions[1][side])
        expected = max(part["right"].shape[2] for part in directions) / shapes[0]["hidden"]
    different = [
        f"{words} {shapes[0][name]} and {shapes[1][name]}" for name, words in _SHAPE.items() if shapes[0][name] != shapes[1][name]
    ]
    why_not = f"the forms differ in shape ({', '.join(different)}), so they have no cosine" if different else None
    if not why_not:
        try:
            heads.insert(0, "cosine", _cosines(heads, *(_weights(atlas, model, stack, circuit) for model in (a, b))))
        except HeadgramError as error:
            why_not = str(error)
    return Comparison(a, b, stack, circuit, heads.reset_index(), expected, why_not)


def _size(table: pd.DataFrame) -> str:
    layers, heads = (table.index.get_level_values(name).nunique() for name in ("layer", "head"))
    return f"{layers} layers of {heads} heads"


def _shape(table: pd.DataFrame) -> Mapping[str, int]:
    first = table.iloc[0]
    return {"kv_heads": int(table["kv_head"].max()) + 1, "rank": int(first["rank"]), "hidden": int(first["hidden"])}


def _overlaps(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """`‖V_a V_b^T‖_F² / k` of every layer and head, `k` the smaller number of directions; layer by layer, for both are mapped."""
    fewer = min(a.shape[2], b.shape[2])
    pairs = zip(a, b, strict=True)
    found = [(one.double() @ other.double().mT).square().sum((1, 2)) / fewer for one, other in pairs]
    return torch.cat(found).numpy()


def _weights(atlas: Atlas, model: str, stack: str, circuit: str) -> FactorFiles:
    """The extracted weights from which a model was measured."""
    extract = read_record(atlas.results / "provenance" / f"{model}.json").stages.get("extract", {}).get(circuit)
    folder = atlas.results / "models" / model / stack / circuit / "weights"
    current = [path for path in sorted(folder.glob("*.json")) if extract and has_key(path, extract.key)]
    if not extract or not current:
        raise HeadgramError(f"the extracted weights of {model} are no longer in {folder}, so there are no cosines")
    return FactorFiles([path.with_suffix(".pt") for path in current], extract.key, circuit)


def _cosines(heads: pd.DataFrame, a: FactorFiles, b: FactorFiles) -> np.ndarray:
    """Cosines of every layer and head, 0 where a form is zero. Weights are mapped: a layer of both is read at a time."""
    layers = dict.fromkeys(heads.index.get_level_values("layer"))
    try:
        pairs = [(a.read([layer]), b.read([layer])) for layer in layers]
    except KeyError as error:
        raise HeadgramError(f"the extracted weights of layer {error} are incomplete, so there are no cosines") from None
    products = torch.cat([same_index_products(*pair, a.heads, "float64").gram.flatten() for pair in pairs]).numpy()
    return cosines(products, np.sqrt(heads["fro_sq_a"].to_numpy()), np.sqrt(heads["fro_sq_b"].to_numpy()))
