"""The finished results, for notebooks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from headgram.errors import HeadgramError
from headgram.results.paths import COMPOSED, Results

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_WHY_ABSENT = "it needs both circuits of a stack (options `circuits` and `composition.enabled`)"

PairColumn = Literal["gram", "cosine", "transposed", "symmetric", "antisymmetric", "z"]


class Atlas:
    """Tables and directions of all models of a results folder; made by `open_atlas`."""

    def __init__(self, results: Path) -> None:
        self.results = results  #: the folder

    @property
    def models(self) -> list[str]:
        """Names of the measured models, sorted."""
        return sorted(path.stem for path in (self.results / "provenance").glob("*.json"))

    def heads(self, circuit: str | None = None) -> pd.DataFrame:
        """One row per head, of one circuit (`qk` or `ov`) or of each: the scalars of `headgram.Spectrum`."""
        return self._of_circuit("heads", circuit)

    def spectra(self, circuit: str | None = None) -> pd.DataFrame:
        """One row per head and index: singular value and signed eigenvalue of the symmetric part."""
        return self._of_circuit("spectra", circuit)

    def layers(self, circuit: str | None = None) -> pd.DataFrame:
        """One row per layer: quartiles over its heads, mean cosines to other layers, scores of the layer's whole form."""
        return self._of_circuit("layers", circuit)

    def summary(self, circuit: str | None = None) -> pd.DataFrame:
        """One row per model, circuit and stack, the table `models`: what the model is, and medians over its heads."""
        return self._of_circuit("models", circuit)

    def table(self, name: str, model: str | None = None) -> pd.DataFrame:
        """A table by its name, of one model or of all; the first column is the model.

        Raises
        ------
        HeadgramError
            If there is no such table, the model was not measured, or a file cannot be read.
        """
        import pandas as pd

        from headgram.results.tables import read_table

        wanted = [each for each in ([model] if model else self.models) if self.has(name, each)]
        if not wanted:
            raise HeadgramError(f"{model or 'no model'} has {'no' if model else 'a'} table '{name}': {_WHY_ABSENT}")
        tables = []
        for each in wanted:
            path = self._path(name, each)
            try:
                table = read_table(path).to_pandas()
            except OSError as error:
                raise HeadgramError(f"{path} cannot be read ({error}): run `snakemake` again") from None
            table.insert(0, "model", each)
            tables.append(table)
        joined: pd.DataFrame = pd.concat(tables, ignore_index=True)
        return joined

    def has(self, name: str, model: str) -> bool:
        """Whether a model has a table: all models have all, but for `composition` and `channels`, which need both circuits.

        Raises
        ------
        HeadgramError
            If there is no such table, or the model was not measured.
        """
        from headgram.results.tables import TABLES

        if name not in TABLES:
            raise HeadgramError(f"the atlas has no table '{name}'; there are: {', '.join(TABLES)}")
        self._require(model)
        return name not in COMPOSED or self._path(name, model).exists()

    def _path(self, name: str, model: str) -> Path:
        return Path(Results(str(self.results)).table(name, model))

    def stacks(self, model: str, circuit: str = "qk") -> list[str]:
        """Names of a model's stacks of which a circuit was measured, in its order.

        Raises
        ------
        HeadgramError
            If the model or the circuit was not measured.
        """
        table = self.table("models", model)
        if circuit not in (circuits := list(dict.fromkeys(table["circuit"]))):
            raise HeadgramError(f"the circuit '{circuit}' of '{model}' was not measured; there are: {', '.join(circuits)}")
        return list(table[table["circuit"] == circuit]["stack"])

    def circuits(self, model: str) -> list[str]:
        """The circuits that were measured of a model, `qk` and `ov`."""
        return list(dict.fromkeys(self.table("models", model)["circuit"]))

    def dataset(self, model: str, stack: str = "self", circuit: str = "qk") -> xr.Dataset:
        """The tables of one circuit of a stack with named dimensions: `layer`, `head`, `index`, `layer_a`, `layer_b`.

        The row of the table `models` is in the attributes; `neighbours`, a list, has no place here.

        Raises
        ------
        HeadgramError
            If the model, the stack or the circuit was not measured.
        """
        import xarray as xr

        pairs = {"gram": [*get_args(PairColumn)], "overlap": ["right", "left", "signed"]}
        arrays = {name: self._square(table, model, stack, circuit, name) for table, names in pairs.items() for name in names}
        for name, keys in (("heads", ["layer", "head"]), ("spectra", ["layer", "head", "index"]), ("layers", ["layer"])):
            table = self.of_heads(name, model, stack, circuit).drop(columns=["model", "circuit", "stack"]).set_index(keys)
            arrays |= dict(table.drop(columns=["rank", "hidden"], errors="ignore").to_xarray().data_vars)
        facts = self.of_heads("models", model, stack, circuit).set_index(["circuit", "stack"]).iloc[0]
        attributes = {name: value.item() if hasattr(value, "item") else value for name, value in facts.items()}
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
        """
        if value not in get_args(PairColumn):
            raise HeadgramError(f"the Gram table has no column '{value}'; there are: {', '.join(get_args(PairColumn))}")
        return self._square("gram", model, stack, circuit, value)

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
        >>> atlas = headgram.open_atlas("results")  # doctest: +SKIP
        >>> atlas.pairs("smollm2-135m-instruct").sel(layer_a=18, head_a=6, layer_b=18, head_b=7).item()  # doctest: +SKIP
        0.9
        """
        import numpy as np
        import xarray as xr

        if value not in ("cosine", "transposed"):
            raise HeadgramError(f"pairs have no '{value}': ask for 'cosine' or 'transposed'")
        heads, table = (self.of_heads(name, model, stack, circuit) for name in ("heads", "pairs"))
        layers, indices = np.unique(heads["layer"]), np.unique(heads["head"])
        data = np.full((len(layers), len(indices)) * 2, np.nan, dtype=np.float32)
        a, b = (np.searchsorted(layers, table[name]) for name in ("layer_a", "layer_b"))
        data[a, table["head_a"], b, table["head_b"]] = data[b, table["head_b"], a, table["head_a"]] = table[value]
        itself = np.where(heads["fro_sq"] > 0, 1.0, 0.0) if value == "cosine" else heads["symmetry_score"]
        own = np.searchsorted(layers, heads["layer"])
        data[own, heads["head"], own, heads["head"]] = itself
        coordinates = {"layer_a": layers, "head_a": indices, "layer_b": layers, "head_b": indices}
        attributes = {"model": model, "circuit": circuit, "stack": stack, "chance": 1 / int(heads["hidden"].iloc[0])}
        return xr.DataArray(data, coords=coordinates, dims=list(coordinates), name=value, attrs=attributes)

    def composition(
        self,
        model: str,
        kind: Literal["q", "k", "v"],
        stack: str = "self",
        value: Literal["score", "times_chance", "z", "acausal"] = "score",
    ) -> xr.DataArray:
        """How much of what each head writes each head of a later layer reads.

        Parameters
        ----------
        kind
            What the later head does with it: `q`, its queries read it; `k`, its keys; `v`, it moves it on.
        value
            A column of the table `composition`.

        Returns
        -------
        xarray.DataArray, (L, H, L, H) float32
            Dimensions `layer_a`, `head_a`, `layer_b`, `head_b`, with the true layer indices; NaN unless `layer_a < layer_b`. The
            attribute `chance` is `1/√d`, the root mean square of the score if one head is turned by a random rotation.

        Raises
        ------
        HeadgramError
            If the model or the stack was not measured in both circuits.

        Examples
        --------
        >>> scores = atlas.composition("smollm2-135m-instruct", "k")  # doctest: +SKIP
        >>> scores.sel(layer_a=16, head_a=0, layer_b=17, head_b=3).item()  # doctest: +SKIP
        0.218
        """
        import numpy as np
        import xarray as xr

        if kind not in ("q", "k", "v"):
            raise HeadgramError(f"compositions have no kind '{kind}': ask for 'q', 'k' or 'v'")
        if value not in (values := ("score", "times_chance", "z", "acausal")):
            raise HeadgramError(f"compositions have no '{value}'; there are: {', '.join(values)}")
        heads, table = self.of_heads("heads", model, stack, "ov"), self.table("composition", model)
        table = table[(table["stack"] == stack) & (table["kind"] == kind)]
        layers, indices = np.unique(heads["layer"]), np.unique(heads["head"])
        data = np.full((len(layers), len(indices)) * 2, np.nan, dtype=np.float32)
        a, b = (np.searchsorted(layers, table[name]) for name in ("layer_a", "layer_b"))
        data[a, table["head_a"], b, table["head_b"]] = table[value]
        coordinates = {"layer_a": layers, "head_a": indices, "layer_b": layers, "head_b": indices}
        attributes = {"model": model, "stack": stack, "kind": kind, "chance": int(heads["hidden"].iloc[0]) ** -0.5}
        return xr.DataArray(data, coords=coordinates, dims=list(coordinates), name=value, attrs=attributes)

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
        """
        if side not in ("right", "left", "signed"):
            raise HeadgramError(f"there are no '{side}' directions: ask for 'right', 'left' or 'signed'")
        return self._square("overlap", model, stack, circuit, side, keep="expected")

    def directions(self, model: str, circuit: str = "qk") -> dict[str, dict[str, Any]]:
        """Directions of one circuit of a model, by stack.

        Returns
        -------
        dict
            `layers (L,)`, `right`, `left`, `signed` `(L, H, k, d)` and `signed_values (L, H, k)`, float32 tensors.

        Raises
        ------
        HeadgramError
            If the model or the circuit was not measured.
        """
        import torch

        self._require(model)
        self.stacks(model, circuit)
        loaded: dict[str, dict[str, dict[str, Any]]] = torch.load(
            self.results / "atlas" / "directions" / f"{model}.pt", mmap=True, weights_only=True
        )
        return loaded[circuit]

    def _of_circuit(self, name: str, circuit: str | None) -> pd.DataFrame:
        """A table of all models; the rows of one circuit, if one is given."""
        table = self.table(name)
        return table if circuit is None else table[table["circuit"] == circuit].reset_index(drop=True)

    def _square(self, name: str, model: str, stack: str, circuit: str, value: str, keep: str | None = None) -> xr.DataArray:
        """A column of a table of layer pairs, as layers by layers by heads; `keep` is a constant column for the attributes."""
        import numpy as np
        import xarray as xr

        table = self.of_heads(name, model, stack, circuit)
        layers = np.unique(table["layer_a"])
        heads = np.unique(table["head"])
        a, b = (np.searchsorted(layers, table[name]) for name in ("layer_a", "layer_b"))
        data = np.zeros((len(layers), len(layers), len(heads)))
        data[a, b, table["head"]] = data[b, a, table["head"]] = table[value]
        coordinates = {"layer_a": layers, "layer_b": layers, "head": heads}
        attributes = {"model": model, "circuit": circuit, "stack": stack} | ({keep: float(table[keep].iloc[0])} if keep else {})
        return xr.DataArray(data, coords=coordinates, dims=list(coordinates), name=value, attrs=attributes)

    def of_heads(self, name: str, model: str, stack: str, circuit: str = "qk") -> pd.DataFrame:
        """The rows of a table that are about one circuit of a stack.

        Raises
        ------
        HeadgramError
            If the model, the stack or the circuit was not measured.
        """
        table = self.table(name, model)
        if stack not in (stacks := self.stacks(model, circuit)):
            raise HeadgramError(f"the model '{model}' has no stack '{stack}'; there are: {', '.join(stacks)}")
        return table[(table["circuit"] == circuit) & (table["stack"] == stack)]

    def _require(self, model: str) -> None:
        if model not in self.models:
            raise HeadgramError(f"the model '{model}' is not in {self.results}; there are: {', '.join(self.models)}")


def open_atlas(results: str | os.PathLike[str] = "results") -> Atlas:
    """Open a results folder.

    Raises
    ------
    HeadgramError
        If it holds no finished model.
    """
    atlas = Atlas(Path(results))
    if not Path(results).is_dir():
        raise HeadgramError(f"there is no folder '{Path(results)}'")
    if not atlas.models:
        raise HeadgramError(f"{Path(results)} holds no finished model: run `snakemake` first")
    return atlas
