"""Columns of the tables as labelled arrays: of layer pairs and heads, of all heads with all heads, by offset and by plane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


def by_layers(table: pd.DataFrame, value: str, attributes: Mapping[str, Any] | None = None) -> xr.DataArray:
    """A column of a table of layer pairs, as layers by layers by heads, both triangles."""
    import numpy as np
    import xarray as xr

    layers, heads = np.unique(table["layer_a"]), np.unique(table["head"])
    a, b = (np.searchsorted(layers, table[name]) for name in ("layer_a", "layer_b"))
    data = np.zeros((len(layers), len(layers), len(heads)))
    data[a, b, table["head"]] = data[b, a, table["head"]] = table[value]
    coordinates = {"layer_a": layers, "layer_b": layers, "head": heads}
    return xr.DataArray(data, coords=coordinates, dims=list(coordinates), name=value, attrs=attributes)


def by_heads(
    heads_a: pd.DataFrame, heads_b: pd.DataFrame, table: pd.DataFrame, value: str, attributes: Mapping[str, Any]
) -> xr.DataArray:
    """A column of a table of two heads, as layers by heads by layers by heads, `a` before `b`; NaN where there is no row."""
    import numpy as np
    import xarray as xr

    both = {"a": heads_a, "b": heads_b}
    coordinates = {f"{name}_{side}": np.unique(heads[name]) for side, heads in both.items() for name in ("layer", "head")}
    data = np.full([len(each) for each in coordinates.values()], np.nan, dtype=np.float32)
    data[tuple(np.searchsorted(each, table[name]) for name, each in coordinates.items())] = table[value]
    return xr.DataArray(data, coords=coordinates, dims=list(coordinates), name=value, attrs=attributes)


def symmetric(array: xr.DataArray, itself: pd.Series) -> xr.DataArray:
    """An array of `by_heads` with its other triangle, and on the diagonal the value of each head with itself, in their order."""
    import numpy as np

    count = array.shape[0] * array.shape[1]
    square = array.to_numpy().reshape(count, count)
    square = np.where(np.isnan(square), square.T, square)
    np.fill_diagonal(square, itself)
    return array.copy(data=square.reshape(array.shape))


def by_offset(table: pd.DataFrame, value: str, attributes: Mapping[str, Any]) -> xr.DataArray:
    """A column of the table `rotary`, as layers by heads by offsets."""
    array: xr.DataArray = table.set_index(["layer", "head", "offset"])[value].to_xarray()
    return array.assign_attrs(attributes)


def by_plane(table: pd.DataFrame, value: str, attributes: Mapping[str, Any]) -> xr.DataArray:
    """A column of the table `frequencies`, as layers by heads by planes, without what no rotation touches."""
    table = table[table["plane"].notna()].astype({"plane": int}).set_index(["layer", "head", "plane"])
    array: xr.DataArray = table[value].to_xarray()
    wavelength = table["wavelength"].to_xarray().isel(head=0, drop=True)
    return array.assign_coords(wavelength=wavelength).assign_attrs(attributes)
