"""Whether two models were compared as they are now."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from headgram.errors import HeadgramError
from headgram.results.paths import Results
from headgram.results.record import read_record


def is_current(comparison: Path, paths: Results, model: str) -> bool:
    """Whether the comparison of a model with an earlier one read what their merged tables are made of now.

    Parameters
    ----------
    comparison
        Its record, which has the earlier model's name.
    """
    try:
        upstream = read_record(comparison).upstream
        merged = [Path(paths.record("merge", each)) for each in (comparison.stem, model)]
        known = [_parts_of(path, path.stat().st_mtime_ns) for path in merged]
    except (HeadgramError, OSError):
        return False
    half = len(upstream) // 2  # the earlier model's keys come first
    return set(upstream[:half]) <= known[0] and set(upstream[half:]) <= known[1]


@lru_cache(maxsize=4096)
def _parts_of(merged: Path, modified: int) -> frozenset[str]:
    """The keys of what a model's tables were merged of, given their record and when it was written."""
    return frozenset(part.key for parts in read_record(merged).stages.values() for part in parts.values())
