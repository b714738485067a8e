"""The header of a safetensors file: what tensors it holds, and where.

It is read here because the library reads neither files at the hub nor single rows or columns without what lies beside them.

Format: 8 bytes with the header's length, little-endian; the header, a JSON object `name -> {dtype, shape, data_offsets}`;
the data, without gaps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from headgram.errors import HeadgramError
from headgram.foreign import parse_json

#: As in the safetensors library.
LARGEST_HEADER = 100_000_000
PREFIX = 8
#: Read at first, in the hope that it holds the whole header: at a hub, that saves a request per file.
_GUESS = 8192
_BITS = {
    4: ("F4",),
    6: ("F6_E2M3", "F6_E3M2"),
    8: ("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    16: ("I16", "U16", "F16", "BF16"),
    32: ("I32", "U32", "F32"),
    64: ("I64", "U64", "F64", "C64"),
}
ITEM_BITS = {dtype: bits for bits, dtypes in _BITS.items() for dtype in dtypes}


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in a safetensors file: its precision, its shape, and its bytes `[start, stop)` in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """The header's length, from the first 8 bytes.

    Raises
    ------
    HeadgramError
        If it is more than any real file's, or more than the file.
    """
    length = int.from_bytes(prefix[:PREFIX], "little")
    if len(prefix) < PREFIX or not 2 <= length <= min(LARGEST_HEADER, file_size - PREFIX):
        raise HeadgramError(
            f"{where} is not a whole safetensors file: its header claims {length} bytes, of {file_size} in the file "
            f"and {LARGEST_HEADER} allowed: fetch it again"
        )
    return length


def read_header(read: Callable[[int, int], bytes], file_size: int, where: str) -> dict[str, TensorPlace]:
    """As `parse_header`, of a file of which `read` gives the bytes between two places."""
    first = read(0, min(_GUESS, file_size))
    stop = PREFIX + header_length(first, file_size, where)
    return parse_header((first + read(len(first), stop) if stop > len(first) else first[:stop])[PREFIX:], file_size, where)


def parse_header(header: bytes, file_size: int, where: str) -> dict[str, TensorPlace]:
    """Every tensor's place, checked against the file's size: no overlap, no gap, no byte outside, no shape that disagrees.

    Raises
    ------
    HeadgramError
        Says what is wrong, and with which tensor.
    """
    try:
        entries = parse_json(header)
        if not isinstance(entries, dict):
            raise ValueError("no JSON object")
        entries.pop("__metadata__", None)
        data = PREFIX + len(header)
        places = {name: _place(name, entry, data) for name, entry in entries.items()}
        _check_cover(places, data, file_size)
    except (ValueError, RecursionError) as error:
        raise HeadgramError(f"{where} is not a whole safetensors file: its header holds {error}: fetch it again") from None
    return places


def _place(name: str, entry: object, data: int) -> TensorPlace:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]} if dtype in ITEM_BITS:
            sizes = [size for size in shape if isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**48]
        case _:
            raise ValueError(f"an entry for '{name}' that cannot be understood")
    if len(sizes) != len(shape) or len(sizes) > 16:
        raise ValueError(f"a shape for '{name}' that no tensor has")
    if math.prod(sizes) * ITEM_BITS[dtype] != (stop - start) * 8 or start < 0:
        raise ValueError(f"'{name}' with {stop - start} bytes, which its shape {tuple(sizes)} in {dtype} does not take")
    return TensorPlace(dtype, tuple(sizes), data + start, data + stop)


def _check_cover(places: dict[str, TensorPlace], data: int, file_size: int) -> None:
    ordered = sorted(places.items(), key=lambda item: (item[1].start, item[1].stop))
    for (before, left), (after, right) in pairwise(ordered):
        if left.stop != right.start:
            raise ValueError(f"'{before}' and '{after}', which overlap or leave a gap")
    first, last = (ordered[0][1].start, ordered[-1][1].stop) if ordered else (data, data)
    if (first, last) != (data, file_size):
        raise ValueError(f"tensors from byte {first} to {last}, but the file has them from {data} to {file_size}")
