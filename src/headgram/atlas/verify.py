"""Re-check what a results folder holds: every byte is what was written, and the tables still satisfy their identities."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from headgram.errors import HeadgramError
from headgram.forms.variants import Variant
from headgram.results.asked import asked_for
from headgram.results.claims import Claims, claimed, is_ours
from headgram.results.files import MENDING, everything_in, is_folder, link_message
from headgram.results.paths import FOLDERS, RECORDS
from headgram.results.record import DescribedRecipe, Record, damages, read_record, record_of
from headgram.results.tables import QUARTILES, SIDES, SUMMARISED, TABLES, read_parts, read_table
from headgram.study.lock import Lock

#: Snakemake's, in folders that are a job's output; empty.
_FOLDER_DATE = ".snakemake_timestamp"
#: What held when it was written still holds, up to the rounding of forms that are much smaller than their weights.
_TOLERANCE = 1e-6
#: Directions are kept in float32.
_OVERLAP_TOLERANCE = 1e-5
_PLACE = ["circuit", "stack"]
_HEAD = [*_PLACE, "layer", "head"]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong in a results folder.

    Attributes
    ----------
    sentence
        What, and where.
    path
        The record of the artifact that has to be made anew, or the file that belongs to none; None if neither mends it.
    mended_by
        `anew`: the artifact has to be made anew. `removal`: the file is headgram's, and may go. `run`: the next run does by
        itself. `you`: nobody else can.
    """

    sentence: str
    path: Path | None
    mended_by: Literal["anew", "removal", "run", "you"]


def verify(results: Path, lock: Lock | None = None, keys: Mapping[str, str] | None = None) -> tuple[int, list[Finding]]:
    """Check every artifact of a results folder: that it is of the locked checkpoint, and what is asked for.

    Whatever the files hold, this goes on to the end.

    Parameters
    ----------
    results
        The folder.
    lock
        Says which checkpoints are meant.
    keys
        What is asked for, by record; what the latest run asked for if not given.

    Returns
    -------
    (int, list of Finding)
        How many files there are, and what is wrong.

    Raises
    ------
    HeadgramError
        If there is nothing to check.
    """
    folders = [results / folder for folder in FOLDERS]
    inside = [path for folder in folders for path in everything_in(folder)]
    links = sorted(path for path in inside if path.is_symlink() and os.path.isdir(path))  # noqa: PTH112  (that of Path raises)
    paths = sorted(path for path in inside if path.suffix == ".json" and path.relative_to(results).parts[0] in RECORDS)
    present = {_place(path) for path in inside if not is_folder(path) and path.name != _FOLDER_DATE}
    if not paths and not links and not present:
        raise HeadgramError(f"{results} holds no artifact to verify")
    if keys is None:
        keys = asked_for(results) or {}
    findings = [Finding(link_message(link, results), None, "you") for link in links]
    sealed = {_place(path) for path in links}
    records: dict[Path, Record] = {}
    for path in paths:
        try:
            records[path] = read_record(path)
        except HeadgramError as error:
            if keys and path.relative_to(results).as_posix() not in keys:
                continue  # somebody else's file, or a record that nobody asks for
            findings.append(Finding(str(error), path, "anew"))
        sealed.add(_place(path))
    unreadable: set[str] = set()  # models
    for path, record in records.items():
        if record.key != keys.get(path.relative_to(results).as_posix(), record.key):
            findings.append(Finding(f"{path}: it is not what is asked for now: run again", path, "run"))
        files = [_place(path.parent / name) for name in record.files]
        sealed.update(files)
        damaged = list(_whatever(partial(damages, path, record)))
        found = damaged or [
            f"{file}: {problem}" for file in files for problem in _whatever(partial(_table_problems, file, record))
        ]
        found += [f"{path}: {problem}" for problem in _whatever(partial(_key_problems, record))]
        findings += [Finding(sentence, path, "anew") for sentence in found]
        findings += [Finding(f"{path}: {problem}", path, "run") for problem in _origin_problems(record, lock)]
        if damaged:
            unreadable.add(record.model)
    for path, record in records.items():
        if record.model not in unreadable and (find := _IDENTITIES.get(record.stage)):
            places = (_place(path.parent / name) for name in record.files if name.endswith(".parquet"))
            tables = {file.stem: file for file in places}
            findings += [Finding(f"{path}: {problem}", path, "anew") for problem in _whatever(partial(find, tables))]
    strays = [results / os.path.relpath(path, _place(results)) for path in sorted(present - sealed)]
    for path in sorted({record_of(stray) for stray in strays} - set(paths)):
        if path.relative_to(results).as_posix() in keys:
            findings.append(Finding(f"{path} is missing, though what it describes is there", path, "anew"))
    claims = claimed(results)
    findings += [_stray(path, results, claims) for path in strays]
    return len(present), findings


@contextlib.contextmanager
def blamed_on_damage(results: Path) -> Iterator[None]:
    """Whatever ends a reading of damaged results is said to be the damage; any other error is a fault of headgram, and stays so.

    Raises
    ------
    HeadgramError
        Names the first thing that `verify` finds damaged.
    """
    try:
        yield
    except HeadgramError:
        raise
    except Exception as error:
        damaged: list[Finding] = []
        with contextlib.suppress(HeadgramError):
            damaged = [finding for finding in verify(results)[1] if finding.mended_by == "anew"]  # no stranger's file is to blame
        if not damaged:
            raise
        raise HeadgramError(f"{damaged[0].sentence}; {MENDING}") from error


def _stray(path: Path, results: Path, claims: Claims) -> Finding:
    """What is said of a file that belongs to no finished artifact."""
    if is_ours(path, results, claims):
        return Finding(f"{path} belongs to no finished artifact", path, "removal")
    folder = results / path.relative_to(results).parts[0]
    sentence = f"{path} belongs to no finished artifact, and is nothing that a run wrote: move it out of {folder}, or delete it"
    return Finding(sentence, path, "you")


def _whatever(check: Callable[[], Iterable[str]]) -> Iterator[str]:
    """What a check finds; a check that forged data ends has found that."""
    try:
        yield from check()
    except Exception as error:  # nobody knows what libraries make of forged data
        yield f"it cannot be checked ({type(error).__name__}: {error})"


def _place(path: Path) -> Path:
    """A path without `..`; links are left as they are."""
    return Path(os.path.normpath(path.absolute()))


def _key_problems(record: Record) -> Iterator[str]:
    """Whether the record's key is that of what it says it comes from."""
    stages = [described for circuits in record.stages.values() for described in circuits.values()]
    if any(described.recipe.key != described.key for described in (record, *stages)):
        yield "its key is not that of its stage, configuration, fingerprint, code and inputs"
    if stages and not set(record.upstream) <= {described.key for described in stages}:
        yield "its inputs are not those of the stages that it names"


def _origin_problems(record: Record, lock: Lock | None) -> Iterator[str]:
    """Whether the checkpoint is the locked one."""
    entry = lock.models.get(record.model) if lock else None
    if entry is None:
        return
    locked = entry.fingerprint_of(Variant.of(record.circuit).circuit) if record.circuit else entry.fingerprint
    if locked != record.fingerprint:
        measured = record.fingerprint[:12]
        yield f"it was measured from a checkpoint with fingerprint {measured}, but the lock pins {locked[:12]}: run again"


def _table_problems(path: Path, record: Record) -> Iterator[str]:
    """What a Parquet file says of itself against its record, and its columns against their schema."""
    if path.suffix != ".parquet":
        return
    schema = read_table(path).schema
    said = json.loads((schema.metadata or {}).get(b"headgram", b"null"))
    known = record.model_dump(mode="json", by_alias=True)
    if not isinstance(said, dict) or not DescribedRecipe.model_fields.keys() <= said.keys():
        yield "its metadata does not say where it comes from"
    elif differing := sorted(name for name in said if said[name] != known.get(name)):
        yield f"its metadata and its record name another {', '.join(differing)}"
    if path.stem in TABLES and not schema.equals(TABLES[path.stem]):
        yield f"its columns are not those of the {path.stem} table"


def _identity_problems(files: dict[str, Path]) -> Iterator[str]:
    """The identities between the merged tables of one model; each difference is relative to the sizes that enter it."""
    heads, spectra, gram = (read_table(files[name]).to_pandas() for name in ("heads", "spectra", "gram"))
    squares = spectra.assign(
        energy=spectra["singular_value"] ** 2, power=spectra["symmetric_eigenvalue"] ** 2, trace=spectra["symmetric_eigenvalue"]
    )
    sums = squares.groupby(_HEAD)[["energy", "power", "trace", "eigenvalue_real", "eigenvalue_imaginary"]].sum()
    table = heads.set_index(_HEAD).sort_index()
    diagonal = gram[gram["layer_a"] == gram["layer_b"]].rename(columns={"layer_a": "layer"}).set_index(_HEAD)
    size = table["fro_sq"].clip(lower=np.finfo(float).tiny)
    differences = {
        "sum(s²) = fro_sq": (sums["energy"] - table["fro_sq"]) / size,
        "sum(λ) = trace": (sums["trace"] - table["trace"]) / (table["rank"] * np.sqrt(size)),
        "sum(λ²) = (fro_sq + self_overlap) / 2": (sums["power"] - (table["fro_sq"] + table["self_overlap"]) / 2) / size,
        "gram[a, a] = fro_sq": (diagonal["gram"] - table["fro_sq"]) / size,
        "transposed[a, a] = self_overlap": (diagonal["transposed"] - table["self_overlap"]) / size,
    }
    copies = table["copying"].notna()  # which of all have eigenvalues of their own
    own = (sums["eigenvalue_real"] - table["trace"])[copies] / (table["rank"] * np.sqrt(size))[copies]
    differences["sum(eigenvalues) = trace"] = own + sums["eigenvalue_imaginary"].abs()[copies] / np.sqrt(size)[copies]
    for name, difference in differences.items():
        yield from _exceptions(name, difference)
    if not gram["cosine"].between(-1, 1).all():
        yield "a cosine lies outside [-1, 1]"
    yield from _pair_problems(files["pairs"], gram)


def _pair_problems(path: Path, gram: pd.DataFrame) -> Iterator[str]:
    """Whether cosines of all pairs are cosines, and those of equal indices the ones of the table `gram`."""
    place = ["circuit", "stack", "layer_a", "layer_b", "head"]
    equal = []
    for part in read_parts(path):
        pairs = part.to_pandas()
        if not (pairs["cosine"].between(-1, 1).all() and pairs["transposed"].between(-1, 1).all()):
            yield "a cosine of a pair lies outside [-1, 1]"
        equal.append(pairs[pairs["head_a"] == pairs["head_b"]].rename(columns={"head_a": "head"}))
    others = gram[gram["layer_a"] != gram["layer_b"]].set_index(place).sort_index()
    found = pd.concat(equal).set_index(place).sort_index()
    yield from _exceptions("the cosine of a pair", found["cosine"] - others["cosine"], tolerance=1e-6)


def _derived_problems(files: dict[str, Path]) -> Iterator[str]:
    """What the derived tables of one model say against each other, and against the merged table that they summarise."""
    layers, models, overlap = (read_table(files[name]).to_pandas() for name in ("layers", "models", "overlap"))
    model = files["layers"].parent.name
    try:
        heads = read_table(files["layers"].parents[2] / "heads" / model / "heads.parquet").to_pandas()
    except (OSError, pa.ArrowException):
        return  # its own record says so
    summaries = layers.set_index(["circuit", "stack", "layer"]).sort_index()
    for name in SUMMARISED:
        size = heads[name].abs().max()
        size = size if size > 0 else 1.0
        for label, share in QUARTILES.items():
            quartile = heads.groupby(["circuit", "stack", "layer"])[name].quantile(share)
            yield from _exceptions(f"{name}_{label}", _apart(summaries[f"{name}_{label}"], quartile) / size)
        medians = _apart(models.set_index(_PLACE)[f"{name}_median"], heads.groupby(_PLACE)[name].median())
        yield from _exceptions(f"{name}_median of the model", medians / size)
    for side in SIDES:
        if not overlap[side].between(0, 1 + _OVERLAP_TOLERANCE).all():
            yield f"an overlap of {side} directions lies outside [0, 1]"


def _lineage_problems(files: dict[str, Path]) -> Iterator[str]:
    """What the tables about two models say against each other."""
    drift, changes, matches = (read_table(files[name]).to_pandas() for name in ("drift", "changes", "matches"))
    heads = drift.set_index(_HEAD).sort_index()
    squares = heads[["norm_before", "norm_after", "change_norm"]] ** 2
    size = (squares["norm_before"] + squares["norm_after"]).clip(lower=np.finfo(float).tiny)
    energy = changes.assign(energy=changes["singular_value"] ** 2).groupby(_HEAD)["energy"].sum()
    product = heads["cosine"] * heads["norm_before"] * heads["norm_after"]
    differences = {
        "sum(s²) = change_norm²": (energy - squares["change_norm"]) / size,
        "‖Y - X‖² = ‖X‖² + ‖Y‖² - 2 <X, Y>": (squares["change_norm"] - size + 2 * product) / size,
    }
    for name, difference in differences.items():
        yield from _exceptions(name, difference)
    for ends in (["layer", "head"], ["other_layer", "other_head"]):
        if matches.duplicated(["circuit", "stack", "among", *ends]).any():
            yield "a head is matched twice"


def _composition_problems(files: dict[str, Path]) -> Iterator[str]:
    """Whether scores are scores, and the strongest pairs those that were looked at."""
    pair = ["stack", "kind", "writer", "layer_a", "head_a", "layer_b", "head_b"]
    table, channels = (read_table(files[name]).to_pandas().set_index(pair).sort_index() for name in ("composition", "channels"))
    if not (table["score"].between(0, 1).all() and table["acausal"].between(0, 1).all()):
        yield "a score of composition or its percentile lies outside [0, 1]"
    stack, writer, layer_a, layer_b = (table.index.get_level_values(name) for name in ("stack", "writer", "layer_a", "layer_b"))
    if ((stack == writer) & (layer_a >= layer_b)).any():
        yield "a composition is not of an earlier with a later layer"
    yield from _exceptions("the score of a channel", channels["score"] - table["score"].reindex(channels.index), tolerance=0)
    for place, rows in channels.groupby(["stack", "kind"]):
        highest = table["score"].loc[place].nlargest(len(rows))
        if (rows["score"].nlargest(len(rows)).to_numpy() != highest.to_numpy()).any():
            yield f"the channels of {' '.join(place)} are not those of its highest scores"
    for part in read_parts(files["kernels"]):
        kernel = part["kernel"].to_numpy()
        if len(kernel) and not (kernel.min() >= 0 and np.isfinite(kernel).all()):
            yield "a projection kernel is negative or no number"


def _apart(one: pd.Series, other: pd.Series) -> pd.Series:
    """Differences; none where both are empty."""
    difference = one - other
    both = one.reindex(difference.index).isna() & other.reindex(difference.index).isna()
    return difference.mask(both, 0.0)


def _exceptions(name: str, difference: pd.Series, tolerance: float = _TOLERANCE) -> Iterator[str]:
    worst = difference.abs()
    if worst.isna().any():
        yield f"{name} cannot be formed for every head: rows are missing"
    elif (worst > tolerance).any():
        yield f"{name} fails by {worst.max():.1e} at {', '.join(map(str, worst.index.names))} {worst.idxmax()}"


#: By stage: what must hold among the tables of one artifact, given as name -> path.
_IDENTITIES = {
    "merge": _identity_problems,
    "derive": _derived_problems,
    "lineage": _lineage_problems,
    "composition": _composition_problems,
}
