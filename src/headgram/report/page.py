"""The page: one HTML file that holds its library, its styles, its pictures and the models' data, and needs no network.

All but the data is its shell, which is the same for every study.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files

from headgram.report import pictures
from headgram.report.arrays import FORMS, StackSummary
from headgram.report.chance import PALE, for_page
from headgram.report.columns import columns
from headgram.report.pack import pack, script_json
from headgram.report.steps import LAYER_COLUMNS
from headgram.version import __version__

#: One script on the page, in this order: `app` starts it.
SCRIPTS = ("data", "looks", "picking", "saving", "matrix", "positions", "pictures", "steps", "app")
#: Where the shell has room for models' data.
_DATA = "<!-- models -->"
#: Characters of models' data that the page itself holds, in the manifest's order. What goes beyond lies beside the page.
EMBEDDED = 24 * 2**20


def index_pack(
    models: Mapping[str, Mapping[str, StackSummary]],
    origins: Mapping[str, Mapping[str, str]] | None = None,
    lineages: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """What the page knows of every model before its own data are asked for.

    Parameters
    ----------
    origins
        Where each model is from, when it was measured and by what.
    lineages
        The models of each lineage, in the order of their steps; `steps_pack` of the one in place `i` lies in `lineages/{i}.js`.
    """
    meta = {
        "version": __version__,
        "origins": dict(origins or {}),
        "pale": PALE,
        "forms": FORMS,
        "columns": [asdict(column) for column in columns()],
        "layer_columns": LAYER_COLUMNS,
        "lineages": [list(members) for members in (lineages or {}).values()],
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


def page_shell() -> str:
    """The page without models: library, pictures, styles and script."""
    parts = {
        "style": _asset("style.css"),
        "vega": pictures.vega_library(),
        "pictures": script_json({name: pictures.vega(name) for name in pictures.PICTURES}),
        "app": "".join(_asset(f"{name}.js") for name in SCRIPTS),
        "data": _DATA,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def page(shell: str, index: str, packs: Mapping[str, str]) -> str:
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
    return shell.replace(_DATA, scripts)


def _asset(name: str) -> str:
    return files("headgram.report").joinpath(name).read_text(encoding="utf-8")
