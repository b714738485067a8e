"""The atlas in other formats: CSV for spreadsheets and R, NetCDF for labelled arrays."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from headgram.atlas.reader import Atlas
from headgram.results.files import written_whole
from headgram.results.tables import TABLES


def export_csv(atlas: Atlas, models: Sequence[str], folder: Path) -> list[Path]:
    """Write every table that any of some models has as `{table}.csv`, models below one another; numbers round-trip exactly."""
    having = {name: [model for model in models if atlas.has(name, model)] for name in TABLES}
    paths = {name: folder / f"{name}.csv" for name, found in having.items() if found}
    for name, path in paths.items():
        with written_whole(path) as file:
            for model in having[name]:
                atlas.table(name, model).to_csv(file, mode="wb", index=False, header=model == having[name][0])
    return list(paths.values())


def export_netcdf(atlas: Atlas, models: Sequence[str], folder: Path) -> list[Path]:
    """Write every model as `{model}.nc`, NetCDF 4 with a group per circuit and one per stack in it, see `Atlas.dataset`."""
    import xarray as xr

    paths = [folder / f"{model}.nc" for model in models]
    for model, path in zip(models, paths, strict=True):
        places = [(circuit, stack) for circuit in atlas.circuits(model) for stack in atlas.stacks(model, circuit)]
        stacks = {f"{circuit}/{stack}": atlas.dataset(model, stack, circuit) for circuit, stack in places}
        tree = xr.DataTree.from_dict({"/": xr.Dataset(attrs={"model": model}), **stacks})
        content = io.BytesIO()
        packed = {f"/{stack}": {name: {"zlib": True} for name in data.data_vars} for stack, data in stacks.items()}
        tree.to_netcdf(content, engine="h5netcdf", encoding=packed)
        with written_whole(path) as file:
            file.write(content.getbuffer())
    return paths
