"""A walk over a GGUF file's header before the gguf library reads it.

The library trusts every count in the header: one that claims more than the file holds lets it loop for ever or fill the
memory. Here every count is held against the file's size; nothing but counts is looked at.

Format: magic, version (u32), number of tensors and of metadata entries (u64 each); the entries (key, type, value); the
tensors' descriptions (name, axes, sizes, type, offset). Strings are a u64 length and their bytes.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from headgram.errors import HeadgramError

_MAGIC = b"GGUF"
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4
#: Elements of all arrays; a tokenizer of 262,144 words has 1.3 million.
_MOST_ELEMENTS = 2**22
#: Longer arrays are a tokenizer's, and not read: others have an element for each layer.
LONG = 4096
#: Elements of the arrays that are read, entries, and tensors; known models have some thousands of these, some dozens, and some
#: thousands. The library makes several Python objects of each, half a kilobyte in all.
_MOST_READ = 2**16
_MOST_ENTRIES = 4096
_MOST_TENSORS = 2**14
#: No type has less than a bit per weight.
_MOST_VALUES_PER_BYTE = 8


class _Cursor:
    """A position in the file that cannot leave it."""

    def __init__(self, data: mmap.mmap | memoryview, at: int = 0, order: str = "<") -> None:
        self._data = data
        self._order = order
        self.at = at

    def run(self) -> None:
        if self._take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        if self._number("I") & 0xFFFF == 0:  # a small version in the other byte order
            self._order = ">"
        tensors, entries = self._count("tensors", 24), self._count("metadata entries", 13)
        elements = read = 0
        if entries > _MOST_ENTRIES or tensors > _MOST_TENSORS:
            raise ValueError(f"{entries} metadata entries and {tensors} tensors, which no real model has")
        keys: set[bytes] = set()
        for _ in range(entries):
            key = self._string()
            if key in keys:
                raise ValueError(f"the metadata {key.decode(errors='replace')!r:.200} twice")
            keys.add(key)
            length = self.value(self._number("I"), _MOST_ELEMENTS - elements)
            elements += length
            read += length if length <= LONG else 0
            if read > _MOST_READ:
                raise ValueError(f"more than {_MOST_READ} elements in short arrays, which no real model has")
        for _ in range(tensors):
            self._tensor()

    def value(self, kind: int, most_elements: int = _MOST_ELEMENTS) -> int:
        """Walk over a value; returns how many array elements it has."""
        if kind in _SCALAR_BYTES:
            self._skip(_SCALAR_BYTES[kind])
            return 0
        if kind == _STRING:
            self._skip_string()
            return 0
        if kind != _ARRAY:
            raise ValueError(f"metadata of the unknown type {kind}")
        inner, length = self._number("I"), self._count("array elements", 1)
        if length > most_elements:
            raise ValueError(f"more than {_MOST_ELEMENTS} array elements")
        if inner in _SCALAR_BYTES:
            self._skip(length * _SCALAR_BYTES[inner])
        elif inner == _STRING:
            for _ in range(length):
                self._skip_string()
        else:
            raise ValueError(f"an array of the unknown type {inner}")
        return length

    def _tensor(self) -> None:
        self._skip_string()
        axes = self._number("I")
        if axes > _MOST_AXES:
            raise ValueError(f"a tensor with {axes} axes")
        sizes = [self._number("Q") for _ in range(axes)]
        if math.prod(sizes) > _MOST_VALUES_PER_BYTE * len(self._data):
            raise ValueError(f"a tensor of {' × '.join(map(str, sizes))} values, more than the file can hold")
        self._skip(12)

    def _string(self) -> bytes:
        return bytes(self._take(self._number("Q")))

    def _skip_string(self) -> None:
        self._skip(self._number("Q"))

    def _count(self, what: str, least_bytes: int) -> int:
        count = self._number("Q")
        if count * least_bytes > len(self._data):
            raise ValueError(f"{count} {what}, more than the file can hold")
        return count

    def _number(self, code: str) -> int:
        return int(struct.unpack(self._order + code, self._take(struct.calcsize("=" + code)))[0])

    def _take(self, count: int) -> bytes | memoryview:
        start = self.at
        self._skip(count)
        return self._data[start : self.at]

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self._data):
            raise ValueError("a header that goes on after the end of the file")


def array_bytes(data: memoryview, at: int, swapped: bool) -> int:
    """How many bytes the array takes that begins at a place of a header that was checked."""
    walk = _Cursor(data, at, ">" if swapped else "<")
    walk.value(_ARRAY)
    return walk.at - at


def check_header(path: Path) -> None:
    """Refuse a GGUF file whose header claims more than the file holds.

    Raises
    ------
    HeadgramError
        Says what it claims.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Cursor(data).run()
    except (ValueError, OSError) as error:
        raise HeadgramError(f"{path} is not a whole GGUF file ({error}): fetch it again") from None
