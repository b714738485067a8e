"""The tables of finished results, and what they are about: models, lineages, stacks, circuits."""

from __future__ import annotations

import contextlib
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from headgram.atlas.current import is_current
from headgram.described import Described
from headgram.errors import HeadgramError, doors, require
from headgram.forms.variants import is_made
from headgram.results.files import MENDING
from headgram.results.paths import LINEAGE, OPTIONAL, Results
from headgram.study.manifest import MODEL_NAME

if TYPE_CHECKING:
    import pandas as pd


@doors
class Tables(Described):
    """Tables of all models of a results folder, as frames of pandas."""

    def __init__(self, results: Path, chosen: frozenset[str] | None = None) -> None:
        self.results = results  #: the folder
        self.paths = Results(str(results))  #: where each file lies in it
        self._chosen = chosen

    @property
    def models(self) -> list[str]:
        """Names of the measured models, sorted; those that were chosen by `where`."""
        found: list[str] = []
        with contextlib.suppress(OSError):  # no folder, or none that can be read
            found = [path.stem for path in Path(self.paths.record("merge", "*")).parent.glob("*.json")]
        names = sorted(name for name in found if MODEL_NAME.fullmatch(name))
        return names if self._chosen is None else [name for name in names if name in self._chosen]

    def _described(self) -> tuple[str, list[dict[str, object]]]:
        names = ("model", "circuit", "stack", "architecture", "layers", "heads", "kv_heads", "rank", "hidden")
        line = f"Atlas of {len(self.models)} models in {self.results}"
        try:
            return line, [dict(zip(names, row, strict=True)) for row in self.summary()[list(names)].itertuples(index=False)]
        except HeadgramError as error:
            return f"{line}: {error}", [{"model": model} for model in self.models]

    def where(self, **wanted: Any) -> Self:
        """The same atlas of fewer models: those of a lineage, a step, a label of the manifest, or any other column of `summary`.

        Parameters
        ----------
        wanted
            By column, one value or a list of them; the label `data` is the column `label_data`, and may be called `data`.

        Returns
        -------
        Atlas

        Raises
        ------
        HeadgramError
            If there is no such column, or no such model.

        Examples
        --------
        >>> headgram.open_atlas("results").where(architecture="bert").models
        ['all-minilm-l6-v2']
        """
        table = self.summary()
        chosen = table
        asked = {name: list(value) if isinstance(value, list | tuple | set) else [value] for name, value in wanted.items()}
        for name, values in asked.items():
            column = name if name in table else f"label_{name}"
            if column not in table:
                raise HeadgramError(f"models have no '{name}'; there are: {', '.join(map(str, table.columns))}")
            for each in values:
                require(each, (str, Real), f"`{name}` is compared with texts and numbers")
            chosen = chosen[chosen[column].isin([each if isinstance(each, str) else float(each) for each in values])]
        if chosen.empty:
            given = " and ".join(f"{name} = {_either(values)}" for name, values in asked.items())
            raise HeadgramError(f"{self.results} holds no model with {given}")
        return type(self)(self.results, frozenset(chosen["model"]))

    def heads(self, circuit: str | None = None) -> pd.DataFrame:
        """One row per head, of one circuit (`qk`, `ov`, or a form such as `qk-folded`) or of each: numbers of its form.

        Returns
        -------
        pandas.DataFrame
            The first columns are `model`, `circuit`, `stack`, `layer` and `head`; docs/artifacts.md describes all.

        Raises
        ------
        HeadgramError
            If no model was measured in the circuit.

        Examples
        --------
        >>> atlas = headgram.open_atlas("results")
        >>> atlas.heads("qk").nlargest(1, "symmetry")[["model", "layer", "head"]].values.tolist()
        [['smollm2-135m-instruct', 14, 3]]
        """
        return self._of_circuit("heads", circuit)

    def spectra(self, circuit: str | None = None) -> pd.DataFrame:
        """One row per head and index: singular value and signed eigenvalue of the symmetric part.

        Returns
        -------
        pandas.DataFrame
            Singular values descend; eigenvalues have the largest magnitude first.

        Raises
        ------
        HeadgramError
            As `heads`.

        Examples
        --------
        >>> atlas = headgram.open_atlas("results")
        >>> atlas.spectra("qk")["singular_value"].head(3).round(2).tolist()
        [4.92, 4.34, 3.98]
        """
        return self._of_circuit("spectra", circuit)

    def layers(self, circuit: str | None = None) -> pd.DataFrame:
        """One row per layer: quartiles over its heads, mean cosines to other layers, scores of the layer's whole form.

        Returns
        -------
        pandas.DataFrame
            Of each number of heads three columns, such as `symmetry_q25`, `symmetry_median` and `symmetry_q75`.

        Raises
        ------
        HeadgramError
            As `heads`.

        Examples
        --------
        >>> atlas = headgram.open_atlas("results")
        >>> atlas.layers("qk").groupby("model").size().to_dict()
        {'all-minilm-l6-v2': 6, 'smollm2-135m-instruct': 30}
        """
        return self._of_circuit("layers", circuit)

    def summary(self, circuit: str | None = None) -> pd.DataFrame:
        """One row per model, circuit and stack, the table `models`: what the model is, and medians over its heads.

        Returns
        -------
        pandas.DataFrame
            Every label of the manifest is a column `label_{name}`.

        Raises
        ------
        HeadgramError
            As `heads`.

        Examples
        --------
        >>> atlas = headgram.open_atlas("results")
        >>> atlas.summary("qk")[["model", "layers", "heads", "hidden"]].values.tolist()
        [['all-minilm-l6-v2', 6, 12, 384], ['smollm2-135m-instruct', 30, 9, 576]]
        """
        import json

        import pandas as pd

        table = self._of_circuit("models", circuit)
        try:
            labels = pd.DataFrame([dict(json.loads(text)) for text in table["labels"]], index=table.index)
        except (ValueError, TypeError, RecursionError):
            raise HeadgramError(f"labels in the table `models` of {self.results} cannot be read: run `snakemake` again") from None
        return table.drop(columns="labels").join(labels.add_prefix("label_"))

    def table(self, name: str, model: str | None = None) -> pd.DataFrame:
        """A table by its name, of one model or of all; the first column is the model.

        Returns
        -------
        pandas.DataFrame
            Of a table about two models, the first two columns are `model` and `other`. No rows where no model has it.

        Raises
        ------
        HeadgramError
            If there is no such table, the model was not measured, or a file cannot be read.

        Examples
        --------
        >>> atlas = headgram.open_atlas("results")
        >>> len(atlas.table("pairs", "smollm2-135m-instruct")) == 2 * 270 * 269 // 2  # two circuits, 270 heads
        True
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
                raise HeadgramError(f"{path} cannot be read ({error}): {MENDING}") from None
            if not table.schema.equals(TABLES[name]):
                raise HeadgramError(f"{path} has other columns than the table '{name}' has now: run `snakemake` again")
            tables.append(table.to_pandas().assign(**keys))
        if not files:
            keys = {"model": "", **({"other": ""} if name in LINEAGE else {})}
            tables = [TABLES[name].empty_table().to_pandas().assign(**keys)]
        joined: pd.DataFrame = pd.concat(tables, ignore_index=True)
        return joined[[*keys, *(column for column in joined if column not in keys)]]

    def others(self, model: str) -> list[str]:
        """Earlier models of its lineage that a model was compared with, in the tables `drift`, `changes` and `matches`.

        A comparison of what one of the two was before it was measured anew does not count.

        Returns
        -------
        list of str

        Raises
        ------
        HeadgramError
            If the model was not measured.

        Examples
        --------
        >>> headgram.open_atlas("results").others("step3")
        ['step0', 'step2']
        """
        self._require(model)
        paths = Path(self.paths.record("lineage", model, name="*")).parent.glob("*.json")
        return sorted(path.stem for path in paths if is_current(path, self.paths, model))

    def lineage(self, name: str) -> dict[str, float]:
        """The steps of a lineage's models, in their order.

        Returns
        -------
        dict
            By model, its step.

        Raises
        ------
        HeadgramError
            If there is no such lineage.

        Examples
        --------
        >>> headgram.open_atlas("results").lineage("training")
        {'step0': 0.0, 'step1': 1000.0, 'step2': 2000.0, 'step3': 3000.0}
        """
        table = self.summary()
        mine = table[(table["lineage"] == name) & (table["lineage"] != "")].drop_duplicates("model").sort_values("step")
        if mine.empty:
            known = ", ".join(sorted({each for each in table["lineage"] if each})) or "none"
            raise HeadgramError(f"{self.results} holds no lineage '{name}'; there are: {known}")
        return dict(zip(mine["model"], mine["step"], strict=True))

    def stacks(self, model: str, circuit: str = "qk") -> list[str]:
        """Names of a model's stacks of which a circuit was measured, in its order.

        Returns
        -------
        list of str
            Such as `self`, or `encoder`, `decoder` and `cross`.

        Raises
        ------
        HeadgramError
            If the model or the circuit was not measured.

        Examples
        --------
        >>> headgram.open_atlas("results").stacks("smollm2-135m-instruct")
        ['self']
        """
        self._require(model)
        table = self.table("models", model)
        if circuit not in (circuits := list(dict.fromkeys(table["circuit"]))):
            more = "; the options weights.norm and rotary.offsets ask for more" if is_made(circuit) else ""
            raise HeadgramError(f"the circuit '{circuit}' of '{model}' was not measured; there are: {', '.join(circuits)}{more}")
        stacks = list(table[table["circuit"] == circuit]["stack"])
        if len(stacks) > len(set(stacks)):
            raise HeadgramError(f"the table `models` of '{model}' names a stack twice: {MENDING}")
        return stacks

    def circuits(self, model: str) -> list[str]:
        """The circuits that were measured of a model: `qk`, `ov`, and forms that are made of them, such as `qk-folded`.

        Returns
        -------
        list of str
            In the order of the options.

        Raises
        ------
        HeadgramError
            If the model was not measured.

        Examples
        --------
        >>> headgram.open_atlas("results").circuits("smollm2-135m-instruct")
        ['qk', 'ov']
        """
        self._require(model)
        return list(dict.fromkeys(self.table("models", model)["circuit"]))

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
        >>> atlas = headgram.open_atlas("results")
        >>> found = atlas.tokens("smollm2-135m-instruct", layer=26, head=2, circuit="ov")
        >>> found.loc["right", 0, -1].str.strip().tolist()
        ['themselves', 'their', 'their', 'Their', 'Their']
        """
        rows = self.of_heads("tokens", model, stack, circuit)
        rows = rows[(rows["layer"] == layer) & (rows["head"] == head)]
        if rows.empty:
            place = f"layer {layer}, head {head} of the stack '{stack}', circuit '{circuit}'"
            raise HeadgramError(
                f"'{model}' has no tokens of {place}: they need the option tokens.enabled, a "
                "stack that tokens enter, and a measured head whose form is not zero"
            )
        named = rows["text"].where(rows["text"] != "", "#" + rows["token"].astype(str))
        return rows.assign(text=named).pivot(index=["side", "direction", "sign"], columns="place", values="text")

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

        Returns
        -------
        pandas.DataFrame
            Numbered as in the whole table.

        Raises
        ------
        HeadgramError
            If the model, the stack or the circuit was not measured.

        Examples
        --------
        >>> atlas = headgram.open_atlas("results")
        >>> len(atlas.of_heads("layers", "smollm2-135m-instruct", "self", "ov"))
        30
        """
        table = self.table(name, model)
        if stack not in (stacks := self.stacks(model, circuit)):
            raise HeadgramError(f"the model '{model}' has no stack '{stack}'; there are: {', '.join(stacks)}")
        return table[(table["circuit"] == circuit) & (table["stack"] == stack)]

    def _require(self, model: str) -> None:
        if model not in self.models:
            raise HeadgramError(f"the model '{model}' is not in {self.results}; there are: {', '.join(self.models)}")


def _either(values: list[Any]) -> str:
    """What a filter asks for, as people write it: `--where` gives a number also as its text."""
    return " or ".join(dict.fromkeys(f"{value:g}" if isinstance(value, float) else str(value) for value in values))
