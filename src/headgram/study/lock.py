"""The lock: what every manifest row resolved to, pinned.

`models.lock.json` lies beside its manifest. It holds sizes, samples and digests of the content, so that a study can be
re-run to the byte, the whole plan is known before anything runs, and a checkpoint that changed is noticed. Reading and
checking a lock needs no torch; only `headgram.study.resolve` opens checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import filelock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headgram.checkpoints.sources import HUB_DIGEST, Location, locate_here
from headgram.errors import HeadgramError
from headgram.results.files import remove_temporaries, temporaries_in, write_text
from headgram.results.record import canonical, digest
from headgram.study.manifest import Row

if TYPE_CHECKING:
    from headgram.checkpoints.hub import RemoteLocation


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Count = Annotated[int, Field(ge=1)]
#: What all circuits of a stack have in common.
_SHAPE = {"layers", "heads", "kv_heads", "hidden"}
#: Raised when the lock's layout changes.
_VERSION = 2


class LockedFile(_Entry):
    """A weight or configuration file: its name below the source's folder, its size, and a digest of a sample of it.

    For a file at the hub, the sample is `hub:` and the hub's own hash of the file.
    """

    name: str
    bytes: int
    sample: str

    def agrees_with(self, other: LockedFile) -> bool:
        """Whether both may be the same file; a hub's hash and a sample cannot be compared, so there the commit is trusted."""
        comparable = self.sample.startswith(HUB_DIGEST) == other.sample.startswith(HUB_DIGEST)
        return (self.name, self.bytes) == (other.name, other.bytes) and (self.sample == other.sample or not comparable)


class LockedCircuit(_Entry):
    """The two factors of a circuit in one stack: their rows, how they are stored, and `Checkpoint.digest` of every layer."""

    rank: _Count
    dtype: str
    bytes: int
    digests: tuple[str, ...]


class LockedStack(_Entry):
    """A stack, as `headgram.Stack`, with the circuits that can be measured, and why others cannot."""

    name: str
    layers: tuple[int, ...]
    heads: _Count
    kv_heads: _Count
    hidden: _Count
    circuits: dict[str, LockedCircuit]
    missing: dict[str, str] = {}


class LockedModel(_Entry):
    """What one manifest row resolved to."""

    source: str
    revision: str | None
    overrides: dict[str, str | int]
    commit: str | None
    format: str
    architecture: str  # a known type; if `derived`, one whose layout was proven for the checkpoint's own type
    derived: bool = False
    files: tuple[LockedFile, ...]
    stacks: tuple[LockedStack, ...]
    fingerprint: str

    def fingerprint_of(self, circuit: str) -> str:
        """A digest of what the factors of one circuit are: another circuit's do not count."""
        shown = {"stacks": {stack.name: stack.model_dump(mode="json", include=_SHAPE) for stack in self.stacks}}
        factors = {
            stack.name: stack.circuits[circuit].model_dump(mode="json") for stack in self.stacks if circuit in stack.circuits
        }
        given = {"architecture": self.architecture, "overrides": self.overrides, "circuit": circuit}
        return digest(canonical({**given, **shown, "factors": factors}))

    def how_to_open(self) -> dict[str, Any]:
        """The arguments of `open_checkpoint` that give what was locked."""
        derived: dict[str, str | int] = {"model_type": self.architecture} if self.derived else {}
        return {"source": self.source, "revision": self.commit, "overrides": self.overrides | derived}

    def asks_for(self, row: Row) -> bool:
        """Whether this entry resolves exactly what the row says."""
        return (self.source, self.revision, self.overrides) == (row.source, row.revision, row.overrides)


class Lock(_Entry):
    """All entries, by model name."""

    schema_version: int = _VERSION
    models: dict[str, LockedModel] = {}


def lock_path(manifest: Path) -> Path:
    """The lock beside a manifest: `models.tsv` has `models.lock.json`."""
    return manifest.with_suffix(".lock.json")


def read_lock(path: Path) -> Lock:
    """Read a lock; an absent one is empty.

    Raises
    ------
    HeadgramError
        If the file is damaged or of another version.
    """
    if not path.exists():
        return Lock()
    try:
        content = json.loads(path.read_bytes())
        version = content.get("schema_version") if isinstance(content, dict) else None
        if isinstance(version, int) and version != _VERSION:
            raise HeadgramError(
                f"The lock {path} has version {version}, but this headgram writes version {_VERSION}: delete it and lock again."
            )
        return Lock.model_validate(content)
    except (ValidationError, ValueError, RecursionError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise HeadgramError(f"The lock {path} cannot be read ({reason}): delete it, and `headgram lock` makes it anew.") from None


def write_lock(path: Path, entries: dict[str, LockedModel]) -> None:
    """Add entries to the lock on disk, which another process may have changed meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _held(path):
        remove_temporaries([path])
        models = {**read_lock(path).models, **entries}
        content = Lock(models=dict(sorted(models.items()))).model_dump(mode="json")
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def remove_temporaries_of(path: Path) -> None:
    """Remove what a killed process left half-written of a lock."""
    if temporaries_in(path.parent, [path.name]):
        with _held(path):
            remove_temporaries([path])


def _held(path: Path) -> filelock.BaseFileLock:
    """Only one process at a time changes a lock."""
    return filelock.FileLock(path.with_name(f".{path.name}.lock"))


def missing_rows(rows: Iterable[Row], lock: Lock) -> list[Row]:
    """The rows that the lock does not hold as they stand."""
    return [row for row in rows if row.name not in lock.models or not lock.models[row.name].asks_for(row)]


def locked_file(location: Location | RemoteLocation, name: str) -> LockedFile:
    """What the lock says of a file of a source."""
    return LockedFile(name=name, bytes=location.size(name), sample=location.sample(name))


def changes(name: str, entry: LockedModel) -> list[str]:
    """A sentence if the content of a source is not what was locked, that says how to go on; else nothing.

    A source that is gone is not reported: what was measured of it stands, and a job that still needs it says so. The hub is
    not asked: there, a commit names its content.
    """
    try:
        location = locate_here(entry.source, entry.commit)
        changed = [file.name for file in entry.files if not file.agrees_with(locked_file(location, file.name))]
    except (HeadgramError, OSError):
        return []
    return [changed_message(name, f"{file} of {entry.source}") for file in changed[:1]]


def file_times(entry: LockedModel) -> dict[str, tuple[int, int]]:
    """Size and time of change of a source's files, by name; empty if the source is gone."""
    try:
        location = locate_here(entry.source, entry.commit)
        return {file.name: location.state(file.name) for file in entry.files}
    except (HeadgramError, OSError):
        return {}


def changed_message(name: str, what: str) -> str:
    """The sentence about a source that changed under its lock."""
    return (
        f"{name}: {what} changed since it was locked; if that is meant, run `headgram lock --upgrade {name}` "
        "and measure it anew, else restore it"
    )
