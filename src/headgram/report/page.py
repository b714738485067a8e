"""The page: one HTML file that holds its library, its styles, its pictures and the models' data, and needs no network."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import numpy as np

from headgram.report import pictures
from headgram.report.arrays import FORMS, StackArrays, StackSummary
from headgram.report.chance import PALE, for_page
from headgram.report.columns import columns
from headgram.report.names import DRAWN
from headgram.report.pack import pack
from headgram.version import __version__

#: One script on the page, in this order: `app` starts it.
SCRIPTS = ("data", "looks", "picking", "saving", "matrix", "pictures", "app")
#: Characters of models' data that the page itself holds, in the manifest's order. What goes beyond lies beside the page.
EMBEDDED = 24 * 2**20


def model_pack(stacks: Mapping[str, StackArrays]) -> str:
    """All arrays of a model but the quartiles, which `index_pack` holds."""
    arrays: dict[str, np.ndarray] = {}
    for name, stack in stacks.items():
        parts = {"heads": stack.heads, "singular": stack.singular, "eigenvalues": stack.eigenvalues}
        parts |= {f"pairs/{kind}": values for kind, values in stack.pairs.items()}
        parts |= {f"neighbours/{measure}": values for measure, values in stack.neighbours.items()}
        parts |= {f"matrix/{part}": values for part, values in (stack.matrix.arrays() if stack.matrix else {}).items()}
        parts |= {f"feeding/{part}": values for part, values in (stack.feeding.arrays() if stack.feeding else {}).items()}
        arrays |= {f"{name}/{part}": values for part, values in parts.items()}
    return pack(None, arrays)


def layer_packs(stacks: Mapping[str, StackArrays]) -> dict[str, str]:
    """What the page asks for when it zooms into many heads: by `{circuit}-{stack}-{layer}`, that layer's heads with all heads."""
    return {
        f"{name.replace('/', '-')}-{layer}": pack(
            None, stack.matrix.layer(position) | (stack.feeding.layer(position) if stack.feeding else {})
        )
        for name, stack in stacks.items()
        if stack.matrix is not None and len(stack.matrix.order) > DRAWN
        for position, layer in enumerate(stack.summary.layers)
    }


def index_pack(models: Mapping[str, Mapping[str, StackSummary]], origins: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """What the page knows of every model before its own data are asked for; `origins` says where from, when and by what."""
    meta = {
        "version": __version__,
        "origins": dict(origins or {}),
        "pale": PALE,
        "forms": FORMS,
        "columns": [asdict(column) for column in columns()],
        "models": {
            model: {
                name: {**stack.facts, "layer_indices": stack.layers.tolist(), "chance": for_page(stack.facts)}
                for name, stack in stacks.items()
            }
            for model, stacks in models.items()
        },
    }
    quartiles = {f"{model}/{name}": stack.quartiles for model, stacks in models.items() for name, stack in stacks.items()}
    return pack(meta, quartiles)


def beside(name: str, text: str) -> str:
    """The script that holds a pack where the page does not: a model's, or of `{model}/{circuit}-{stack}-{layer}`."""
    return f"headgram.receive({_script_json(name)}, {_script_json(text)});\n"


def page_shell() -> dict[str, str]:
    """The parts of the page that do not depend on the models: library, pictures, styles and script."""
    specs = {
        "cells": pictures.heatmap("head", "layer"),
        "square": pictures.heatmap("layer_b", "layer_a"),
        "spectrum": pictures.spectrum(),
        "profile": pictures.profile(),
    }
    return {
        "style": _asset("style.css"),
        "vega": pictures.vega_library(),
        "pictures": _script_json({name: pictures.for_page(chart) for name, chart in specs.items()}),
        "app": "".join(_asset(f"{name}.js") for name in SCRIPTS),
    }


def page(shell: Mapping[str, str], index: str, packs: Mapping[str, str]) -> str:
    """The page.

    Parameters
    ----------
    shell
        From `page_shell`.
    index
        From `index_pack`.
    packs
        From `model_pack`, by model: those that the page is to hold.
    """
    data = [("index", index), *((f"pack-{model}", text) for model, text in packs.items())]
    scripts = "\n".join(f'<script type="text/plain" id="{html.escape(name)}">{text}</script>' for name, text in data)
    parts = {**shell, "data": scripts}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return files("headgram.report").joinpath(name).read_text(encoding="utf-8")


def _script_json(value: Any) -> str:
    """JSON that cannot end the script which holds it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
