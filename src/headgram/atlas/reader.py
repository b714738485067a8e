"""The finished results, for notebooks: tables, arrays with named dimensions, and directions."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from headgram.atlas.labelled import by_heads, by_layers, by_offset, by_place, by_plane, symmetric
from headgram.atlas.tables import Tables
from headgram.errors import HeadgramError, door, doors
from headgram.results.files import MENDING, require_file

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_DIRECTIONS = ("layers", "right", "left", "signed", "signed_values")
PairColumn = Literal["gram", "cosine", "transposed", "symmetric", "antisymmetric", "z"]
Kind = Literal["q", "k", "v"]
OffsetColumn = Literal["norm", "cosine", "transposed", "symmetry", "trace", "expected", "share", "energy"]
ComposedColumn = Literal["score", "times_chance", "z", "acausal", "averaged"]


@doors
class Atlas(Tables):
    """Tables and directions of all models of a results folder; made by `open_atlas`."""

    def trajectory(
        self,
        column: str,
        lineage: str,
        stack: str = "self",
        circuit: str = "qk",
        to: Literal["first", "previous"] | None = None,
    ) -> xr.DataArray:
        """A number of every head, or of every layer, over the steps of a lineage.

        Parameters
        ----------
        column
            Of the table `heads` or `layers`; with `to`, of the table `drift`.
        to
            What every model but the first is compared with: the first one of the lineage, or the previous one.

        Returns
        -------
        xarray.DataArray, (steps, L, H) or (steps, L) float64
            Dimensions `step`, `layer` and, for a number of heads, `head`; the coordinate `model` names the model of every step.

        Raises
        ------
        HeadgramError
            If there is no such lineage or column, or models were not compared: says which option asks for that.

        Examples
        --------
        >>> atlas = headgram.open_atlas("results")
        >>> drift = atlas.trajectory("cosine", "training", to="first")
        >>> abs(drift.sel(layer=0, head=0)).round(2).to_numpy().tolist()
        [0.87, 0.5, 0.0]
        """
        from headgram.atlas.trajectories import trajectory

        return trajectory(self, column, lineage, stack, circuit, to)

    def dataset(self, model: str, stack: str = "self", circuit: str = "qk") -> xr.Dataset:
        """The tables of one circuit of a stack with named dimensions: `layer`, `head`, `index`, `layer_a`, `layer_b`.

        The row of the table `models` is in the attributes; `neighbours`, a list, has no place here.

        Returns
        -------
        xarray.Dataset
            A variable for each column; the dimensions `layer` and `layer_a`, `layer_b` have the true layer indices.

        Raises
        ------
        HeadgramError
            If the model, the stack or the circuit was not measured.

        Examples
        --------
        >>> atlas = headgram.open_atlas("results")
        >>> found = atlas.dataset("smollm2-135m-instruct")
        >>> found["symmetry"].dims, dict(found["cosine"].sizes)
        (('layer', 'head'), {'layer_a': 30, 'layer_b': 30, 'head': 9})
        """
        import xarray as xr

        pairs = {"gram": [*get_args(PairColumn)], "overlap": ["right", "left", "signed"]}
        tables = {name: self.of_heads(name, model, stack, circuit) for name in pairs}
        arrays = {value: by_layers(tables[name], value) for name, values in pairs.items() for value in values}
        for name, keys in (("heads", ["layer", "head"]), ("spectra", ["layer", "head", "index"]), ("layers", ["layer"])):
            table = by_place(self.of_heads(name, model, stack, circuit).drop(columns=["model", "circuit", "stack"]), keys)
            arrays |= dict(table.drop(columns=["rank", "hidden", "norms", "offset"], errors="ignore").to_xarray().data_vars)
        facts = self.of_heads("models", model, stack, circuit).set_index(["circuit", "stack"]).iloc[0]
        known = {name: value for name, value in facts.items() if value is not None}
        attributes = {name: value.item() if hasattr(value, "item") else value for name, value in known.items()}
        return xr.Dataset(
            {name: array.drop_attrs() for name, array in arrays.items()}, attrs={**attributes, "circuit": circuit, "stack": stack}
        )

    def gram(self, model: str, stack: str = "self", value: PairColumn = "gram", circuit: str = "qk") -> xr.DataArray:
        """Inner products of every layer pair's heads, or another column of the `gram` table.

        Returns
        -------
        xarray.DataArray, (L, L, H) float64
            Dimensions `layer_a`, `layer_b`, `head`, with the true layer indices; both triangles.

        Raises
        ------
        HeadgramError
            If the model, the stack or the circuit was not measured.

        Examples
        --------
        >>> atlas = headgram.open_atlas("results")
        >>> atlas.gram("smollm2-135m-instruct").sel(layer_a=0, layer_b=1, head=0).round(2).item()
        -13.01
        """
        if value not in get_args(PairColumn):
            raise HeadgramError(f"the Gram table has no column '{value}'; there are: {', '.join(get_args(PairColumn))}")
        attributes = {"model": model, "circuit": circuit, "stack": stack}
        return by_layers(self.of_heads("gram", model, stack, circuit), value, attributes)

    def pairs(
        self, model: str, stack: str = "self", value: Literal["cosine", "transposed"] = "cosine", circuit: str = "qk"
    ) -> xr.DataArray:
        """Cosines of all heads with all heads of one stack.

        Parameters
        ----------
        value
            `cosine` of the two forms, or `transposed`, the cosine of one with the other's transpose.

        Returns
        -------
        xarray.DataArray, (L, H, L, H) float32
            Dimensions `layer_a`, `head_a`, `layer_b`, `head_b`, with the true layer indices; symmetric. NaN where a pair was not
            measured (`gram.pairs: same`). The attribute `chance` is the deviation `1/d` that the cosine of two forms has if one
            is turned by random rotations; its mean is 0.

        Raises
        ------
        HeadgramError
            If the model, the stack or the circuit was not measured.

        Examples
        --------
        >>> atlas = headgram.open_atlas("results")
        >>> found = atlas.pairs("smollm2-135m-instruct")
        >>> round(found.sel(layer_a=18, head_a=6, layer_b=18, head_b=7).item(), 2), round(found.attrs["chance"], 4)
        (0.9, 0.0017)
        """
        if value not in ("cosine", "transposed"):
            raise HeadgramError(f"pairs have no '{value}': ask for 'cosine' or 'transposed'")
        heads, table = (self.of_heads(name, model, stack, circuit) for name in ("heads", "pairs"))
        attributes = {"model": model, "circuit": circuit, "stack": stack, "chance": 1 / int(heads["hidden"].iloc[0])}
        itself = (heads["fro_sq"] > 0).astype(float) if value == "cosine" else heads["symmetry_score"]
        return symmetric(by_heads(heads, heads, table, value, attributes), itself)

    def by_offset(self, model: str, stack: str = "self", value: OffsetColumn = "cosine", circuit: str = "qk") -> xr.DataArray:
        """How every head's scores depend on the offset of query and key.

        Parameters
        ----------
        value
            A column of the table `rotary`, or `share` or `energy` of the table `frequencies`, by plane.
        circuit
            `qk`, of the weights as stored, or `qk-folded`, with norms folded in, where that is proven.

        Returns
        -------
        xarray.DataArray, (L, H, offsets) or (L, H, planes) float64
            Dimensions `layer`, `head` and `offset`, or `plane`; of the layers that positions turn, with their true indices.
            Planes have the coordinate `wavelength`, in tokens, by layer.

        Raises
        ------
        HeadgramError
            If the model or the column is not there, or positions turn nothing of the stack.

        Examples
        --------
        >>> atlas = headgram.open_atlas("results")
        >>> atlas.by_offset("smollm2-135m-instruct").sel(layer=0, head=0, offset=[0, 1, 8]).round(2).to_numpy().tolist()
        [1.0, 0.99, 0.8]
        """
        if value not in get_args(OffsetColumn):
            raise HeadgramError(f"offsets and planes have no '{value}'; there are: {', '.join(get_args(OffsetColumn))}")
        self._require(model)
        of_planes = value in ("share", "energy")
        table = self.table("frequencies" if of_planes else "rotary", model)
        rows = table[(table["circuit"] == circuit) & (table["stack"] == stack)]
        if rows.empty:
            needs = "queries and keys that positions turn, by a rotary encoding that is proven for the model"
            raise HeadgramError(f"'{model}' has no offsets of the stack '{stack}' and the circuit '{circuit}': they need {needs}")
        return (by_plane if of_planes else by_offset)(rows, value, {"model": model, "circuit": circuit, "stack": stack})

    def composition(self, model: str, kind: Kind, stack: str = "self", value: ComposedColumn = "score") -> xr.DataArray:
        """How much of what each head writes each head of a later layer reads.

        Parameters
        ----------
        kind
            What the later head does with it: `q`, its queries read it; `k`, its keys; `v`, it moves it on.
        value
            A column of the table `composition`; `averaged` is NaN where positions do not turn what is read.

        Returns
        -------
        xarray.DataArray, (L, H, L, H) float32
            Dimensions `layer_a`, `head_a`, `layer_b`, `head_b`, with the true layer indices; NaN unless `layer_a < layer_b`, or
            the attribute `writer`, the stack of head a, is the encoder that cross-attention reads. The attribute `chance` is
            `1/√d`, the root mean square of the score if one head is turned by a random rotation.

        Raises
        ------
        HeadgramError
            If the model or the stack was not measured in both circuits.

        Examples
        --------
        >>> atlas = headgram.open_atlas("results")
        >>> found = atlas.composition("smollm2-135m-instruct", "k")
        >>> round(found.max().item(), 2), round(found.attrs["chance"], 2)
        (0.18, 0.04)
        """
        for asked, known in ((kind, get_args(Kind)), (value, get_args(ComposedColumn))):
            if asked not in known:
                raise HeadgramError(f"compositions have no '{asked}'; there are: {', '.join(known)}")
        self._require(model)
        table = self.table("composition", model)
        table = table[(table["stack"] == stack) & (table["kind"] == kind)]
        if table.empty:
            needs = "both circuits, two layers, and the option composition.enabled"
            raise HeadgramError(f"'{model}' has no compositions of the stack '{stack}' and the kind '{kind}': they need {needs}")
        return self._composed(table, [value])[value]

    def compositions(self, model: str) -> dict[str, xr.Dataset]:
        """All that `composition` gives of a model, by `{stack}/{kind}`; nothing where no compositions were measured.

        Returns
        -------
        dict
            By `{stack}/{kind}`, an `xarray.Dataset` with a variable for each `value`.

        Raises
        ------
        HeadgramError
            If the model was not measured.

        Examples
        --------
        >>> atlas = headgram.open_atlas("results")
        >>> round(atlas.compositions("smollm2-135m-instruct")["self/k"]["times_chance"].max().item(), 1)
        4.3
        """
        table = self.table("composition", model).groupby(["stack", "kind"], sort=False)
        return {"/".join(map(str, place)): self._composed(rows, get_args(ComposedColumn)) for place, rows in table}

    def _composed(self, rows: pd.DataFrame, values: Sequence[str]) -> xr.Dataset:
        """Columns of one stack and kind of the table `composition`."""
        import xarray as xr

        model, stack, kind, writer = map(str, rows[["model", "stack", "kind", "writer"]].iloc[0])
        writers, readers = (self.of_heads("heads", model, each, "ov") for each in (writer, stack))
        chance = int(readers["hidden"].iloc[0]) ** -0.5
        attributes = {"model": model, "stack": stack, "kind": kind, "writer": writer, "chance": chance}
        return xr.Dataset({value: by_heads(writers, readers, rows, value, attributes) for value in values}, attrs=attributes)

    def overlap(
        self, model: str, stack: str = "self", side: Literal["right", "left", "signed"] = "right", circuit: str = "qk"
    ) -> xr.DataArray:
        """Overlaps of every layer pair's directions: the mean squared cosine of the angles between their subspaces.

        Returns
        -------
        xarray.DataArray, (L, L, H) float64
            As `gram`; the attribute `expected` is the mean overlap of random subspaces.

        Raises
        ------
        HeadgramError
            If the model, the stack or the circuit was not measured.

        Examples
        --------
        >>> atlas = headgram.open_atlas("results")
        >>> found = atlas.overlap("smollm2-135m-instruct")
        >>> round(found.sel(layer_a=0, layer_b=1).max().item(), 3), round(found.attrs["expected"], 3)
        (0.018, 0.014)
        """
        if side not in ("right", "left", "signed"):
            raise HeadgramError(f"there are no '{side}' directions: ask for 'right', 'left' or 'signed'")
        table = self.of_heads("overlap", model, stack, circuit)
        attributes = {"model": model, "circuit": circuit, "stack": stack, "expected": float(table["expected"].iloc[0])}
        return by_layers(table, side, attributes)

    def directions(self, model: str, circuit: str = "qk") -> dict[str, dict[str, Any]]:
        """Directions of one circuit of a model, by stack.

        Returns
        -------
        dict
            `layers (L,)`, `right`, `left`, `signed` `(L, H, k, d)` and `signed_values (L, H, k)`, float32 tensors.

        Raises
        ------
        HeadgramError
            If the model or the circuit was not measured, or the file cannot be read.

        Examples
        --------
        >>> atlas = headgram.open_atlas("results")
        >>> atlas.directions("smollm2-135m-instruct")["self"]["right"].shape
        torch.Size([30, 9, 8, 576])
        """
        import torch

        stacks, path = self.stacks(model, circuit), Path(self.paths.directions(model))
        require_file(path)
        try:
            loaded = torch.load(path, mmap=True, weights_only=True)[circuit]
            found = {stack: {name: loaded[stack][name] for name in _DIRECTIONS} for stack in stacks}
        except (OSError, RuntimeError, pickle.UnpicklingError, LookupError, TypeError) as error:
            raise HeadgramError(f"{path} cannot be read ({type(error).__name__}): {MENDING}") from None
        if not all(isinstance(tensor, torch.Tensor) for tensors in found.values() for tensor in tensors.values()):
            raise HeadgramError(f"{path} cannot be read (it holds no tensors): {MENDING}")
        return found


@door
def open_atlas(results: str | os.PathLike[str] = "results") -> Atlas:
    """Open a results folder.

    Returns
    -------
    Atlas
        Its tables are read when they are asked for.

    Raises
    ------
    HeadgramError
        If it holds no finished model.

    Examples
    --------
    >>> headgram.open_atlas("results").models
    ['all-minilm-l6-v2', 'smollm2-135m-instruct']
    """
    atlas = Atlas(Path(results))
    if not os.path.isdir(results):  # noqa: PTH112  (Path.is_dir raises where a name is too long)
        raise HeadgramError(f"there is no folder '{Path(results)}': run `snakemake` first, or name the folder that a run wrote")
    if not atlas.models:
        raise HeadgramError(f"{Path(results)} holds no finished model: run `snakemake` first")
    return atlas
