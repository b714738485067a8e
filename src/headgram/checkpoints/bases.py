"""Sources that only change another checkpoint: an adapter, and the base that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from headgram.checkpoints import sources
from headgram.checkpoints.sources import Location, is_hub_id
from headgram.checkpoints.weight_files import ADAPTER_CONFIG, CONFIG, WeightFiles
from headgram.errors import HeadgramError
from headgram.foreign import plain

if TYPE_CHECKING:
    from headgram.checkpoints.hub import RemoteLocation

#: Begins the names of the base's files, among those of an adapter.
_BASE = "base:"


@dataclass(frozen=True)
class AdaptedLocation:
    """An adapter and its base, each on this machine or at the hub; has what a `Location` has.

    Attributes
    ----------
    adapter, underneath
        Where they are.
    base
        The base as it was resolved: its source and, of a hub id, `@` and the commit.
    """

    adapter: Location | RemoteLocation
    underneath: Location | RemoteLocation
    base: str

    @property
    def choice(self) -> WeightFiles:
        """Files of both; those of the base begin with `base:`."""
        own, other = self.adapter.choice, self.underneath.choice
        return WeightFiles((*own.files, *(_BASE + name for name in other.files)), other.index, own.passed_over, adapter=True)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weight files, in order."""
        return self.choice.files

    @property
    def format(self) -> str:
        """The base's."""
        return self.underneath.format

    @property
    def commit(self) -> str | None:
        """The adapter's; the base's is in `base`."""
        return self.adapter.commit

    @property
    def where(self) -> str:
        """The source in words, for messages."""
        return f"{self.adapter.where} on {self.underneath.where}"

    def config(self, name: str = CONFIG) -> dict[str, Any] | None:
        """A JSON file of the base."""
        return self.underneath.config(name)

    @property
    def described_by(self) -> tuple[str, ...]:
        """What the lock pins beside the weights."""
        return (*self.adapter.described_by, *(_BASE + name for name in self.underneath.described_by))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        location, inner = self._find(name)
        return location.size(inner)

    def state(self, name: str) -> tuple[int, int]:
        """As of a `Location`."""
        location, inner = self._find(name)
        return location.state(inner)

    def sample(self, name: str) -> str:
        """As of a `Location`."""
        location, inner = self._find(name)
        return location.sample(inner)

    def _find(self, name: str) -> tuple[Location | RemoteLocation, str]:
        return (self.underneath, name.removeprefix(_BASE)) if name.startswith(_BASE) else (self.adapter, name)


#: Wherever a source may lie.
AnyLocation: TypeAlias = "Location | RemoteLocation | AdaptedLocation"


def locate_here(source: str, revision: str | None = None, base: str | None = None) -> Location | AdaptedLocation:
    """Find a source on this machine, with the base that it belongs to if it is an adapter; asks no network.

    Raises
    ------
    HeadgramError
        If there is nothing there, or nothing that headgram reads.
    """
    found = with_base(sources.locate_here(source, revision), base, sources.locate_here)
    assert isinstance(found, (Location, AdaptedLocation))
    return found


def with_base(
    location: Location | RemoteLocation, base: str | None, locate: Callable[[str, str | None], Location | RemoteLocation]
) -> AnyLocation:
    """The location itself or, if it is of an adapter, together with the base's.

    Parameters
    ----------
    location
        What a source names.
    base
        The base's source, which may end with `@` and a revision; the one that the adapter's own settings name if None.
    locate
        Finds a source and its revision.

    Raises
    ------
    HeadgramError
        If the base is not named, cannot be found or is an adapter itself, or if one is given for what is no adapter.
    """
    if not location.choice.adapter:
        if base is not None:
            raise HeadgramError(f"`base` is given, but {location.where} is no adapter: it holds weights of its own")
        return location
    source, revision = _named_by(location) if base is None else _with_revision(base)
    try:
        underneath = locate(source, revision)
    except HeadgramError as error:
        raise HeadgramError(
            f"the adapter {location.where} needs its base '{source:.200}': {plain(error, 400)}; if it lies elsewhere, set `base` "
            "in the manifest"
        ) from None
    if underneath.choice.adapter:
        raise HeadgramError(
            f"the base '{source:.200}' of {location.where} is an adapter itself: merge that one into its own base first, "
            "and name the result as `base` in the manifest"
        )
    commit = f"@{underneath.commit}" if underneath.commit else ""
    return AdaptedLocation(location, underneath, f"{source}{commit}")


def _named_by(adapter: Location | RemoteLocation) -> tuple[str, str | None]:
    """The base that an adapter's settings name, and its revision."""
    settings = adapter.config(ADAPTER_CONFIG) or {}
    source, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(source, str) or not source:
        raise HeadgramError(f"the {ADAPTER_CONFIG} of {adapter.where} names no base: set `base` in the manifest")
    return source, revision if isinstance(revision, str) and revision and is_hub_id(source) else None


def _with_revision(base: str) -> tuple[str, str | None]:
    source, at, revision = base.partition("@")
    return (source, revision) if at and revision and is_hub_id(source) else (base, None)
