"""The finished results, for notebooks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from headgram.atlas.labelled import by_heads, by_layers, by_offset, by_plane, symmetric
from headgram.described import Described
from headgram.errors import HeadgramError, require
from headgram.forms.variants import is_made
from headgram.results.paths import LINEAGE, OPTIONAL, Results
from headgram.study.manifest import MODEL_NAME

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

PairColumn = Literal["gram", "cosine", "transposed", "symmetric", "antisymmetric", "z"]
Kind = Literal["q", "k", "v"]
OffsetColumn = Literal["norm", "cosine", "transposed", "symmetry", "trace", "expected", "share", "energy"]
ComposedColumn = Literal["score", "times_chance", "z", "acausal", "averaged"]


class Atlas(Described):
    """Tables and directions of all models of a results folder; made by `open_atlas`."""

    def __init__(self, results: Path, chosen: frozenset[str] | None = None) -> None:
        self.results = results  #: the folder
        self.paths = Results(str(results))  #: where each file lies in it
        self._chosen = chosen

    @property
    def models(self) -> list[str]:
        """Names of the measured models, sorted; those that were chosen by `where`."""
        found = (path.stem for path in Path(self.paths.record("merge", "*")).parent.glob("*.json"))
        names = sorted(name for name in found if MODEL_NAME.fullmatch(name))
        return names if self._chosen is None else [name for name in names if name in self._chosen]

    def _described(self) -> tuple[str, list[dict[str, object]]]:
        names = ("model", "circuit", "stack", "architecture", "layers", "heads", "kv_heads", "rank", "hidden")
        line = f"Atlas of {len(self.models)} models in {self.results}"
        try:
            return line, [dict(zip(names, row, strict=True)) for row in self.summary()[list(names)].itertuples(index=False)]
        except HeadgramError as error:
            return f"{line}: {error}", [{"model": model} for model in self.models]

    def where(self, **wanted: Any) -> Atlas:
        """The same atlas of fewer models: those of a lineage, a step, a label of the manifest, or any other column of `summary`.

        Parameters
        ----------
        wanted
            By column, one value or a list of them; the label `data` is the column `label_data`, and may be called `data`.

        Raises
        ------
        HeadgramError
            If there is no such column, or no such model.

        Examples
        --------
        >>> headgram.open_atlas("results").where(lineage="pythia-70m", step=[0, 1000]).heads()  # doctest: +SKIP
        """
        table = self.summary()
        chosen = table
        for name, value in wanted.items():
            column = name if name in table else f"label_{name}"
            if column not in table:
                raise HeadgramError(f"models have no '{name}'; there are: {', '.join(map(str, table.columns))}")
            chosen = chosen[chosen[column].isin(value if isinstance(value, list | tuple | set) else [value])]
        if chosen.empty:
            given = ", ".join(f"{name} {value!r}" for name, value in wanted.items())
            raise HeadgramError(f"{self.results} holds no model with {given}")
        return Atlas(self.results, frozenset(chosen["model"]))

    def heads(self, circuit: str | None = None) -> pd.DataFrame:
        """One row per head, of one circuit (`qk`, `ov`, or a form such as `qk-folded`) or of each: numbers of its form.

        Raises
        ------
        HeadgramError
            If no model was measured in the circuit; so do `spectra`, `layers` and `summary`.
        """
        return self._of_circuit("heads", circuit)

    def spectra(self, circuit: str | None = None) -> pd.DataFrame:
        """One row per head and index: singular value and signed eigenvalue of the symmetric part."""
        return self._of_circuit("spectra", circuit)

    def layers(self, circuit: str | None = None) -> pd.DataFrame:
        """One row per layer: quartiles over its heads, mean cosines to other layers, scores of the layer's whole form."""
        return self._of_circuit("layers", circuit)

    def summary(self, circuit: str | None = None) -> pd.DataFrame:
        """One row per model, circuit and stack, the table `models`: what the model is, and medians over its heads.

        Every label of the manifest is a column `label_{name}`.
        """
        import json

        import pandas as pd

        table = self._of_circuit("models", circuit)
        try:
            labels = pd.DataFrame([dict(json.loads(text)) for text in table["labels"]], index=table.index)
        except (ValueError, TypeError, RecursionError):
            raise HeadgramError(f"a table `models` of {self.results} holds labels that are none: run `snakemake` again") from None
        return table.drop(columns="labels").join(labels.add_prefix("label_"))

    def table(self, name: str, model: str | None = None) -> pd.DataFrame:
        """A table by its name, of one model or of all; the first column is the model.

        Raises
        ------
        HeadgramError
            If there is no such table, the model was not measured, or a file cannot be read.
        """
        import pandas as pd
        import pyarrow as pa

        from headgram.results.tables import TABLES, read_table

        if not isinstance(name, str) or name not in TABLES:
            raise HeadgramError(f"the atlas has no table '{name}'; there are: {', '.join(TABLES)}")
        if model is not None:
            self._require(model)
        models = [model] if model else self.models
        if name in LINEAGE:
            pairs = [(each, other) for each in models for other in self.others(each)]
            files = [(self.paths.pair_table(name, *pair), {"model": pair[0], "other": pair[1]}) for pair in pairs]
        else:
            places = [(self.paths.table(name, each), {"model": each}) for each in models]
            files = [place for place in places if name not in OPTIONAL or Path(place[0]).exists()]
        tables = []
        for path, keys in files:
            try:
                table = read_table(Path(path))
            except (OSError, pa.ArrowException) as error:
                raise HeadgramError(f"{path} cannot be read ({error}): run `snakemake` again") from None
            if not table.schema.equals(TABLES[name]):
                raise HeadgramError(f"{path} has not the columns of the table '{name}': run `snakemake` again")
            tables.append(table.to_pandas().assign(**keys))
        if not files:
            keys = dict.fromkeys(("model", "other") if name in LINEAGE else ("model",), "")
            tables = [TABLES[name].empty_table().to_pandas().assign(**keys)]
        joined: pd.DataFrame = pd.concat(tables, ignore_index=True)
        return joined[[*keys, *(column for column in joined if column not in keys)]]

    def others(self, model: str) -> list[str]:
        """Earlier models of its lineage that a model was compared with, in the tables `drift`, `changes` and `matches`."""
        self._require(model)
        return sorted(path.stem for path in Path(self.paths.record("lineage", model, name="*")).parent.glob("*.json"))

    def lineage(self, name: str) -> dict[str, float]:
        """The steps of a lineage's models, in their order.

        Raises
        ------
        HeadgramError
            If there is no such lineage.
        """
        table = self.summary()
        mine = table[table["lineage"] == name].drop_duplicates("model").sort_values("step")
        if mine.empty:
            known = ", ".join(sorted({each for each in table["lineage"] if each})) or "none"
            raise HeadgramError(f"{self.results} holds no lineage '{name}'; there are: {known}")
        return dict(zip(mine["model"], mine["step"], strict=True))

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
        >>> atlas.trajectory("cosine", "pythia-70m", to="first").min(["layer", "head"])  # doctest: +SKIP
        """
        from headgram.atlas.trajectories import trajectory

        return trajectory(self, column, lineage, stack, circuit, to)

    def stacks(self, model: str, circuit: str = "qk") -> list[str]:
        """Names of a model's stacks of which a circuit was measured, in its order.

        Raises
        ------
        HeadgramError
            If the model or the circuit was not measured.
        """
        self._require(model)
        table = self.table("models", model)
        if circuit not in (circuits := list(dict.fromkeys(table["circuit"]))):
            options = "; the options weights.norm and rotary.offsets ask for more" if is_made(circuit) else ""
            raise HeadgramError(
                f"the circuit '{circuit}' of '{model}' was not measured; there are: {', '.join(circuits)}{options}"
            )
        return list(table[table["circuit"] == circuit]["stack"])

    def circuits(self, model: str) -> list[str]:
        """The circuits that were measured of a model: `qk`, `ov`, and forms that are made of them, such as `qk-folded`."""
        self._require(model)
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
        tables = {name: self.of_heads(name, model, stack, circuit) for name in pairs}
        arrays = {value: by_layers(tables[name], value) for name, values in pairs.items() for value in values}
        for name, keys in (("heads", ["layer", "head"]), ("spectra", ["layer", "head", "index"]), ("layers", ["layer"])):
            table = self.of_heads(name, model, stack, circuit).drop(columns=["model", "circuit", "stack"]).set_index(keys)
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
        >>> atlas.pairs("smollm2-135m-instruct").sel(layer_a=18, head_a=6, layer_b=18, head_b=7).item()  # doctest: +SKIP
        0.9
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
        >>> atlas.by_offset("smollm2-135m-instruct", value="share").sel(plane=0).max().item()  # doctest: +SKIP
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
        >>> atlas.composition("smollm2-135m-instruct", "k").max().item()  # doctest: +SKIP
        0.18
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

        Raises
        ------
        HeadgramError
            If the model was not measured.

        Examples
        --------
        >>> atlas.compositions("smollm2-135m-instruct")["self/k"]["times_chance"].max().item()  # doctest: +SKIP
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

    def tokens(self, model: str, layer: int, head: int, stack: str = "self", circuit: str = "qk") -> pd.DataFrame:
        """The tokens that project most on a head's directions.

        Returns
        -------
        pandas.DataFrame
            A row for each end of each direction, by `side` (`right`: what is read by queries, or moved; `left`: what is read by
            keys, or written), `direction` and `sign`; a column for each place, from the outermost token on: its text, or `#` and
            its number where the checkpoint has no tokenizer.

        Raises
        ------
        HeadgramError
            If the head was not measured, or its tokens were not.

        Examples
        --------
        >>> atlas.tokens("smollm2-135m-instruct", layer=26, head=2, circuit="ov")  # doctest: +SKIP
        """
        rows = self.of_heads("tokens", model, stack, circuit)
        rows = rows[(rows["layer"] == layer) & (rows["head"] == head)]
        if rows.empty:
            place = f"layer {layer}, head {head} of the stack '{stack}', circuit '{circuit}'"
            raise HeadgramError(f"'{model}' has no tokens of {place}: they need the option tokens.enabled, and a measured head")
        named = rows["text"].where(rows["text"] != "", "#" + rows["token"].astype(str))
        return rows.assign(text=named).pivot(index=["side", "direction", "sign"], columns="place", values="text")

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
            If the model or the circuit was not measured.
        """
        import torch

        self._require(model)
        self.stacks(model, circuit)
        loaded: dict[str, dict[str, dict[str, Any]]] = torch.load(self.paths.directions(model), mmap=True, weights_only=True)
        return loaded[circuit]

    def _of_circuit(self, name: str, circuit: str | None) -> pd.DataFrame:
        """A table of all models; the rows of one circuit, if one is given."""
        table = self.table(name)
        if circuit is None:
            return table
        if circuit not in (known := list(dict.fromkeys(table["circuit"]))):
            there_are = f"there are: {', '.join(known)}"
            raise HeadgramError(f"no model of {self.results} was measured in the circuit '{circuit}'; {there_are}")
        return table[table["circuit"] == circuit].reset_index(drop=True)

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
    require(results, (str, os.PathLike), "The results folder is a path")
    atlas = Atlas(Path(results))
    if not os.path.isdir(results):  # noqa: PTH112  (Path.is_dir raises where a name is too long)
        raise HeadgramError(f"there is no folder '{Path(results)}': run `snakemake` first, or name the folder that a run wrote")
    if not atlas.models:
        raise HeadgramError(f"{Path(results)} holds no finished model: run `snakemake` first")
    return atlas
