"""Artifacts: what a job writes, with its provenance, checked when it is read.

A job's files are an *artifact*: one or more data files and a provenance record, `NAME.json`, which is written last. The
record holds the artifact's key and the checksum of every data file. The key is a digest of all that the content follows
from: the stage's configuration, the model's fingerprint, the stage's code, and the keys of the stage's inputs. An
artifact is fresh if its key is the one that the plan asks for, whatever Snakemake remembers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import resource
import stat
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from headgram.errors import HeadgramError
from headgram.foreign import first_problem, parse_json, read_bounded
from headgram.results.asked import still_asked_for
from headgram.results.files import checksum, is_file_name, refuse_links, write_text
from headgram.version import __version__

#: Raised when the meaning or the layout of a file changes.
SCHEMA = 1
#: The record of a report of thousands of models is smaller.
_LARGEST = 64 * 2**20
#: In the environment of jobs of `headgram run`: the file whose presence says that something damaged lost its record.
DAMAGE = "HEADGRAM_DAMAGE"
_LIBRARIES = ("torch", "numpy", "scipy", "pandas", "pyarrow", "safetensors", "gguf")


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(*parts: str) -> str:
    """BLAKE2b of some texts, as 32 hexadecimal digits; the order and the borders of the parts count."""
    return hashlib.blake2b(canonical(parts).encode(), digest_size=16).hexdigest()


def _is_relative(name: str) -> str:
    if not is_file_name(name):
        raise ValueError("a file name relative to the record is needed")
    return name


@dataclass(frozen=True)
class Recipe:
    """All that an artifact's content follows from. Its digest is the key of the artifact.

    Attributes
    ----------
    stage
        `extract`, `eigen`, `gram`, `merge`, `derive`, `composition`, `tokens` or `report`.
    config
        Canonical JSON of exactly the options that the stage reads.
    fingerprint
        The model's, from the lock; a report's names all of its models.
    code
        Digest of the stage's own modules, and of what else a job is told: names of tensors, labels.
    upstream
        Keys of the artifacts that the stage reads.
    """

    stage: str
    config: str
    fingerprint: str
    code: str
    upstream: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        return digest(str(SCHEMA), self.stage, self.config, self.fingerprint, self.code, *self.upstream)

    def described(self) -> dict[str, Any]:
        """As JSON, with the key."""
        return {
            "key": self.key,
            "stage": self.stage,
            "config": json.loads(self.config),
            "fingerprint": self.fingerprint,
            "code": self.code,
            "upstream": list(self.upstream),
        }

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> Recipe:
        """The recipe that `described` gave."""
        return DescribedRecipe.model_validate(described).recipe


class _Foreign(BaseModel):
    """A part of a record, which anybody may have written."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class DescribedRecipe(_Foreign):
    """A `Recipe` as a record spells it out, and the key that it claims."""

    key: str
    stage: str
    config: dict[str, Any]
    fingerprint: str
    code: str
    upstream: list[str]

    @property
    def recipe(self) -> Recipe:
        """The recipe itself."""
        return Recipe(self.stage, canonical(self.config), self.fingerprint, self.code, tuple(self.upstream))


class FileSum(_Foreign):
    """What a record says of a data file."""

    bytes: Annotated[int, Field(ge=0, lt=2**63)]
    blake2b: str


class Record(DescribedRecipe):
    """A provenance record. What only people read of it, such as versions and times, is kept as it is."""

    version: Literal[SCHEMA] = Field(alias="schema")  # type: ignore[valid-type]
    model: str
    stack: str | None
    circuit: str | None
    device: str
    machine: str
    seconds: float
    residual: float | None
    files: dict[Annotated[str, AfterValidator(_is_relative)], FileSum]
    stages: dict[str, dict[str, DescribedRecipe]] = {}  # by stage and circuit, what the keys of a merged model's parts mean


@dataclass(frozen=True)
class Provenance:
    """Where an artifact comes from; the record beside its data files."""

    recipe: Recipe
    model: str  # empty for a report, which shows all
    stack: str | None
    circuit: str | None = None
    device: str = "cpu"
    precision: str = "float64"  # of the arithmetic
    residual: float | None = None  # the largest residual of the identities, where any are checked
    origin: Mapping[str, Any] = field(default_factory=dict)  # what the recipe's digests stand for, spelled out
    started: float = field(default_factory=time.time, compare=False)
    spent: float = field(default_factory=time.process_time, compare=False)  # seconds of all cores, by this process before

    def metadata(self) -> dict[str, Any]:
        """What the content depends on: the same for every run that gives the same bytes."""
        return {
            "schema": SCHEMA,
            "headgram": __version__,
            **self.recipe.described(),
            "model": self.model,
            "stack": self.stack,
            "circuit": self.circuit,
            "precision": self.precision,
            "device": self.device,
            "versions": library_versions(),
            **self.origin,
        }


def record_of(path: Path) -> Path:
    """The provenance record of a data file: `layers-000-011.pt` has `layers-000-011.json`."""
    return path.with_suffix(".json")


def seal(record: Path, provenance: Provenance, data: Sequence[Path], measured: Mapping[str, Any] | None = None) -> None:
    """Write the provenance record of finished data files; the last act of a job.

    `measured` is what else this very run found, and another one need not.
    """
    files = {os.path.relpath(path, record.parent): {"bytes": path.stat().st_size, "blake2b": checksum(path)} for path in data}
    content = {
        **provenance.metadata(),
        "residual": provenance.residual,
        "started": datetime.fromtimestamp(provenance.started, UTC).isoformat(timespec="milliseconds"),
        "seconds": round(time.time() - provenance.started, 3),
        "cpu_seconds": round(time.process_time() - provenance.spent, 3),
        "peak_mib": _peak_mib(),
        "machine": platform.platform(),
        **(measured or {}),
        **_whereabouts(),
        "files": files,
    }
    write_text(record, _sealed_text(content))


def _peak_mib() -> int:
    """The most memory that this process has held."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest >> 20 if sys.platform == "darwin" else largest >> 10  # in bytes there, in KiB elsewhere


def _whereabouts() -> dict[str, str | None]:
    """Where a job ran: the host, the GPU that it held, and what Slurm calls it."""
    held = {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "slurm_job": os.environ.get("SLURM_JOB_ID")}
    return {"host": platform.node(), **{name: value or None for name, value in held.items()}}


def _sealed_text(content: Mapping[str, Any]) -> str:
    """A record's text, with a digest of itself."""
    sealed = {**content, "record": digest(canonical(content))}
    return json.dumps(sealed, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@cache
def library_versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that results may depend on; None of what is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def is_fresh(record: Path, key: str) -> bool:
    """Whether an artifact is there, whole in size, and the one that the plan asks for. Never raises; reads no data."""
    try:
        content = read_record(record)
        sizes = {record.parent / name: entry.bytes for name, entry in content.files.items()}
        return content.key == key and all(path.stat().st_size == size for path, size in sizes.items())
    except (HeadgramError, OSError):
        return False


def has_key(record: Path, key: str) -> bool:
    """Whether a record, as a copy without its data files, is whole and the one that the plan asks for. Never raises."""
    try:
        return read_record(record).key == key
    except HeadgramError:
        return False


def read_record(record: Path) -> Record:
    """A provenance record, as it was written.

    Raises
    ------
    HeadgramError
        If it is damaged, too large, or of another schema.
    """
    try:
        written = read_bounded(record, _LARGEST)
        content = parse_json(written)
        if not isinstance(content, dict) or content.pop("record", None) is None or written != _sealed_text(content).encode():
            raise ValueError("it is not what was written")
        return Record.model_validate(content)
    except (OSError, ValueError, RecursionError) as error:
        raise HeadgramError(
            f"The provenance record {record} cannot be read ({first_problem(error)}): run again, which makes it anew."
        ) from None


def files_of(record: Path) -> dict[str, FileSum] | None:
    """What a record says of its data files, by their paths from its folder; None if it cannot be read."""
    with contextlib.suppress(HeadgramError):
        return read_record(record).files
    return None


def check(record: Path, key: str, reads: Collection[Path] | None = None) -> Record:
    """Verify an artifact before its data are read: its key, and the checksum of every file, or of those that are read.

    A damaged artifact loses its record: it is no longer fresh, so that the same command makes it anew.

    Returns
    -------
    Record
        The provenance record.

    Raises
    ------
    HeadgramError
        Names the file that does not fit, and what to do.
    """
    refuse_links(record)
    content = read_record(record)
    if content.key != key:
        raise HeadgramError(
            f"{record} belongs to another configuration, checkpoint or version than this run's: run again, which makes it anew."
        )
    for damage in damages(record, content, reads):
        with still_asked_for(), contextlib.suppress(OSError):  # else it may be a newer run's by now
            record.unlink()
            if DAMAGE in os.environ:
                Path(os.environ[DAMAGE]).touch()
        raise HeadgramError(f"{damage}; its record was removed, so that the same command makes it anew.")
    return content


def damages(record: Path, content: Record, reads: Collection[Path] | None = None) -> Iterator[str]:
    """What is wrong with the data files of a record, or with some of them, file by file: half a sentence each."""
    for name, entry in content.files.items():
        path = Path(os.path.normpath(record.parent / name))
        if reads is not None and path not in reads:
            continue
        try:
            state = path.stat()
            # Only a file of the right size is opened: a device or a pipe might never end.
            if not stat.S_ISREG(state.st_mode) or state.st_size != entry.bytes:
                yield f"{path} is not what was written: its size differs"
            elif checksum(path) != entry.blake2b:
                yield f"{path} is not what was written: its checksum differs"
        except OSError as error:
            yield f"{path} cannot be read ({error.strerror})"


def parquet_metadata(provenance: Provenance) -> Mapping[bytes, bytes]:
    """What a Parquet file says of itself."""
    return {b"headgram": canonical(provenance.metadata()).encode()}
