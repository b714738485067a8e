"""Re-check what a results folder holds: every byte is what was written, and the tables still satisfy their identities."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from headgram.artifacts import damages, read_record
from headgram.errors import HeadgramError
from headgram.tables import GRAM, HEADS, SPECTRA, read_table

#: Where artifacts are, below the results folder; logs and benchmarks are nobody's results.
_FOLDERS = ("atlas", "models", "provenance", "seed")
_SCHEMAS = {"heads.parquet": HEADS, "spectra.parquet": SPECTRA, "gram.parquet": GRAM}
#: What held when it was written still holds, up to the rounding of forms that are much smaller than their weights.
_TOLERANCE = 1e-6


def verify(results: Path) -> tuple[int, list[str]]:
    """Check every artifact of a results folder.

    Returns
    -------
    (int, list of str)
        How many files there are, and a sentence about each thing that is wrong.

    Raises
    ------
    HeadgramError
        If there is nothing to check.
    """
    records = sorted(path for folder in ("models", "provenance") for path in (results / folder).rglob("*.json"))
    if not records:
        raise HeadgramError(f"{results} holds no artifact to verify")
    present = {path.resolve() for folder in _FOLDERS for path in (results / folder).rglob("*") if path.is_file()}
    sealed = {record.resolve() for record in records}
    problems = []
    for record in records:
        try:
            content = read_record(record)
            files = {(record.parent / name).resolve() for name in content["files"]}
            sealed |= files
            problems += [f"{damage}: delete {record} and run again" for damage in damages(record, content)]
            problems += [f"{path}: {problem}" for path in sorted(files) for problem in _table_problems(path, content["key"])]
            if content["stage"] == "merge":
                problems += [f"{record}: {problem}" for problem in _identity_problems({path.name: path for path in files})]
        except HeadgramError as error:
            problems.append(str(error))
    problems += [f"{path} belongs to no finished artifact" for path in sorted(present - sealed)]
    return len(present), problems


def _table_problems(path: Path, key: str) -> Iterator[str]:
    """What a Parquet file says of itself against its record, and its columns against their schema."""
    if path.suffix != ".parquet":
        return
    schema = read_table(path).schema
    if json.loads(schema.metadata[b"headgram"])["key"] != key:
        yield "its metadata name another artifact than its record"
    if path.name in _SCHEMAS and not schema.equals(_SCHEMAS[path.name]):
        yield f"its columns are not those of the {path.stem} table"


def _identity_problems(files: dict[str, Path]) -> Iterator[str]:
    """The identities between the tables of one model; each difference is relative to the sizes that enter it."""
    heads, spectra, gram = (read_table(files[name]).to_pandas() for name in _SCHEMAS)
    place = ["stack", "layer", "head"]
    squares = spectra.assign(
        energy=spectra["singular_value"] ** 2, power=spectra["symmetric_eigenvalue"] ** 2, trace=spectra["symmetric_eigenvalue"]
    )
    sums = squares.groupby(place)[["energy", "power", "trace"]].sum()
    table = heads.set_index(place).sort_index()
    diagonal = gram[gram["layer_a"] == gram["layer_b"]].rename(columns={"layer_a": "layer"}).set_index(place)["gram"]
    size = table["fro_sq"].clip(lower=np.finfo(float).tiny)
    differences = {
        "sum(s²) = fro_sq": (sums["energy"] - table["fro_sq"]) / size,
        "sum(λ) = trace": (sums["trace"] - table["trace"]) / (table["rank"] * np.sqrt(size)),
        "sum(λ²) = (fro_sq + self_overlap) / 2": (sums["power"] - (table["fro_sq"] + table["self_overlap"]) / 2) / size,
        "gram[a, a] = fro_sq": (diagonal - table["fro_sq"]) / size,
    }
    for name, difference in differences.items():
        yield from _exceptions(name, difference)
    if not gram["cosine"].between(-1, 1).all():
        yield "a cosine lies outside [-1, 1]"


def _exceptions(name: str, difference: pd.Series) -> Iterator[str]:
    worst = difference.abs()
    if worst.isna().any():
        yield f"{name} cannot be formed for every head: rows are missing"
    elif (worst > _TOLERANCE).any():
        yield f"{name} fails by {worst.max():.1e} at stack, layer, head {worst.idxmax()}"
