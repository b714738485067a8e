"""Types of numbers in weight files: safetensors' words for them, torch's names, and how many bytes a number takes.

Torch is imported where a tensor is made or taken apart, for what else is asked of a checkpoint needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from headgram.errors import HeadgramError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Torch's names of the types that safetensors has a word for.
_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
#: Those that weights are computed with.
FLOATS = ("F64", "F32", "F16", "BF16")
#: Bytes of a number, by torch's name of its type.
BYTES = {
    name: size
    for size, names in {
        16: "complex128",
        8: "float64 int64 uint64 complex64",
        4: "float32 int32 uint32 complex32 qint32",
        2: "float16 bfloat16 int16 uint16 bits16",
        1: "int8 uint8 bool float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 "
        "uint1 uint2 uint3 uint4 uint5 uint6 uint7 int1 int2 int3 int4 int5 int6 int7 qint8 quint8 quint4x2 quint2x4 "
        "bits1x8 bits2x4 bits4x2 bits8",
    }.items()
    for name in names.split()
}


def word_of(dtype: torch.dtype | str) -> str:
    """What safetensors calls a type of torch's, or torch where that has no word."""
    name = str(dtype).removeprefix("torch.")
    return next((word for word, known in _NAMES.items() if known == name), f"torch.{name}")


def float_dtype(name: str, stored: str) -> str:
    """The type of a plain weight.

    Raises
    ------
    HeadgramError
        If it is not a floating-point type that weights are computed with.
    """
    if stored not in FLOATS:
        raise HeadgramError(f"tensor {name} is stored as {stored}, and config.json says nothing of how to turn that into weights")
    return stored


def known_dtype(name: str, stored: str) -> str:
    """What torch calls the type of any tensor.

    Raises
    ------
    HeadgramError
        If torch has no such type.
    """
    if stored not in _NAMES:
        raise HeadgramError(f"tensor {name} is stored as {stored}, a type that headgram does not know")
    return _NAMES[stored]


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any type."""
    import torch

    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def bytes_of_array(array: np.ndarray[Any, Any]) -> memoryview:
    """The bytes of numbers of any type."""
    content: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return memoryview(content)


def tensor_of(content: bytearray | memoryview, dtype: str, shape: Sequence[int]) -> Tensor:
    """The tensor of numbers that are given by their bytes, of the type that torch calls so. It shares their memory."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    return torch.frombuffer(content, dtype=kind).reshape(shape) if content else torch.empty(shape, dtype=kind)
