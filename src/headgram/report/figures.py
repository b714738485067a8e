"""Figures of single models, and of all models, for `snakemake --report`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial

import numpy as np

from headgram.report import pictures
from headgram.report.arrays import StackArrays, StackSummary
from headgram.report.chance import band, nulls
from headgram.report.colours import above, around
from headgram.report.columns import columns
from headgram.report.names import PROFILE_FIGURES, STACK_FIGURES
from headgram.results.tables import SIDES

#: As many models as colours that are told apart.
COMPARED = 8
#: Pixels: wide enough for the bar of colours below.
LEAST = 260


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
            for x, low, middle, high in zip(
                np.linspace(0, 1, len(stack.layers)), *stack.quartiles[:, known[name]].tolist(), strict=True
            )
        ]
        facts = next(iter(models.values())).facts
        chance = band(nulls(facts).get(name), facts["layers"] * facts["heads"])
        datasets = {"profile": rows, "chosen": [], "chance": chance}
        figures[name] = pictures.figure("profile", f"{label} along the depth", datasets, width=640, height=300)
    return figures


def _symmetry(title: str, stack: StackArrays) -> str:
    values = stack.heads[[column.name for column in columns()].index("symmetry")]
    null = nulls(stack.summary.facts)["symmetry"]
    colours = around(null.mean, float(np.quantile(np.abs(values - null.mean), 0.99)), null, values.size)
    rows = [
        {"layer": int(layer), "head": head, "value": float(value)}
        for layer, line in zip(stack.summary.layers, values, strict=True)
        for head, value in enumerate(line)
    ]
    width, height = (max(LEAST, min(640, 22 * size)) for size in values.T.shape)
    return pictures.figure("cells", title, {"cells": rows, "chosen": []}, width=width, height=height, **asdict(colours))


def _square(kind: str, title: str, stack: StackArrays) -> str:
    """The mean over heads of a comparison of every two layers."""
    mean = stack.mean_square(kind)
    others = mean[np.triu_indices(len(mean), 1)]
    null = nulls(stack.summary.facts)[kind].mean_of(stack.summary.facts["heads"])
    largest, count = float(np.abs(others).max(initial=0)), max(1, others.size)
    colours = around(0.0, largest, null, count) if kind == "cosine" else above(largest, null, count)
    rows = [
        {"layer_a": int(a), "layer_b": int(b), "value": float(mean[i, j])}
        for i, a in enumerate(stack.summary.layers)
        for j, b in enumerate(stack.summary.layers)
    ]
    return pictures.figure("square", title, {"cells": rows, "chosen": []}, width=420, height=420, **asdict(colours))


_FIGURES: dict[str, Callable[[str, StackArrays], str]] = {
    "symmetry": _symmetry,
    "cosine": partial(_square, "cosine"),
    **{f"overlap-{side}": partial(_square, side) for side in SIDES},
}
