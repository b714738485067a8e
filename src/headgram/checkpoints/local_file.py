"""Bytes of weight files on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from headgram.errors import HeadgramError

#: First byte and last, that one excluded.
Span = tuple[int, int]


class LocalFile:
    """A file of which only the bytes are read that are asked for; a slice of it is a copy of these bytes.

    Not mapped into memory: a page that is touched there brings its neighbours along. Open only while it is read, for there may be
    thousands of files.

    Raises
    ------
    HeadgramError
        If it cannot be read, or ends before what is asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._size = path.stat().st_size
        except OSError as error:
            raise self._unreadable(error.strerror) from None

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, bounds: slice) -> bytearray:
        start, stop, _ = bounds.indices(len(self))
        return self.read([(start, max(start, stop))])

    def read(self, spans: Iterable[Span]) -> bytearray:
        """Some ranges of its bytes, one after the other."""
        spans = list(spans)
        found = bytearray(sum(stop - start for start, stop in spans))
        rest = memoryview(found)
        try:
            with self.path.open("rb", buffering=0) as file:
                for start, stop in spans:
                    file.seek(start)
                    wanted, rest = rest[: stop - start], rest[stop - start :]
                    while wanted:
                        if not (count := file.readinto(wanted)):
                            raise self._unreadable(f"it ends before byte {stop}")
                        wanted = wanted[count:]
        except OSError as error:
            raise self._unreadable(error.strerror) from None
        return found

    def _unreadable(self, reason: str | None) -> HeadgramError:
        return HeadgramError(f"{self.path} cannot be read ({reason}): fetch it again")
