"""What a pack of the page holds, as `unpack` in `data.js` reads it."""

import base64
import gzip
import json
import struct
from typing import Any

import numpy as np


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
