"""Numbers of heads and layers over the steps of a lineage: what `Atlas.trajectory` gives."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
import xarray as xr

from headgram.atlas.labelled import by_place
from headgram.atlas.tables import Tables
from headgram.errors import HeadgramError
from headgram.results.tables import DRIFT, HEADS, LAYERS

#: What each model is compared with, and the word of the option `lineage.pairs` that asks for it.
_OPTION = {"first": "first", "previous": "neighbours"}


def trajectory(
    atlas: Tables, column: str, lineage: str, stack: str, circuit: str, to: Literal["first", "previous"] | None
) -> xr.DataArray:
    """A column of the tables of every model of a lineage, or of every pair, joined along the steps."""
    if to not in (None, *_OPTION):
        raise HeadgramError(f"models are compared with the 'first' or the 'previous' one of their lineage, not with '{to}'")
    steps = atlas.lineage(lineage)
    models = list(steps)
    name = _table_of(column, to)
    pairs = [(model, "") for model in models]
    if to:
        pairs = [(models[i], models[0 if to == "first" else i - 1]) for i in range(1, len(models))]
    if not pairs:
        raise HeadgramError(f"the lineage '{lineage}' has one model, which is compared with no other")
    keys = ["layer"] if name == "layers" else ["layer", "head"]
    arrays = []
    for model, other in pairs:
        if to and other not in atlas.others(model):
            raise HeadgramError(f"{model} was not compared with {other}: run again with '{_OPTION[to]}' in lineage.pairs")
        table = atlas.of_heads(name, model, stack, circuit)
        rows = table[table["other"] == other] if to else table
        if rows.empty:
            raise HeadgramError(f"{model} was compared with {other} in token space (lineage.basis), where heads have no {column}")
        arrays.append(by_place(rows, keys)[column].to_xarray())
        if not arrays[-1].coords.equals(arrays[0].coords):
            raise HeadgramError(
                f"{model} has other layers or heads than {pairs[0][0]}, so {column} has no trajectory over '{lineage}'; "
                "the tables `heads` and `layers` hold it model by model"
            )
    joined: xr.DataArray = xr.concat(arrays, dim="step", join="exact").transpose("step", *keys)
    attributes = {"lineage": lineage, "stack": stack, "circuit": circuit} | ({"to": to} if to else {})
    compared = [model for model, _ in pairs]
    at = np.array([steps[model] for model in compared])
    return joined.assign_coords(step=at, model=("step", compared)).assign_attrs(attributes)


def _table_of(column: str, to: str | None) -> str:
    """The table that holds a column."""
    schemas = {"drift": DRIFT} if to else {"heads": HEADS, "layers": LAYERS}
    for name, schema in schemas.items():
        if _is_number(schema, column):
            return name
    hint = ": ask for to='first' or to='previous'" if not to and _is_number(DRIFT, column) else ""
    which = "the table drift has" if to else "the tables heads and layers have"
    raise HeadgramError(f"{which} no number '{column}'{hint}")


def _is_number(schema: pa.Schema, column: str) -> bool:
    return column in schema.names and schema.field(column).type == "double"
