"""Files on disk: published whole and for good, and inside the results folder never beyond a symbolic link."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from headgram.errors import HeadgramError
from headgram.results.asked import still_asked_for

#: In the environment of a run and of its jobs: the results folder.
RESULTS = "HEADGRAM_RESULTS"
#: Characters of a path and of a name in it; no file system holds longer names, and headgram's are far shorter.
_LONGEST_PATH, _LONGEST_NAME = 1000, 255
#: What helps where a file of the results cannot be read, whatever is wrong with it.
MENDING = "run `headgram verify --repair`, then `headgram run`, which makes it anew"
#: A file system that cannot flush a folder says one of these.
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that becomes `path` when the block ends, and vanishes if it fails.

    What was written is on the disk before the file gets its name, and the name is on the disk before this returns.

    Raises
    ------
    HeadgramError
        If the disk is full or refuses, or a folder on the way is a symbolic link; says which.
    """
    refuse_links(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_new(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with still_asked_for():
            temporary.replace(path)
        for folder in (path.parent, *_folders_above(path)):
            _flush_folder(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch reports a failed write as a RuntimeError of its own, with the system's error behind it.
        if not isinstance(error, HeadgramError) and (failure := _system_error(error)):
            raise HeadgramError(f"{path} cannot be written: {_reason(failure)}.") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with written_whole(path) as file:
        file.write(text.encode())


def open_new(path: Path) -> IO[bytes]:
    """Open a file for writing that is not there yet; one of that name, which only headgram gives, goes first.

    No link is followed, not even one that somebody puts there at this very moment.
    """
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


def _flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk: without that, a power cut may undo a rename."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(number)


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the operating system that an exception is, or was raised while handling."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space and run again"
    return error.strerror or str(error)


@contextlib.contextmanager
def scratch(beside: Path) -> Iterator[Callable[[str, int], Path]]:
    """Yield a function that reserves a file, by name and bytes, in the folder of `beside`; all vanish when the block ends.

    Raises
    ------
    HeadgramError
        If the disk has no room for them, or a folder on the way is a symbolic link.
    """
    refuse_links(beside)
    made: list[Path] = []

    def reserve(name: str, size: int) -> Path:
        path = beside.with_name(f".{beside.name}-{name}.{os.getpid()}.tmp")
        made.append(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_new(path) as file:
                # Really allocated, where the system can: a mapped file that finds no room later kills the process.
                getattr(os, "posix_fallocate", lambda number, _, length: os.ftruncate(number, length))(file.fileno(), 0, size)
        except OSError as error:
            raise HeadgramError(f"{path} cannot be written: {_reason(error)}.") from error
        return path

    try:
        yield reserve
    finally:
        for path in made:
            path.unlink(missing_ok=True)


def everything_in(folder: Path) -> Iterator[Path]:
    """A folder and all that lies in it, beyond no link; without what is not there, or has a path too long for the system."""
    waiting = [folder]
    while waiting:
        if os.path.lexists(path := waiting.pop()):
            yield path
            with contextlib.suppress(OSError):
                waiting += path.iterdir() if is_folder(path) else ()


def require_file(path: Path) -> None:
    """Refuse what is there and is no file, before it is opened: a pipe would be waited for, and a device might never end.

    Raises
    ------
    HeadgramError
        If it is anything else; not if there is nothing.
    """
    if path.exists() and not path.is_file():
        raise HeadgramError(f"{path} cannot be read (it is no file): {MENDING}")


def checksum(path: Path) -> str:
    """BLAKE2b of a file, as 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def remove_temporaries(paths: Iterable[Path]) -> None:
    """Remove what killed jobs left half-written of these files: what lies beside them under a name that only headgram gives.

    Parts of a file, `.NAME-tile-…`, stay until its record is there: a job goes on from them. Only for whoever holds the files.
    """
    names: dict[Path, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(path.name)
    for folder, wanted in names.items():
        for temporary in temporaries_in(folder, wanted):
            temporary.unlink(missing_ok=True)


def temporaries_in(folder: Path, names: Iterable[str]) -> list[Path]:
    """The temporary files in a folder that were to become files of these names, or that their jobs used as scratch."""
    wanted = set(names)
    with contextlib.suppress(OSError):
        there = {path.name for path in folder.iterdir()}
        return [folder / name for name in there if _is_temporary_of(name, wanted) or _is_needless_part_of(name, wanted, there)]
    return []


def part_of(path: Path, name: str) -> Path:
    """A hidden file beside a file, of a name that only headgram gives, for a part of it that is whole."""
    return path.with_name(f".{path.name}-tile-{name}")


def _is_needless_part_of(name: str, wanted: set[str], there: set[str]) -> bool:
    whole, part, _ = name.removeprefix(".").partition("-tile-")
    return bool(part) and name.startswith(".") and whole in wanted and Path(whole).with_suffix(".json").name in there


def _is_temporary_of(name: str, wanted: set[str]) -> bool:
    if not (match := re.fullmatch(r"\.(.+)\.[0-9]+\.tmp", name)):
        return False
    # Of a file `.NAME.PID.tmp`, of scratch `.NAME-WHAT.PID.tmp`, and of a hidden file beside it `..NAME-WHAT.PID.tmp`.
    parts = match[1].removeprefix(".").split("-")
    return any("-".join(parts[:count]) in wanted for count in range(1, len(parts) + 1))


def is_file_name(name: str) -> bool:
    """Whether a text is the path of a file from a folder, as headgram writes such paths; it may lead out of the folder.

    Examples
    --------
    >>> is_file_name("../atlas/a.pt"), is_file_name("atlas//a.pt"), is_file_name(".."), is_file_name("/etc/passwd")
    (True, False, False, False)
    """
    path = PurePosixPath(name)
    normal = posixpath.normpath(name) == name and path.name not in ("", os.pardir) and not path.is_absolute()
    short = len(name) <= _LONGEST_PATH and all(len(part) <= _LONGEST_NAME for part in path.parts)
    return normal and short and name.isascii() and name.isprintable()


# ---- links


def is_folder(path: Path) -> bool:
    """Whether something is a folder itself, not a link to one; also of a path that is too long."""
    return os.path.isdir(path) and not os.path.islink(path)  # noqa: PTH112, PTH114  (those of Path raise)


def refuse_links(path: Path, results: Path | None = None) -> None:
    """Refuse a path below the results folder that leads through a symbolic link; `results` itself may be one.

    `results` is by default the folder of the run that this process belongs to; outside of it, a user's own links count.

    Raises
    ------
    HeadgramError
        Names the link, and says what to do.
    """
    results = results or _results()
    if results and (link := link_on_the_way(path, results)):
        raise HeadgramError(link_message(link, results))


def _results() -> Path | None:
    """The results folder of the run that this process belongs to, if it belongs to one."""
    return Path(os.environ[RESULTS]) if RESULTS in os.environ else None


def link_on_the_way(path: Path, results: Path) -> Path | None:
    """The first folder between the results folder and a path in it that is a symbolic link."""
    return next((folder for folder in _folders_to(path, results) if os.path.islink(folder)), None)  # noqa: PTH114


def _folders_to(path: Path, results: Path) -> list[Path]:
    """The folders from the results folder, which does not count, to the one that holds a path; none for a path elsewhere."""
    inside = Path(os.path.relpath(path, results)).parts
    return [] if os.pardir in inside else [results.joinpath(*inside[:count]) for count in range(1, len(inside))]


def _folders_above(path: Path) -> list[Path]:
    """The folders above that of a file, up to the results folder: they hold the names of folders that may be new."""
    results = _results()
    return [folder.parent for folder in reversed(_folders_to(path, results))] if results else []


def link_message(link: Path, results: Path) -> str:
    """What is said about a link inside a results folder."""
    return (
        f"{link} is a symbolic link to {link.readlink()}, and headgram follows none inside the results folder: put a folder "
        f"in its place, or keep all results elsewhere ({results} itself may be a link)"
    )
