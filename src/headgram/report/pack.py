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

from headgram.report.arrays import StackArrays
from headgram.report.names import DRAWN

#: How the page is called, where a pack lies beside it.
_RECEIVE, _END = "headgram.receive(", ");\n"
_BITS = 13
_DROPPED = np.uint32(23 - _BITS)


def pack(meta: Any, arrays: Mapping[str, np.ndarray]) -> str:
    """Base64 of the pack of some arrays and of what JSON holds besides; equal input gives equal text."""
    shapes = [[name, list(array.shape)] for name, array in arrays.items()]
    header = json.dumps({"meta": meta, "arrays": shapes}, separators=(",", ":"), allow_nan=False).encode()
    numbers = np.concatenate([np.empty(0, "<u4"), *(_rounded(array) for array in arrays.values())])
    planes = numbers.view("u1").reshape(-1, 4).T.tobytes()
    return base64.b64encode(gzip.compress(struct.pack("<I", len(header)) + header + planes, 9, mtime=0)).decode()


def model_pack(stacks: Mapping[str, StackArrays]) -> str:
    """All arrays of a model but the quartiles, which the page holds of every model; the texts of its tokens; and by stack, the
    other one whose heads write for its own, or read them."""
    arrays: dict[str, np.ndarray] = {}
    words: dict[str, Any] = {}
    partners: dict[str, str] = {}
    for name, stack in stacks.items():
        parts = {"heads": stack.heads, "expected": stack.expected, "singular": stack.singular, "eigenvalues": stack.eigenvalues}
        parts |= {f"pairs/{kind}": values for kind, values in stack.pairs.items()}
        parts |= {f"neighbours/{measure}": values for measure, values in stack.neighbours.items()}
        parts |= {f"matrix/{part}": values for part, values in (stack.matrix.arrays() if stack.matrix else {}).items()}
        if stack.tokens:
            parts |= {f"tokens/{part}": values for part, values in stack.tokens.arrays().items()}
            words[name] = {"texts": stack.tokens.texts, "chance": stack.tokens.chance}
        arrays |= {f"{name}/{part}": values for part, values in parts.items()}
        of_stack = {f"feeding/{part}": values for part, values in (stack.feeding.arrays() if stack.feeding else {}).items()}
        if stack.across:
            partners[name.split("/")[-1]] = stack.across.partner
            of_stack |= {f"across/{part}": values for part, values in stack.across.arrays.items()}
        of_stack |= {
            f"positions/{norm}/{part}": each for norm, found in stack.positions.items() for part, each in vars(found).items()
        }
        arrays |= {f"{name.split('/')[-1]}/{part}": values for part, values in of_stack.items()}
    return pack({"words": words, "partners": partners}, arrays)


def layer_packs(stacks: Mapping[str, StackArrays]) -> dict[str, str]:
    """What the page asks for when it zooms into many heads: by `{circuit}-{stack}-{layer}`, that layer's heads with all heads."""
    return {
        f"{name.replace('/', '-')}-{layer}": pack(
            None, stack.matrix.layer(position) | (stack.feeding.layer(position) if stack.feeding else {})
        )
        for name, stack in stacks.items()
        if stack.matrix is not None and len(stack.matrix.order) > DRAWN
        for position, layer in enumerate(stack.summary.layers)
    }


def beside(name: str, text: str) -> str:
    """The script that holds a pack where the page does not: a model's, or of `{model}/{circuit}-{stack}-{layer}`."""
    return f"{_RECEIVE}{script_json(name)}, {script_json(text)}{_END}"


def from_beside(script: str) -> str:
    """The pack in a script of `beside`."""
    text: str = json.loads(f"[{script[len(_RECEIVE) : -len(_END)]}]")[1]
    return text


def script_json(value: Any) -> str:
    """JSON that cannot end the script which holds it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _rounded(array: np.ndarray) -> np.ndarray:
    """Bits of the nearest float32 numbers with a short mantissa, flat."""
    limit = np.finfo(np.float32).max / 2
    bits = np.ascontiguousarray(array.clip(-limit, limit), dtype="<f4").ravel().view("<u4")
    half = np.uint32(1) << (_DROPPED - np.uint32(1))
    rounded: np.ndarray = (bits + half) >> _DROPPED << _DROPPED
    return rounded
