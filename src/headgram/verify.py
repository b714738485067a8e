"""Re-check what a results folder holds: every byte is what was written, and the tables still satisfy their identities."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from headgram.artifacts import damages, read_record
from headgram.errors import HeadgramError
from headgram.tables import HEAD_NUMBERS, QUARTILES, SIDES, TABLES, read_table

#: Where artifacts are, below the results folder; logs and benchmarks are nobody's results.
_FOLDERS = ("atlas", "models", "provenance", "seed")
#: What held when it was written still holds, up to the rounding of forms that are much smaller than their weights.
_TOLERANCE = 1e-6
#: Directions are kept in float32.
_OVERLAP_TOLERANCE = 1e-5


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
            if find := _IDENTITIES.get(content["stage"]):
                problems += [f"{record}: {problem}" for problem in find({path.stem: path for path in files})]
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
    if path.stem in TABLES and not schema.equals(TABLES[path.stem]):
        yield f"its columns are not those of the {path.stem} table"


def _identity_problems(files: dict[str, Path]) -> Iterator[str]:
    """The identities between the merged tables of one model; each difference is relative to the sizes that enter it."""
    heads, spectra, gram = (read_table(files[name]).to_pandas() for name in ("heads", "spectra", "gram"))
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


def _derived_problems(files: dict[str, Path]) -> Iterator[str]:
    """What the derived tables of one model say against each other, and against the merged table that they summarise."""
    layers, models, overlap = (read_table(files[name]).to_pandas() for name in ("layers", "models", "overlap"))
    model = files["layers"].parent.name
    try:
        heads = read_table(files["layers"].parents[2] / "heads" / model / "heads.parquet").to_pandas()
    except OSError:
        return  # its own record says so
    summaries = layers.set_index(["stack", "layer"]).sort_index()
    for name in HEAD_NUMBERS:
        size = heads[name].abs().max() or 1.0
        for label, share in QUARTILES.items():
            quartile = heads.groupby(["stack", "layer"])[name].quantile(share)
            yield from _exceptions(f"{name}_{label}", (summaries[f"{name}_{label}"] - quartile) / size)
        medians = models.set_index("stack")[f"{name}_median"] - heads.groupby("stack")[name].median()
        yield from _exceptions(f"{name}_median of the model", medians / size)
    for side in SIDES:
        if not overlap[side].between(0, 1 + _OVERLAP_TOLERANCE).all():
            yield f"an overlap of {side} directions lies outside [0, 1]"


def _exceptions(name: str, difference: pd.Series) -> Iterator[str]:
    worst = difference.abs()
    if worst.isna().any():
        yield f"{name} cannot be formed for every head: rows are missing"
    elif (worst > _TOLERANCE).any():
        yield f"{name} fails by {worst.max():.1e} at {', '.join(map(str, worst.index.names))} {worst.idxmax()}"


#: By stage: what must hold among the tables of one artifact, given as name -> path.
_IDENTITIES = {"merge": _identity_problems, "derive": _derived_problems}
