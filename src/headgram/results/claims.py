"""Which files below results are headgram's: a run claims what its jobs will write, and never takes what is somebody else's.

Snakemake removes what a job will write, its record too, before the job starts. So a run says beforehand, in a file of its own,
which files are headgram's: those that a record names, those that an earlier run claimed, and those that are not there yet. All
else that lies where a job would write is in the way, and the run does not begin. When a run ends, what the earlier record of an
artifact named and the new one does not is removed, if it still is what was written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headgram.errors import HeadgramError
from headgram.foreign import parse_json, read_bounded
from headgram.results.files import (
    checksum,
    is_file_name,
    is_folder,
    link_on_the_way,
    refuse_links,
    remove_temporaries,
    write_text,
)
from headgram.results.record import files_of

#: In the results folder.
NAME = ".claims.json"
#: The claims of thousands of models are smaller.
_LARGEST = 256 * 2**20


@dataclass(frozen=True)
class Writing:
    """What a job is about to write: its artifact's record, and all files, the record and the log too."""

    record: Path
    files: Sequence[Path]


#: By file, relative to the results folder: its artifact's record, bytes and checksum, if a record names it; else None.
Claims = dict[str, list[Any] | None]


def claim(results: Path, writings: Iterable[Writing]) -> None:
    """Claim what jobs are about to write, and remove what killed jobs left half-written of it. For the run that holds the folder.

    Raises
    ------
    HeadgramError
        If a file of somebody else is in the way, or a folder on the way is a symbolic link.
    """
    writings = list(writings)
    for folder in {path.parent for writing in writings for path in writing.files}:
        refuse_links(folder / "file", results)
    claims, known = claimed(results), dict[str, list[Any] | None]()
    for writing in writings:
        known |= _known_by_record(results, writing)
    claims |= known
    for writing in writings:
        for path in writing.files:
            name = _name(path, results)
            if os.path.lexists(path) and (name not in claims or is_folder(path)):
                raise HeadgramError(
                    f"{path} is in the way: headgram would write there, but no record of headgram names what lies there; "
                    "move it elsewhere, or delete it, and run again"
                )
            claims.setdefault(name, None)
    _write(results, claims)
    _remove_halves(results, claims)


def check_own(path: Path) -> None:
    """Refuse what lies where a run keeps what it knows, if no run can have written it: it is no file, or no JSON.

    A file that is empty, or begins with zeros, may be what a crash left. It is written anew.

    Raises
    ------
    HeadgramError
        If somebody else put it there.
    OSError
        If it cannot be read.
    """
    if not os.path.lexists(path):
        return
    ours = not path.is_symlink() and path.is_file()
    if ours:
        with path.open("rb") as file:
            ours = file.read(1) in (b"", b"\0", b"{", b"[")
    if not ours:
        raise HeadgramError(
            f"{path} is in the way: a run keeps there what it knows, and no run wrote this; move it elsewhere, or delete it, and "
            "run again"
        )


def claimed(results: Path) -> Claims:
    """What runs have claimed; nothing if that is lost or damaged, for then records say what is headgram's."""
    try:
        content = parse_json(read_bounded(results / NAME, _LARGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: entry for name, entry in content.items() if _is_claim(name, entry)} if isinstance(content, dict) else {}


def is_ours(path: Path, results: Path, claims: Claims) -> bool:
    """Whether a file is headgram's by its claim; if a record named it, it must still be what was written."""
    name = _name(path, results)
    return name in claims and ((entry := claims[name]) is None or is_as_written(path, *entry[1:]))


def settle(results: Path) -> None:
    """Remove files that an earlier record of an artifact named and its present record does not, unless somebody changed them.

    A record that is removed, as of a model that the report no longer shows, takes the files with it that it names. What was left
    half-written goes too: a job that outlived an earlier run may have been killed during this one.
    """
    claims = claimed(results)
    kept: Claims = {}
    named: dict[str, set[str] | None] = {}
    for name, entry in claims.items():
        if entry is None:
            kept[name] = None
            continue
        record, size, blake2b = entry
        if record not in named:
            named[record] = _named(results / record, results)
        if (still := named[record]) is None or name in still:
            kept[name] = entry
            continue
        with contextlib.suppress(OSError):
            _remove(results / name, results, size, blake2b)
    if kept != claims:
        _write(results, kept)
    _remove_halves(results, kept)


def _remove_halves(results: Path, claims: Claims) -> None:
    """Remove what was left half-written of claimed files."""
    folders = {
        folder for folder in {Path(name).parent for name in claims} if not link_on_the_way(results / folder / "file", results)
    }
    remove_temporaries(results / name for name in claims if Path(name).parent in folders)


def _remove(path: Path, results: Path, size: int, blake2b: str) -> None:
    """Remove a file that still is what was written; of a record, first the files that it names."""
    inside = not _name(path, results).startswith(os.pardir)
    if not inside or link_on_the_way(path, results) or not is_as_written(path, size, blake2b):
        return
    named = (files_of(path) or {}) if path.suffix == ".json" else {}
    for name, file in named.items():
        if not name.endswith(".json"):
            _remove(path.parent / name, results, file.bytes, file.blake2b)
    path.unlink()


def is_as_written(path: Path, size: int, blake2b: str) -> bool:
    """Whether a file still is what a record says of it; a link is not, nor is what cannot be read."""
    with contextlib.suppress(OSError):
        return not path.is_symlink() and path.is_file() and path.stat().st_size == size and checksum(path) == blake2b
    return False


def _known_by_record(results: Path, writing: Writing) -> Claims:
    """What the record of an artifact, as it is now, makes headgram's: its files, itself, and its job's log."""
    files = files_of(writing.record)
    if files is None:
        return {}
    logs = [path for path in writing.files if path.suffix == ".log"]
    claims: Claims = {_name(path, results): None for path in (writing.record, *logs)}
    record = _name(writing.record, results)
    for name, entry in files.items():
        place = _name(writing.record.parent / name, results)
        if _is_inside(place):  # whoever made the record, it speaks of results only
            claims[place] = [record, entry.bytes, entry.blake2b]
    return claims


def _named(record: Path, results: Path) -> set[str] | None:
    """The files that a record names now; None if it cannot be read."""
    files = files_of(record)
    return None if files is None else {_name(record.parent / name, results) for name in files}


def _name(path: Path, results: Path) -> str:
    return Path(os.path.relpath(path, results)).as_posix()


def _is_claim(name: str, entry: Any) -> bool:
    """Whether a claim is one, of a file below the results folder."""
    if entry is not None and not (isinstance(entry, list) and [type(part) for part in entry] == [str, int, str]):
        return False
    places = [name] if entry is None else [name, entry[0]]
    return all(map(_is_inside, places))


def _is_inside(name: str) -> bool:
    """Whether a text is the path of a file below the results folder, from there."""
    return is_file_name(name) and os.pardir not in Path(name).parts


def _write(results: Path, claims: Mapping[str, list[Any] | None]) -> None:
    write_text(results / NAME, json.dumps(claims, indent=0, sort_keys=True, ensure_ascii=False) + "\n")
