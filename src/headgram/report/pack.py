"""Arrays for the page: one compressed text of everything a picture needs, which a browser unpacks without a library.

A pack is gzip of: the length of a header (four bytes, little-endian), the header in JSON, and the arrays as float32 in
planes, first the lowest byte of every number, at last the highest. Numbers are rounded to 13 bits of mantissa, four
significant digits, which is all that a picture shows; with the planes that halves the page. `unpack` in `data.js` reads it.
"""

from __future__ import annotations

import base64
import gzip
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

_BITS = 13
_DROPPED = np.uint32(23 - _BITS)


def pack(meta: Any, arrays: Mapping[str, np.ndarray]) -> str:
    """Base64 of the pack of some arrays and of what JSON holds besides; equal input gives equal text."""
    shapes = [[name, list(array.shape)] for name, array in arrays.items()]
    header = json.dumps({"meta": meta, "arrays": shapes}, separators=(",", ":"), allow_nan=False).encode()
    numbers = np.concatenate([np.empty(0, "<u4"), *(_rounded(array) for array in arrays.values())])
    planes = numbers.view("u1").reshape(-1, 4).T.tobytes()
    return base64.b64encode(gzip.compress(struct.pack("<I", len(header)) + header + planes, 9, mtime=0)).decode()


def unpack(text: str) -> tuple[Any, dict[str, np.ndarray]]:
    """What was packed, as float32."""
    data = gzip.decompress(base64.b64decode(text))
    (length,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + length])
    numbers = np.frombuffer(data, "u1", offset=4 + length).reshape(4, -1).T.copy().view("<f4").ravel()
    arrays, start = {}, 0
    for name, shape in header["arrays"]:
        size = int(np.prod(shape))
        arrays[name] = numbers[start : start + size].reshape(shape)
        start += size
    return header["meta"], arrays


def _rounded(array: np.ndarray) -> np.ndarray:
    """Bits of the nearest float32 numbers with a short mantissa, flat."""
    limit = np.finfo(np.float32).max / 2
    bits = np.ascontiguousarray(array.clip(-limit, limit), dtype="<f4").ravel().view("<u4")
    half = np.uint32(1) << (_DROPPED - np.uint32(1))
    rounded: np.ndarray = (bits + half) >> _DROPPED << _DROPPED
    return rounded
