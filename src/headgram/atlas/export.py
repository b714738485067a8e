"""The atlas in other formats: CSV for spreadsheets and R, NetCDF for labelled arrays."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headgram.atlas.reader import Atlas
from headgram.foreign import plain_cell
from headgram.results.files import written_whole
from headgram.results.tables import TABLES

if TYPE_CHECKING:
    import pandas as pd


def export_csv(atlas: Atlas, models: Sequence[str], folder: Path) -> list[Path]:
    """Write every table of some models as `{table}.csv`, models below one another; numbers round-trip exactly."""
    paths = [folder / f"{name}.csv" for name in TABLES]
    for name, path in zip(TABLES, paths, strict=True):
        with written_whole(path) as file:
            for model in models:
                harmless(atlas.table(name, model)).to_csv(file, mode="wb", index=False, header=model == models[0])
    return paths


def harmless(table: pd.DataFrame) -> pd.DataFrame:
    """A table for CSV: its texts may be a stranger's, so nothing is left in them that a terminal or a spreadsheet acts on."""
    texts = {name: column for name, column in table.items() if column.dtype.kind not in "biuf"}
    cells = {name: column.map({text: plain_cell(text) for text in column.dropna().unique()}) for name, column in texts.items()}
    return table.assign(**cells)


def export_netcdf(atlas: Atlas, models: Sequence[str], folder: Path) -> list[Path]:
    """Write every model as `{model}.nc`, NetCDF 4 with a group per circuit and one per stack in it, see `Atlas.dataset`.

    Compositions are in the groups `composition/{stack}/{kind}`, see `Atlas.compositions`.
    """
    import xarray as xr

    paths = [folder / f"{model}.nc" for model in models]
    for model, path in zip(models, paths, strict=True):
        places = [(circuit, stack) for circuit in atlas.circuits(model) for stack in atlas.stacks(model, circuit)]
        stacks = {f"{circuit}/{stack}": atlas.dataset(model, stack, circuit) for circuit, stack in places}
        stacks |= {f"composition/{place}": found for place, found in atlas.compositions(model).items()}
        tree = xr.DataTree.from_dict({"/": xr.Dataset(attrs={"model": model}), **stacks})
        content = io.BytesIO()
        packed = {f"/{stack}": {name: {"zlib": True} for name in data.data_vars} for stack, data in stacks.items()}
        tree.to_netcdf(content, engine="h5netcdf", encoding=packed)
        with written_whole(path) as file:
            file.write(content.getbuffer())
    return paths
