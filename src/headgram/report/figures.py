"""Figures of single models, and of all models, for `snakemake --report`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from headgram.geometry.nulls import Null
from headgram.report import pictures
from headgram.report.arrays import StackArrays, StackSummary
from headgram.report.chance import PALE, band, note, nulls
from headgram.report.columns import columns
from headgram.report.names import PROFILE_FIGURES, STACK_FIGURES
from headgram.results.tables import SIDES

#: As many models as colours that are told apart.
COMPARED = 8


def stack_figures(model: str, name: str, stack: StackArrays) -> dict[str, str]:
    """Figures of one circuit of a stack in SVG, by the names of `STACK_FIGURES`."""
    circuit, stack_name = name.split("/")
    of = ", ".join([model, *([] if stack_name == "self" else [stack_name]), circuit])
    return {figure: _FIGURES[figure](f"{label}: {of}", stack) for figure, label in STACK_FIGURES.items()}


def profile_figures(models: Mapping[str, StackSummary]) -> dict[str, str]:
    """Figures that lay the first models over each other, by column."""
    known = {column.name: i for i, column in enumerate(columns())}
    figures = {}
    for name, label in PROFILE_FIGURES.items():
        rows = [
            {"series": model, "x": float(x), "q25": low, "median": middle, "q75": high}
            for model, stack in list(models.items())[:COMPARED]
            for x, low, middle, high in zip(_relative(stack.layers), *stack.quartiles[:, known[name]].tolist(), strict=True)
        ]
        facts = next(iter(models.values())).facts
        chance = band(nulls(facts).get(name), facts["layers"] * facts["heads"])
        datasets = {"profile": rows, "chosen": [], "chance": chance}
        figures[name] = pictures.figure(pictures.profile("relative depth"), f"{label} along the depth", datasets, 640, 300)
    return figures


def _relative(layers: np.ndarray) -> np.ndarray:
    return np.linspace(0, 1, len(layers)) if len(layers) > 1 else np.zeros(1)


def _symmetry(title: str, stack: StackArrays) -> str:
    values = stack.heads[[column.name for column in columns()].index("symmetry")]
    null = nulls(stack.summary.facts)["symmetry"]
    reach = max(float(np.quantile(np.abs(values - null.mean), 0.99)), PALE * (null.best_of(values.size) - null.mean))
    rows = [
        {"layer": int(layer), "head": head, "value": float(value)}
        for layer, line in zip(stack.summary.layers, values, strict=True)
        for head, value in enumerate(line)
    ]
    chart = pictures.heatmap("head", "layer", (null.mean - reach, null.mean + reach), pictures.DIVERGING, note(null))
    width, height = (max(160, min(640, 22 * size)) for size in values.T.shape)
    return pictures.figure(chart, title, {"cells": rows, "chosen": []}, width, height)


def _cosine(title: str, stack: StackArrays) -> str:
    null, reach = _null(stack, "cosine"), _reach(stack, "cosine")
    chart = pictures.heatmap("layer_b", "layer_a", (-reach, reach), pictures.DIVERGING, note(null))
    return _square(chart, title, stack, "cosine")


def _overlap(side: str, title: str, stack: StackArrays) -> str:
    chart = pictures.heatmap("layer_b", "layer_a", (0.0, _reach(stack, side)), note=note(_null(stack, side)))
    return _square(chart, title, stack, side)


def _square(chart: pictures.Chart, title: str, stack: StackArrays, kind: str) -> str:
    mean = stack.mean_square(kind)
    rows = [
        {"layer_a": int(a), "layer_b": int(b), "value": float(mean[i, j])}
        for i, a in enumerate(stack.summary.layers)
        for j, b in enumerate(stack.summary.layers)
    ]
    return pictures.figure(chart, title, {"cells": rows, "chosen": []}, 420, 420)


def _null(stack: StackArrays, kind: str) -> Null:
    """Of the mean over heads of a comparison of two layers."""
    return nulls(stack.summary.facts)[kind].mean_of(stack.summary.facts["heads"])


def _reach(stack: StackArrays, kind: str) -> float:
    """Where the colours end: the largest magnitude off the diagonal, but so far from chance that chance is pale."""
    others = stack.mean_square(kind)[~np.eye(len(stack.summary.layers), dtype=bool)]
    best = _null(stack, kind).best_of(max(1, others.size // 2))
    return max(float(np.abs(others).max(initial=0)), min(1.0, PALE * best))


_FIGURES: dict[str, Callable[[str, StackArrays], str]] = {
    "symmetry": _symmetry,
    "cosine": _cosine,
    **{f"overlap-{side}": partial(_overlap, side) for side in SIDES},
}
