"""The page's pictures of an atlas as Altair charts, one line each in a notebook.

Every chart holds its data: `chart.save("heads.svg")` writes it; `chart.properties(width=600)` and Altair's themes change its
looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import altair as alt
import numpy as np
import pandas as pd

from headgram.atlas.reader import Atlas
from headgram.errors import HeadgramError, door, require
from headgram.geometry.nulls import Null
from headgram.report import pictures
from headgram.report.chance import band, nulls
from headgram.report.colours import above, around, spread, times_chance
from headgram.report.columns import columns

if TYPE_CHECKING:
    import xarray as xr

    from headgram.atlas.reader import Kind

_WHAT = "pictures are drawn of what `open_atlas` gives"
_PAIRS = {
    "cosine": "Cosine of forms",
    "right": "Overlap on the query side",
    "left": "Overlap on the key side",
    "signed": "Overlap in signed directions",
}


@door
def heads(atlas: Atlas, model: str, column: str = "symmetry", stack: str = "self", circuit: str = "qk") -> alt.LayerChart:
    """Every head of a stack, layer by head, coloured by a column of the table `heads`.

    Returns
    -------
    altair.LayerChart
        The bar marks what chance gives, where that is known. Colours of a column with a null reach at least three times as far
        as the best head by chance.

    Raises
    ------
    HeadgramError
        If the model, the stack, the circuit or the column was not measured.

    Examples
    --------
    >>> atlas = headgram.open_atlas("results")
    >>> headgram.plot.heads(atlas, "smollm2-135m-instruct").save("heads.svg")
    """
    table = _rows(atlas, "heads", model, stack, circuit)
    rows = _known(table[["layer", "head"]].assign(value=_column(table, column)), "value", column)
    values = rows["value"].to_numpy()
    null = nulls(_facts(atlas, model, stack, circuit)).get(column)
    centre = null.mean if null else next((each.centre for each in columns() if each.name == column), None)
    if centre is None:
        colours = spread((float(np.quantile(values, 0.01)), float(np.quantile(values, 0.99))), _expected(table, column))
    else:
        colours = around(centre, float(np.quantile(np.abs(values - centre), 0.99)), null, len(values))
    chart = pictures.heatmap("head", "layer", colours)
    return _with(chart, f"{_label(column)}: {model}, {stack}, {circuit}", {"cells": rows, "chosen": []})


@door
def layers(
    atlas: Atlas, model: str, value: str = "cosine", head: int | None = None, stack: str = "self", circuit: str = "qk"
) -> alt.LayerChart:
    """Every pair of layers: the cosine of their heads' forms, or the overlap of their directions, in the mean over heads.

    Parameters
    ----------
    value
        `cosine`, or a side: `right`, `left`, `signed`.
    head
        Of this head alone.

    Returns
    -------
    altair.LayerChart
        Colours reach at least three times as far as the best pair of layers by chance.

    Raises
    ------
    HeadgramError
        If the model, the stack or the circuit was not measured, or there is no such value or head.

    Examples
    --------
    >>> atlas = headgram.open_atlas("results")
    >>> headgram.plot.layers(atlas, "smollm2-135m-instruct", "right").save("overlaps.svg")
    """
    if value not in _PAIRS:
        raise HeadgramError(f"pairs of layers have no '{value}'; there are: {', '.join(_PAIRS)}")
    table = _rows(atlas, "gram" if value == "cosine" else "overlap", model, stack, circuit)
    if head is not None and head not in set(table["head"]):
        raise HeadgramError(f"the stack '{stack}' of {model} has no head {head!r:.60}; it has {table['head'].max() + 1}")
    chosen = table if head is None else table[table["head"] == head]
    upper = chosen.groupby(["layer_a", "layer_b"], as_index=False)[value].mean().rename(columns={value: "value"})
    lower = upper[upper["layer_a"] != upper["layer_b"]].rename(columns={"layer_a": "layer_b", "layer_b": "layer_a"})
    facts = _facts(atlas, model, stack, circuit)
    null = nulls(facts)[value].mean_of(int(facts["heads"]) if head is None else 1)
    largest, count = float(lower["value"].abs().max()) if len(lower) else 0.0, max(1, len(lower))
    colours = around(0.0, largest, null, count) if value == "cosine" else above(largest, null, count)
    chart = pictures.heatmap("layer_b", "layer_a", colours)
    of = "mean over heads" if head is None else f"head {head}"
    return _with(chart, f"{_PAIRS[value]}, {of}: {model}, {stack}, {circuit}", {"cells": pd.concat([upper, lower]), "chosen": []})


@door
def matrix(
    atlas: Atlas, model: str, value: Literal["cosine", "transposed"] = "cosine", stack: str = "self", circuit: str = "qk"
) -> alt.LayerChart:
    """All heads with all heads, layer by layer: the cosine of every two forms, or of one with the other's transpose.

    Returns
    -------
    altair.LayerChart
        Colours reach at least three times as far as the best pair by chance.

    Raises
    ------
    HeadgramError
        If the model, the stack or the circuit was not measured, or there is no such value, or not all pairs were measured.

    Examples
    --------
    >>> atlas = headgram.open_atlas("results")
    >>> headgram.plot.matrix(atlas, "all-minilm-l6-v2").save("matrix.svg")
    """
    require(atlas, Atlas, _WHAT)
    square = _square(atlas.pairs(model, stack, value, circuit))
    if np.isnan(square).any():
        raise HeadgramError(f"not all pairs of heads of {model} were measured: set gram.pairs to all, and run `snakemake` again")
    off = np.abs(square[np.triu_indices(len(square), 1)])
    null = nulls(_facts(atlas, model, stack, circuit))[value]
    largest = float(np.quantile(off, 0.995)) if len(off) else 0.0
    title = f"{'Cosine' if value == 'cosine' else 'Cosine with the transpose'} of all heads: {model}, {stack}, {circuit}"
    chart = pictures.heatmap("heads_b", "heads_a", around(0.0, largest, null, max(1, len(off))))
    return _with(chart, title, _cells(square))


@door
def composition(atlas: Atlas, model: str, kind: Kind = "k", stack: str = "self") -> alt.LayerChart:
    """How much of what every head writes (rows) every head of a later layer reads (columns), in times chance.

    Parameters
    ----------
    kind
        What the later head does with it: `q`, `k` or `v`.

    Returns
    -------
    altair.LayerChart

    Raises
    ------
    HeadgramError
        If the model's compositions were not measured, or there is no such kind.

    Examples
    --------
    >>> atlas = headgram.open_atlas("results")
    >>> headgram.plot.composition(atlas, "all-minilm-l6-v2", "v").save("composition.svg")
    """
    require(atlas, Atlas, _WHAT)
    square = _square(atlas.composition(model, kind, stack, "times_chance"))
    chart = pictures.heatmap("heads_b", "heads_a", times_chance(float(np.nanquantile(square, 0.998))))
    return _with(chart, f"Composition by {kind}, in times chance: {model}, {stack}", _cells(square))


@door
def trajectory(
    atlas: Atlas,
    column: str,
    lineage: str,
    layer: int | None = None,
    stack: str = "self",
    circuit: str = "qk",
    to: Literal["first", "previous"] | None = None,
) -> alt.LayerChart:
    """A number over the steps of a lineage: of each layer the median and quartiles over heads, or of one layer every head.

    Parameters
    ----------
    column, to
        As of `Atlas.trajectory`.

    Returns
    -------
    altair.LayerChart
        A grey band says where heads lie by chance, if that is known.

    Raises
    ------
    HeadgramError
        If there is no such lineage, column or layer.

    Examples
    --------
    >>> atlas = headgram.open_atlas("results")
    >>> headgram.plot.trajectory(atlas, "symmetry", "training", layer=1).save("symmetry.svg")
    """
    require(atlas, Atlas, _WHAT)
    found = atlas.trajectory(column, lineage, stack, circuit, to)
    if layer is not None and layer not in found["layer"]:
        raise HeadgramError(f"the stack '{stack}' of the lineage '{lineage}' has no layer {layer!r:.60}")
    name = "layer" if layer is None else "head"
    if name not in found.dims:
        raise HeadgramError(f"'{column}' is a number of layers, not of heads: leave out `layer`")
    found = found if layer is None else found.sel(layer=layer)
    values = found.quantile([0.25, 0.5, 0.75], "head") if layer is None and "head" in found.dims else [found] * 3
    rows = [
        {"series": f"{name} {int(which)}", "x": float(step), "q25": float(low), "median": float(middle), "q75": float(high)}
        for which in found[name]
        for step, low, middle, high in zip(found["step"], *(each.sel({name: which}) for each in values), strict=True)
    ]
    title = f"{_label(column)}: {lineage}, {stack}, {circuit}" + ("" if layer is None else f", layer {layer}")
    chance = [] if to else _band(atlas, next(iter(atlas.lineage(lineage))), stack, circuit, column)
    datasets = {"profile": _known(pd.DataFrame(rows), "median", column), "chosen": [], "chance": chance}
    return _with(pictures.profile("step"), title, datasets)


@door
def spectrum(
    atlas: Atlas, model: str, layer: int, head: int, signed: bool = False, stack: str = "self", circuit: str = "qk"
) -> alt.LayerChart:
    """The spectrum of a head before those of its layer's other heads: singular values, or the signed eigenvalues.

    Returns
    -------
    altair.LayerChart

    Raises
    ------
    HeadgramError
        If the model, the stack, the circuit, the layer or the head was not measured.

    Examples
    --------
    >>> atlas = headgram.open_atlas("results")
    >>> headgram.plot.spectrum(atlas, "smollm2-135m-instruct", layer=18, head=6, signed=True).save("spectrum.svg")
    """
    table = _rows(atlas, "spectra", model, stack, circuit)
    own = table[table["layer"] == layer]
    if head not in set(own["head"]):
        raise HeadgramError(f"the stack '{stack}' of {model} has no head {head!r:.60} in layer {layer!r:.60}")
    name = "symmetric_eigenvalue" if signed else "singular_value"
    kept = own if signed else own[own["index"] < _facts(atlas, model, stack, circuit)["rank"]]
    kept = kept.sort_values(["head", name], ascending=[True, False])
    rows = pd.DataFrame({"head": kept["head"], "index": kept.groupby("head").cumcount(), "value": kept[name]})
    title = f"{'Signed eigenvalues' if signed else 'Singular values'} of layer {layer}, head {head}: {model}, {stack}, {circuit}"
    return _with(pictures.spectrum(), title, {"others": rows[rows["head"] != head], "chosen": rows[rows["head"] == head]})


@door
def depth(atlas: Atlas, models: str | Sequence[str], column: str = "symmetry", circuit: str = "qk") -> alt.LayerChart:
    """Median and quartiles over heads of a column along the relative depth of some models, each by its first stack.

    Returns
    -------
    altair.LayerChart
        A grey band says where the heads of the first model lie by chance, if that is known.

    Raises
    ------
    HeadgramError
        If a model, the circuit or the column was not measured.

    Examples
    --------
    >>> atlas = headgram.open_atlas("results")
    >>> headgram.plot.depth(atlas, ["all-minilm-l6-v2", "smollm2-135m-instruct"]).save("depth.svg")
    """
    require(atlas, Atlas, _WHAT)
    names = [models] if isinstance(models, str) else list(models)
    if not names:
        raise HeadgramError("name at least one model")
    parts = []
    for model in names:
        table = _rows(atlas, "layers", model, atlas.stacks(model, circuit)[0], circuit).sort_values("layer")
        quartiles = {name: _column(table, f"{column}_{name}") for name in ("q25", "median", "q75")}
        parts.append(pd.DataFrame({"series": model, "x": np.linspace(0, 1, len(table)), **quartiles}))
    called = "chance" if len(names) == 1 else f"chance: {names[0]}"
    chance = _band(atlas, names[0], atlas.stacks(names[0], circuit)[0], circuit, column, called)
    datasets = {"profile": _known(pd.concat(parts), "median", column), "chosen": [], "chance": chance}
    return _with(pictures.profile(), f"{_label(column)} along the depth", datasets)


def _square(values: xr.DataArray) -> np.ndarray:
    """Rows and columns are all heads, layer by layer."""
    array: np.ndarray = values.to_numpy()
    return array.reshape(array.shape[0] * array.shape[1], -1)


def _cells(square: np.ndarray) -> dict[str, pd.DataFrame | list[Any]]:
    """The known cells of a square of heads, which are numbered layer by layer."""
    a, b = np.nonzero(~np.isnan(square))
    return {"cells": pd.DataFrame({"heads_a": a, "heads_b": b, "value": square[a, b]}), "chosen": []}


def _rows(atlas: Atlas, table: str, model: str, stack: str, circuit: str) -> pd.DataFrame:
    require(atlas, Atlas, _WHAT)
    return atlas.of_heads(table, model, stack, circuit)


def _facts(atlas: Atlas, model: str, stack: str, circuit: str) -> dict[str, Any]:
    """The stack's row of `models`."""
    return dict(_rows(atlas, "models", model, stack, circuit).iloc[0])


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    if name not in table:
        numbers = ", ".join(column.name for column in columns())
        raise HeadgramError(f"heads have no column '{name.partition('_q25')[0]}'; there are: {numbers}")
    return table[name]


def _known(rows: pd.DataFrame, value: str, column: str) -> pd.DataFrame:
    """The rows with a number."""
    found = rows.dropna(subset=[value])
    if found.empty:
        raise HeadgramError(f"the column '{column}' is empty for these heads: docs/artifacts.md says which heads have it")
    return found


def _expected(heads: pd.DataFrame, column: str) -> float | None:
    """What the tables say that chance gives, where that is the same for all heads."""
    values = heads.get(f"{column}_expected", pd.Series(dtype=float)).dropna().unique()
    return float(values[0]) if len(values) == 1 else None


def _band(atlas: Atlas, model: str, stack: str, circuit: str, column: str, name: str = "chance") -> list[dict[str, float | str]]:
    """Where the heads of a stack lie by chance; a line where only their mean is known."""
    facts = _facts(atlas, model, stack, circuit)
    null, expected = nulls(facts).get(column), _expected(_rows(atlas, "heads", model, stack, circuit), column)
    return band(null or (None if expected is None else Null(expected, 0.0)), int(facts["layers"] * facts["heads"]), name)


def _label(column: str) -> str:
    return next((each.label for each in columns() if each.name == column), column)


def _with(chart: alt.LayerChart, title: str, datasets: Mapping[str, pd.DataFrame | list[Any]]) -> alt.LayerChart:
    """A picture with its data."""
    rows = {name: data if isinstance(data, list) else data.to_dict("records") for name, data in datasets.items()}
    whole: alt.LayerChart = chart.properties(title=title, width=360, height=300, datasets=rows)
    return whole
