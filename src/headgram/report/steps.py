"""The models of a lineage side by side, over their steps: what the page draws of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from headgram.report.columns import columns
from headgram.report.pack import pack
from headgram.results.paths import Place
from headgram.results.tables import of_place, read_table

#: What a layer has beside the medians of its heads: columns of `layers`, and what they are called.
LAYER_COLUMNS = {
    "cosine_previous": "mean cosine to the previous layer",
    "cosine_next": "mean cosine to the next layer",
    "cosine_all": "mean cosine to all layers",
    "layer_symmetry_score": "symmetry score of the layer's whole form",
    "layer_directionality": "directionality of the layer's whole form",
}
#: What each model of a lineage is compared with.
COMPARED = ("first", "previous")


def steps_pack(
    models: Sequence[str],
    places: Sequence[str],
    tables: Mapping[str, Mapping[str, Path]],
    drift: Mapping[tuple[str, str], Path],
) -> str:
    """What the page draws of the `S` models of a lineage, in their order; NaN where something was not measured.

    Parameters
    ----------
    places
        The circuits and stacks that all of them have, as `{circuit}/{stack}`.
    tables
        Of each model, `heads` and `layers`.
    drift
        The tables `drift` that there are, by the later model and the earlier one.

    Returns
    -------
    str
        A pack of arrays by `{circuit}/{stack}/{part}`: `heads` (S, C, L, H), in the order of `columns()`; `layers` (S, C, L), in
        that of `LAYER_COLUMNS`; `first` and `previous` (S, L, H), cosines to those models.
    """
    names = [column.name for column in columns()]
    read = {model: {name: read_table(tables[model][name]) for name in ("heads", "layers")} for model in models}
    moved = {pair: read_table(path) for pair, path in drift.items()}
    arrays = {}
    for at in places:
        circuit, stack = at.split("/")
        place = circuit, stack
        heads, layers = (
            [of_place(place, read[model][name]).to_pandas().sort_values(keys) for model in models]
            for name, keys in (("heads", ["layer", "head"]), ("layers", ["layer"]))
        )
        shape = layers[0]["layer"].nunique(), heads[0]["head"].nunique()
        arrays[f"{at}/heads"] = np.stack([table[names].to_numpy().T.reshape(-1, *shape) for table in heads])
        arrays[f"{at}/layers"] = np.stack([table[[*LAYER_COLUMNS]].to_numpy(float).T for table in layers])
        for i, to in enumerate(COMPARED):
            others = [models[0], *([models[0]] * (len(models) - 1), models[:-1])[i]]
            arrays[f"{at}/{to}"] = np.stack(
                [
                    _cosines(moved[pair], place, shape) if (pair := (model, other)) in moved else np.full(shape, np.nan)
                    for model, other in zip(models, others, strict=True)
                ]
            )
    return pack(None, arrays)


def _cosines(drift: pa.Table, place: Place, shape: tuple[int, int]) -> np.ndarray:
    """(L, H); NaN where the circuit of the stack was not compared."""
    table = of_place(place, drift).to_pandas().sort_values(["layer", "head"])
    values: np.ndarray = table["cosine"].to_numpy().reshape(shape) if len(table) else np.full(shape, np.nan)
    return values
