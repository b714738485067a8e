"""Columns of the tables as labelled arrays: of layer pairs and heads, of all heads with all heads, by offset and by plane."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from headgram.errors import HeadgramError
from headgram.results.files import MENDING

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


def by_layers(table: pd.DataFrame, value: str, attributes: Mapping[str, Any] | None = None) -> xr.DataArray:
    """A column of a table of layer pairs, as layers by layers by heads, both triangles."""
    import xarray as xr

    layers, heads = np.union1d(table["layer_a"], table["layer_b"]), np.unique(table["head"])
    keys = {"layer_a": layers, "layer_b": layers, "head": heads}
    _require_filled(table, [*keys], len(layers) * (len(layers) + 1) // 2 * len(heads))
    a, b, head = (np.searchsorted(axis, table[key]) for key, axis in keys.items())
    data = np.zeros((len(layers), len(layers), len(heads)))
    data[a, b, head] = data[b, a, head] = table[value]
    return xr.DataArray(data, coords=keys, dims=list(keys), name=value, attrs=attributes)


def by_heads(
    heads_a: pd.DataFrame, heads_b: pd.DataFrame, table: pd.DataFrame, value: str, attributes: Mapping[str, Any]
) -> xr.DataArray:
    """A column of a table of two heads, as layers by heads by layers by heads, `a` before `b`; NaN where there is no row."""
    import xarray as xr

    both: dict[str, pd.MultiIndex] = {
        side: by_place(heads, ["layer", "head"]).index for side, heads in (("a", heads_a), ("b", heads_b))
    }
    coordinates = {
        f"{name}_{side}": np.unique(heads.get_level_values(name)) for side, heads in both.items() for name in heads.names
    }
    data = np.full([len(each) for each in coordinates.values()], np.nan, dtype=np.float32)
    data[tuple(np.searchsorted(each, table[name]) for name, each in coordinates.items())] = table[value]
    return xr.DataArray(data, coords=coordinates, dims=list(coordinates), name=value, attrs=attributes)


def symmetric(array: xr.DataArray, itself: pd.Series) -> xr.DataArray:
    """An array of `by_heads` with its other triangle, and on the diagonal the value of each head with itself, in their order."""
    count = array.shape[0] * array.shape[1]
    square = array.to_numpy().reshape(count, count)
    square = np.where(np.isnan(square), square.T, square)
    np.fill_diagonal(square, itself)
    return array.copy(data=square.reshape(array.shape))


def by_offset(table: pd.DataFrame, value: str, attributes: Mapping[str, Any]) -> xr.DataArray:
    """A column of the table `rotary`, as layers by heads by offsets."""
    array: xr.DataArray = by_place(table, ["layer", "head", "offset"])[value].to_xarray()
    return array.assign_attrs(attributes)


def by_plane(table: pd.DataFrame, value: str, attributes: Mapping[str, Any]) -> xr.DataArray:
    """A column of the table `frequencies`, as layers by heads by planes, without what no rotation touches."""
    table = table[table["plane"].notna()].astype({"plane": int}).set_index(["layer", "head", "plane"])
    array: xr.DataArray = table[value].to_xarray()
    wavelength = table["wavelength"].to_xarray().isel(head=0, drop=True)
    return array.assign_coords(wavelength=wavelength).assign_attrs(attributes)


def by_place(table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """A table with its places as index. It has one row for each layer, head and so on, so that an array of it has no gaps.

    Raises
    ------
    HeadgramError
        If rows are missing or too many, as no run writes them.
    """
    _require_filled(table, keys, math.prod(table[key].nunique() for key in keys))
    return table.set_index(list(keys))


def _require_filled(table: pd.DataFrame, keys: Sequence[str], places: int) -> None:
    if len(table) != places:
        found = f"a table by {', '.join(keys)} has {len(table)} rows for {places} places"
        raise HeadgramError(f"{found}: {MENDING}")
