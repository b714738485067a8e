"""Prepare a results folder so that the next run makes anew what is wrong in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import filelock

from headgram.atlas.verify import Finding
from headgram.errors import HeadgramError
from headgram.results.claims import Claims, Writing, claim, claimed, is_as_written, is_ours
from headgram.results.files import is_folder, link_on_the_way, remove_temporaries, write_text
from headgram.results.record import FileSum, files_of


def repair(results: Path, findings: Iterable[Finding], keys: Mapping[str, str]) -> list[Finding]:
    """Have the next run make anew what is wrong.

    The record of an artifact that is asked for is emptied. Then the artifact is not what is asked for, so its job runs, whether
    or not another job needs what it writes. An artifact that nobody asks for any more is removed, and so is what headgram left
    without a record. Only files are removed that a run has claimed, or that still are what a record says of them.

    Parameters
    ----------
    results
        The results folder.
    findings
        What `verify` found.
    keys
        What is asked for, by record.

    Returns
    -------
    list of Finding
        What is left, since no run mends it.

    Raises
    ------
    HeadgramError
        If a run works on the folder, or it cannot be written.
    """
    lock = filelock.FileLock(results / ".lock", timeout=0)
    try:
        with lock:
            claims = claimed(results)
            remove_temporaries(results / name for name in claims if not link_on_the_way(results / name, results))
            return [finding for finding in findings if not _mend(finding, results, keys, claims)]
    except filelock.Timeout:
        raise HeadgramError(f"A run works on {results}: wait for it, and repair then.") from None
    except OSError as error:
        raise HeadgramError(f"{results} cannot be repaired ({error.strerror or error}).") from None


def _mend(finding: Finding, results: Path, keys: Mapping[str, str], claims: Claims) -> bool:
    """Prepare for one finding; whether a run, or this, mends it."""
    if finding.path is None or finding.mended_by in ("run", "you"):
        return finding.mended_by == "run"
    name = Path(os.path.relpath(finding.path, results)).as_posix()
    path = results / name
    if os.pardir in Path(name).parts or link_on_the_way(path, results):
        return False
    if finding.mended_by == "anew" and name in keys:
        return _make_stale(path, results)
    files = _named_by(path, results) if finding.mended_by == "anew" else {}
    if not files and not is_ours(path, results, claims):
        return not os.path.lexists(path)
    for file, written in files.items():
        if is_ours(file, results, claims) or is_as_written(file, written.bytes, written.blake2b):
            file.unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return not any(map(os.path.lexists, files))


def _make_stale(record: Path, results: Path) -> bool:
    """Empty a record, once it and what it names are claimed; whether that could be done."""
    with contextlib.suppress(HeadgramError):
        claim(results, [Writing(record, [record])])
        write_text(record, "")
        return True
    return False


def _named_by(record: Path, results: Path) -> dict[Path, FileSum]:
    """The data files of a record that lie in the results folder, and not beyond a link; none if it cannot be read."""
    names = files_of(record) or {}
    files = {results / os.path.relpath(record.parent / name, results): written for name, written in names.items()}
    return {
        file: written
        for file, written in files.items()
        if os.pardir not in file.relative_to(results).parts and not link_on_the_way(file, results) and not is_folder(file)
    }
