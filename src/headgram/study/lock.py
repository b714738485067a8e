"""The lock: what every manifest row resolved to, pinned.

`models.lock.json` lies beside its manifest. It holds sizes, samples and digests of the content, so that a study can be
re-run to the byte, the whole plan is known before anything runs, and a checkpoint that changed is noticed. Reading and
checking a lock needs no torch; only `headgram.study.resolve` opens checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

import filelock
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from headgram.checkpoints.bases import AnyLocation, locate_here
from headgram.checkpoints.sources import HUB_DIGEST
from headgram.errors import MANIFEST, HeadgramError, upgrading
from headgram.families.around import AROUND
from headgram.families.registry import Family
from headgram.foreign import first_problem, parse_json, read_bounded
from headgram.results.files import remove_temporaries, temporaries_in, write_text
from headgram.results.record import canonical, digest
from headgram.study.manifest import MODEL_NAME, OVERRIDE_COLUMNS, Row

#: The lock of thousands of models is smaller.
_LARGEST = 64 * 2**20


class _Locked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _stays_inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError("a file name below the source's folder is needed")
    return name


def _ascend(layers: tuple[int, ...]) -> tuple[int, ...]:
    if any(after <= before for before, after in pairwise(layers)):
        raise ValueError("layers must ascend")
    return layers


#: Wide enough for any model that there is, and narrow enough that a plan of it can be made.
_Count = Annotated[int, Field(ge=1, le=2**24)]
_Bytes = Annotated[int, Field(ge=0, lt=2**63)]
_Text = Annotated[str, Field(min_length=1, max_length=4096)]
_Digest = Annotated[str, Field(min_length=1, max_length=100)]
_Layer = Annotated[int, Field(ge=0, lt=10_000)]
_ModelName = Annotated[str, Field(pattern=f"^{MODEL_NAME.pattern}$")]
_Circuit = Annotated[str, Field(pattern="^(qk|ov)$")]
_Role = Annotated[str, Field(pattern=f"^({'|'.join(AROUND)})$")]
_Override = Annotated[str, Field(pattern=f"^({'|'.join(OVERRIDE_COLUMNS)})$")]
#: What all circuits of a stack have in common.
_SHAPE = {"layers", "heads", "kv_heads", "hidden"}
#: Raised when the lock's layout changes.
_VERSION = 2


class LockedFile(_Locked):
    """A weight or configuration file: its name below the source's folder, its size, and a digest of a sample of it.

    For a file at the hub, the sample is `hub:` and the hub's own hash of the file.
    """

    name: Annotated[_Text, AfterValidator(_stays_inside)]
    bytes: _Bytes
    sample: _Digest

    def agrees_with(self, other: LockedFile) -> bool:
        """Whether both may be the same file; a hub's hash and a sample cannot be compared, so there the commit is trusted."""
        comparable = self.sample.startswith(HUB_DIGEST) == other.sample.startswith(HUB_DIGEST)
        return (self.name, self.bytes) == (other.name, other.bytes) and (self.sample == other.sample or not comparable)


class LockedCircuit(_Locked):
    """The two factors of a circuit in one stack: their rows, how they are stored, and `Checkpoint.digest` of every layer."""

    rank: _Count
    dtype: _Text
    bytes: _Bytes
    digests: tuple[_Digest, ...]


class LockedAround(_Locked):
    """What stands around a stack's projections: `Checkpoint.digest` of every layer's norms and biases, and what is not known.

    What the configuration says of it, such as rotary encoding, the samples of files pin.
    """

    digests: tuple[_Digest, ...]
    turns: bool  # whether positions turn the queries and keys of any layer
    missing: dict[_Role, _Text] = {}


class LockedStack(_Locked):
    """A stack, as `headgram.Stack`, with the circuits that can be measured, and why others cannot."""

    name: Annotated[str, Field(pattern="^[a-z][a-z0-9_-]{0,63}$")]
    layers: Annotated[tuple[_Layer, ...], Field(min_length=1), AfterValidator(_ascend)]
    heads: _Count
    kv_heads: _Count
    hidden: _Count
    circuits: dict[_Circuit, LockedCircuit]
    missing: dict[_Circuit, _Text] = {}
    around: LockedAround | None = None  # None: locked by a headgram that did not pin it

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.kv_heads > self.heads:
            raise ValueError("there are more key heads than heads")
        if self.circuits.keys() ^ self.missing.keys() != {"qk", "ov"}:
            raise ValueError("each circuit must be there, or missing for a reason")
        pinned = [each.digests for each in self.circuits.values()] + ([self.around.digests] if self.around else [])
        if any(len(digests) != len(self.layers) for digests in pinned):
            raise ValueError("every layer needs a digest")
        return self


class LockedModel(_Locked):
    """What one manifest row resolved to."""

    source: _Text
    revision: _Text | None
    overrides: dict[_Override, _Text | _Count]
    commit: Annotated[str, Field(pattern="^[0-9A-Za-z]{1,64}$")] | None
    base: _Text | None = None  # of an adapter: the source of the checkpoint that it changes, with `@` and its commit at the hub
    format: _Text
    architecture: _Text  # a known type; if `derived`, one whose layout was proven for the checkpoint's own type
    derived: bool = False
    family: Family | None = Field(  # the layout that was derived and proven, where it is no known type's
        default=None, exclude_if=lambda family: family is None
    )
    files: tuple[LockedFile, ...]
    stacks: tuple[LockedStack, ...]
    fingerprint: _Digest

    @field_validator("stacks")
    @classmethod
    def _differ(cls, stacks: tuple[LockedStack, ...]) -> tuple[LockedStack, ...]:
        if not stacks or len({stack.name for stack in stacks}) < len(stacks):
            raise ValueError("stacks with names of their own are needed")
        return stacks

    def fingerprint_of(self, circuit: str) -> str:
        """A digest of what the factors of one circuit are: another circuit's do not count."""
        shown = {"stacks": {stack.name: stack.model_dump(mode="json", include=_SHAPE) for stack in self.stacks}}
        factors = {
            stack.name: stack.circuits[circuit].model_dump(mode="json") for stack in self.stacks if circuit in stack.circuits
        }
        given = {"architecture": self.architecture, "overrides": self.overrides, "circuit": circuit}
        return digest(canonical({**given, **shown, "factors": factors}))

    def around_fingerprint(self) -> str:
        """A digest of what stands around the projections: norms and biases, and the files that say the rest."""
        pinned = {stack.name: [stack.layers, stack.around and stack.around.digests] for stack in self.stacks}
        files = [file.model_dump(mode="json") for file in self.files]
        return digest(
            canonical({"architecture": self.architecture, "overrides": self.overrides, "stacks": pinned, "files": files})
        )

    @property
    def pins_around(self) -> bool:
        """Whether what stands around the projections is pinned, of every stack."""
        return all(stack.around is not None for stack in self.stacks)

    def how_to_open(self) -> dict[str, Any]:
        """The arguments of `open_checkpoint` that give what was locked."""
        derived: dict[str, str | int] = {"model_type": self.architecture} if self.derived and not self.family else {}
        based: dict[str, str | int] = {"base": self.base} if self.base else {}
        how = {"source": self.source, "revision": self.commit, "overrides": self.overrides | derived | based}
        return how | ({"family": self.family} if self.family else {})

    def asks_for(self, row: Row) -> bool:
        """Whether this entry resolves exactly what the row says."""
        return (self.source, self.revision, self.overrides) == (row.source, row.revision, row.overrides)


class Lock(_Locked):
    """All entries, by model name."""

    schema_version: int = _VERSION
    models: dict[_ModelName, LockedModel] = {}


def lock_path(manifest: Path) -> Path:
    """The lock beside a manifest: `models.tsv` has `models.lock.json`."""
    return manifest.with_suffix(".lock.json")


def read_lock(path: Path) -> Lock:
    """Read a lock; an absent one is empty.

    Raises
    ------
    HeadgramError
        If the file is damaged, too large, or of another version.
    """
    try:
        text = read_bounded(path, _LARGEST)
        content = parse_json(text)
        version = content.get("schema_version") if isinstance(content, dict) else None
        if isinstance(version, int) and version != _VERSION:
            raise ValueError(f"it has version {version}, but this headgram writes version {_VERSION}")
        return Lock.model_validate_json(text, strict=True)
    except FileNotFoundError:
        return Lock()
    except (ValueError, OSError, RecursionError) as error:
        what = f"The lock {path} cannot be read ({first_problem(error)})"
        raise HeadgramError(f"{what}: delete it, and the next run makes it anew.") from None


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


def locked_file(location: AnyLocation, name: str) -> LockedFile:
    """What the lock says of a file of a source."""
    return LockedFile(name=name, bytes=location.size(name), sample=location.sample(name))


def changes(name: str, entry: LockedModel, manifest: Path = MANIFEST) -> list[str]:
    """A sentence if the content of a source is not what was locked, that says how to go on; else nothing.

    A source that is gone is not reported: what was measured of it stands, and a job that still needs it says so. The hub is
    not asked: there, a commit names its content.
    """
    try:
        location = locate_here(entry.source, entry.commit, entry.base)
        changed = [file.name for file in entry.files if not file.agrees_with(locked_file(location, file.name))]
    except (HeadgramError, OSError):
        return []
    return [changed_message(name, f"{file} of {entry.source}", manifest) for file in changed[:1]]


def file_times(entry: LockedModel) -> dict[str, tuple[int, int]]:
    """Size and time of change of a source's files, by name; empty if the source is gone."""
    try:
        location = locate_here(entry.source, entry.commit, entry.base)
        return {file.name: location.state(file.name) for file in entry.files}
    except (HeadgramError, OSError):
        return {}


def changed_message(name: str, what: str, manifest: Path) -> str:
    """The sentence about a source that changed under its lock."""
    return f"{name}: {what} changed since it was locked; {upgrading(name, manifest)}"
