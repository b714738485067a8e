"""The atlas of one model as arrays: what the page and the figures draw.

Every array is regular: layers, heads, and for pairs of layers the upper triangle with its diagonal, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from headgram.forms.variants import Variant
from headgram.geometry.ratios import cosines
from headgram.report.columns import columns
from headgram.report.matrix import Across, Feeding, PairMatrix, read_across, read_feeding, read_matrix
from headgram.report.names import TABLES
from headgram.report.positions import Positions, read_positions
from headgram.report.tokens import HeadTokens, read_tokens
from headgram.results.paths import Place
from headgram.results.tables import QUARTILES, SIDES, of_place, read_table

#: How the forms of two layers are compared; SIDES are those of their directions.
FORMS = {
    "cosine": "g (cosine)",
    "transposed": "g with the transpose of g",
    "symmetric": "symmetric parts",
    "antisymmetric": "antisymmetric parts",
}
_PAIRS = ["layer_a", "layer_b", "head"]


@dataclass(frozen=True)
class StackSummary:
    """What is known of a circuit of every stack, of all models at once: `L` layers, `C` columns of `heads`.

    Attributes
    ----------
    facts
        The stack's row of `models`.
    layers : (L,)
        True indices.
    quartiles : (3, C, L)
        Lower quartile, median and upper quartile of each column over heads, in the order of `columns()`.
    """

    facts: dict[str, Any]
    layers: np.ndarray
    quartiles: np.ndarray


@dataclass(frozen=True)
class StackArrays:
    """One circuit of a stack of a model: `L` layers, `H` heads, `P = L (L + 1) / 2` pairs of layers.

    Attributes
    ----------
    heads : (C, L, H)
        Columns of `heads`, in the order of `columns()`.
    singular : (L, H, r), eigenvalues : (L, H, 2r)
        The latter from the largest to the smallest.
    pairs : by name of FORMS and SIDES, (P, H)
        Cosines of the forms, with the transpose, and of their symmetric and antisymmetric parts; overlaps of spans.
    neighbours : by measure, (3, L, H, n)
        Layer, head and value of the nearest heads.
    matrix
        All heads with all heads; None where only heads of the same index were multiplied.
    expected : (C, L)
        What chance gives of each column; NaN where no column says it.
    tokens
        What directions read and write, in words; where embeddings were read.
    feeding
        Which heads write for which, where compositions were measured; of each stack's first form of `qk` alone, as what follows.
    across
        Which heads of another stack do: of an encoder for cross-attention.
    positions
        How forms of `qk` turn with the offset, by what is done with norms, where positions turn them.
    """

    summary: StackSummary
    heads: np.ndarray
    singular: np.ndarray
    eigenvalues: np.ndarray
    pairs: dict[str, np.ndarray]
    neighbours: dict[str, np.ndarray]
    matrix: PairMatrix | None
    expected: np.ndarray
    feeding: Feeding | None = None
    across: Across | None = None
    positions: Mapping[str, Positions] = field(default_factory=dict)
    tokens: HeadTokens | None = None

    def mean_square(self, name: str) -> np.ndarray:
        """Mean over heads of one of `pairs`, (L, L)."""
        a, b = np.triu_indices(len(self.summary.layers))
        square = np.zeros((len(self.summary.layers), len(self.summary.layers)))
        square[a, b] = square[b, a] = self.pairs[name].mean(1)
        return square


def read_model(paths: Mapping[str, Path]) -> dict[str, StackArrays]:
    """One model's tables, given by name, as arrays, by `{circuit}/{stack}` in its order; those of `RENDERED` may be missing."""
    tables = {name: read_table(paths[name]) for name in TABLES if name != "pairs"}
    places = _places(tables["models"])
    first = {stack: circuit for circuit, stack in reversed(places) if Variant.of(circuit).circuit == "qk"}
    across = _across(paths["composition"], tables["heads"]) if "composition" in paths else {}
    return {
        "/".join(place): _stack(
            place,
            {name: of_place(place, table).to_pandas() for name, table in tables.items()},
            paths,
            across=across,
            is_first=first.get(place[1]) == place[0],
        )
        for place in places
    }


def read_summaries(paths: Mapping[str, Path]) -> dict[str, StackSummary]:
    """What the tables `models` and `layers` of a model, given by name, say of it, by `{circuit}/{stack}` in the model's order."""
    tables = {name: read_table(paths[name]) for name in ("models", "layers")}
    return {
        "/".join(place): _summary(*(of_place(place, table).to_pandas() for table in tables.values()))
        for place in _places(tables["models"])
    }


def _places(models: pa.Table) -> list[Place]:
    return list(dict.fromkeys(zip(*(models[name].to_pylist() for name in ("circuit", "stack")), strict=True)))


def _summary(models: pd.DataFrame, layers: pd.DataFrame) -> StackSummary:
    by_layer = layers.sort_values("layer")
    return StackSummary(
        facts=_plain(models.iloc[0]),
        layers=by_layer["layer"].to_numpy(),
        quartiles=np.stack([[by_layer[f"{column.name}_{each}"] for column in columns()] for each in QUARTILES]),
    )


def _across(path: Path, heads: pa.Table) -> dict[str, Across]:
    """By stack, what it has to do with another one."""
    shapes = {
        str(stack): (np.unique(rows["layer"]), rows["head"].nunique()) for stack, rows in heads.to_pandas().groupby("stack")
    }
    found = {stack: read_across(path, stack, shapes) for stack in shapes}
    return {stack: across for stack, across in found.items() if across}


def _stack(
    place: Place,
    tables: Mapping[str, pd.DataFrame],
    paths: Mapping[str, Path],
    across: Mapping[str, Across],
    is_first: bool,
) -> StackArrays:
    heads = tables["heads"].sort_values(["layer", "head"])
    layers = np.unique(heads["layer"])
    shape = (len(layers), heads["head"].nunique(), -1)
    names = [column.name for column in columns()]
    gram, overlap = (tables[name].sort_values(_PAIRS) for name in ("gram", "overlap"))
    spectra = tables["spectra"].sort_values(["layer", "head", "index"])
    singular, symmetric = (spectra[name].to_numpy().reshape(shape) for name in ("singular_value", "symmetric_eigenvalue"))
    itself = {"cosine": (heads["fro_sq"] > 0).to_numpy(float), "transposed": heads["symmetry_score"].to_numpy()}
    return StackArrays(
        summary=_summary(tables["models"], tables["layers"]),
        heads=np.stack([heads[name].to_numpy().reshape(shape[:2]) for name in names]),
        singular=singular[..., : int(heads["rank"].iloc[0])],
        eigenvalues=-np.sort(-symmetric, axis=-1),
        pairs=_cosines(gram, layers, shape[1]) | {side: overlap[side].to_numpy().reshape(-1, shape[1]) for side in SIDES},
        neighbours=_neighbours(tables["neighbours"], shape),
        matrix=read_matrix(paths["pairs"], place, layers, {name: value.reshape(shape[:2]) for name, value in itself.items()}),
        expected=np.stack([_expected(heads, name, shape[:2]) for name in names]),
        feeding=read_feeding(paths["composition"], place[1], layers, shape[1]) if is_first and "composition" in paths else None,
        across=across.get(place[1]) if is_first else None,
        positions=read_positions(paths, place[1], layers, shape[1]) if is_first and "rotary" in paths else {},
        tokens=read_tokens(paths["tokens"], place, layers, shape[1]) if "tokens" in paths else None,
    )


def _expected(heads: pd.DataFrame, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What a column's neighbour says that chance gives, which is the same for all heads of a layer, (L,)."""
    beside = f"{name}_expected"
    if beside not in heads:
        return np.full(shape[0], np.nan)
    values: np.ndarray = heads[beside].to_numpy().reshape(shape)[:, 0]
    return values


def _plain(row: pd.Series) -> dict[str, Any]:
    """A row in JSON's terms, without what is not known."""
    return {str(name): value.item() if isinstance(value, np.generic) else value for name, value in row.dropna().items()}


def _cosines(gram: pd.DataFrame, layers: np.ndarray, heads: int) -> dict[str, np.ndarray]:
    """Inner products over the norms of what is multiplied; 0 where one of the norms is 0."""
    a, b = (np.searchsorted(layers, gram[name].to_numpy().reshape(-1, heads)[:, 0]) for name in ("layer_a", "layer_b"))
    table = {
        name: gram[name].to_numpy().reshape(-1, heads) for name in ("gram", "cosine", "transposed", "symmetric", "antisymmetric")
    }

    def normed(name: str, squares: str) -> np.ndarray:
        norms = np.sqrt(table[squares][a == b].clip(0))
        return cosines(table[name], norms[a], norms[b])

    return {
        "cosine": table["cosine"],
        "transposed": normed("transposed", "gram"),
        "symmetric": normed("symmetric", "symmetric"),
        "antisymmetric": normed("antisymmetric", "antisymmetric"),
    }


def _neighbours(table: pd.DataFrame, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    found = {}
    for measure, rows in table.sort_values(["layer", "head", "place"]).groupby("measure"):
        found[str(measure)] = np.stack([rows[name].to_numpy().reshape(shape) for name in ("other_layer", "other_head", "value")])
    return found
