"""What the latest run asks for, so that a job that outlives its run overwrites nothing of a newer one.

A run that begins writes the key of every artifact of its plan into the results folder. A job compares before each rename and
each removal: if another run asks for another key by then, it stops and leaves what is there. The file is locked while a job
compares and renames, so that no rename of an older job can follow the beginning of a newer run. It is overwritten, never
replaced, so that all processes lock one file. On a network file system, a lock also makes a node read what others wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headgram.errors import HeadgramError

#: In the results folder.
NAME = ".plan.json"
#: Stands among the records, and is none.
_GIVEN = "--config"
#: Characters that are read of it; the plan of thousands of models has fewer.
_LARGEST = 64 * 2**20


@dataclass(frozen=True)
class Order:
    """What a job was started for.

    Attributes
    ----------
    results
        The results folder of the run.
    record
        The artifact's record, relative to it.
    key
        The artifact's key.
    """

    results: Path
    record: str
    key: str


#: Of this process, and of those that it forks.
_order: ContextVar[Order | None] = ContextVar("order", default=None)


def ask_for(results: Path, keys: Mapping[str, str], given: Mapping[str, Any] | None = None) -> None:
    """Say that from now on these artifacts are asked for: keys by record, relative to the results folder.

    `given` are the options that the run got beside its configuration file.

    Raises
    ------
    OSError
        If the file cannot be written, or is a link.
    """
    number = os.open(results / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(number, "r+", encoding="utf-8") as file, _locked(number, fcntl.LOCK_EX):
        file.truncate()
        json.dump({**keys, _GIVEN: json.dumps(given or {}, default=str)}, file, indent=0, sort_keys=True)
        file.flush()
        os.fsync(number)


def asked_for(results: Path) -> dict[str, str] | None:
    """The keys that the latest run asks for, by record; None if no run began in this folder, or the file is no such list."""
    with _reading(results) as text:
        keys = _keys(text)
    return keys if keys is None else {record: key for record, key in keys.items() if record != _GIVEN}


def given_to(results: Path) -> dict[str, Any]:
    """The options that the latest run got beside its configuration file."""
    with _reading(results) as text, contextlib.suppress(ValueError, RecursionError):
        given = json.loads((_keys(text) or {}).get(_GIVEN, ""))
        return given if isinstance(given, dict) else {}
    return {}


@contextlib.contextmanager
def working_for(order: Order) -> Iterator[None]:
    """Hold whatever this process publishes in the block against the latest run's plan; processes that it forks do so too."""
    token = _order.set(order)
    try:
        yield
    finally:
        _order.reset(token)


@contextlib.contextmanager
def still_asked_for() -> Iterator[None]:
    """Run a block that renames or removes files of an artifact, unless a newer run asks for another one in its place.

    Raises
    ------
    HeadgramError
        If it does; the block is not run.
    """
    order = _order.get()
    if order is None:
        yield
        return
    with _reading(order.results) as text:
        # Of a long plan only the one line is looked for, since this precedes every rename.
        if text is None or _line(order.record, order.key) not in text:
            _compare(_keys(text), order)
        yield


def check_asked_for(results: Path, record: str, key: str) -> None:
    """Refuse a job that the latest run does not ask for, before it begins.

    Raises
    ------
    HeadgramError
        If the latest run asks for another artifact in its place, or for none.
    """
    _compare(asked_for(results), Order(results, record, key))


def _compare(keys: Mapping[str, str] | None, order: Order) -> None:
    if keys is not None and keys.get(order.record) != order.key:
        raise HeadgramError(
            f"A newer run of {order.results} no longer asks for {order.record} as this job makes it, so the job wrote nothing."
        )


@contextlib.contextmanager
def _reading(results: Path) -> Iterator[str | None]:
    """The text of the list, held as it is for the length of the block."""
    try:
        number = os.open(results / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield None  # no run began here: a node of a run whose results are kept elsewhere
        return
    try:
        with _locked(number, fcntl.LOCK_SH):
            try:
                with os.fdopen(number, "rb", closefd=False) as file:
                    text = file.read(_LARGEST).decode()
            except (OSError, ValueError):
                text = ""
            yield text
    finally:
        os.close(number)


def _keys(text: str | None) -> dict[str, str] | None:
    try:
        keys = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    return keys if isinstance(keys, dict) and all(isinstance(key, str) for key in keys.values()) else None


def _line(record: str, key: str) -> str:
    """How an artifact stands in the list."""
    return f"\n{json.dumps(record)}: {json.dumps(key)}"


@contextlib.contextmanager
def _locked(number: int, how: int) -> Iterator[None]:
    """Hold a lock on an open file, which ends when it is closed; nothing where the file system has none."""
    with contextlib.suppress(OSError):
        fcntl.flock(number, how)
    yield
