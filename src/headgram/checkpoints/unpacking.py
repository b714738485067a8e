"""Arithmetic of the formats of packed integers that need no library: back to float32.

Checked against the libraries that made the formats, in `tests/unit/test_quantised.py`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Where AWQ keeps the eight columns that share 32 bits.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)

#: What HQQ calls its ways to pack integers: bits of each, and how many share a word. The first rows have the highest bits.
HQQ_PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}


def unpack_integers(packed: Int[Tensor, "rows words"], bits: int) -> Int[Tensor, "rows integers"]:
    """Unsigned integers of `bits` bits, which divide 32, packed along the columns; the lowest bits come first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    integers: Tensor = (packed.to(torch.int32).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return integers.flatten(1)


def awq_weight(
    qweight: Int[Tensor, "in words"],
    qzeros: Int[Tensor, "groups words"],
    scales: Float[Tensor, "groups out"],
    group: Int[Tensor, " in"],
) -> Float[Tensor, "out in"]:
    """AWQ's GEMM format: 4-bit columns in an order of its own, a zero and a scale per group of inputs."""
    order = torch.arange(scales.shape[1]).view(-1, 8)[:, list(_AWQ_ORDER)].flatten()
    values, zeros = (unpack_integers(packed, 4)[:, order] for packed in (qweight, qzeros))
    return _grouped(values, zeros, scales, group)


def gptq_weight(
    qweight: Int[Tensor, "words out"],
    qzeros: Int[Tensor, "groups zero_words"],
    scales: Float[Tensor, "groups out"],
    group: Int[Tensor, " in"],
    bits: int,
    zero_offset: int,
) -> Float[Tensor, "out in"]:
    """GPTQ: integers packed along the inputs."""
    values = unpack_integers(qweight.T.contiguous(), bits).T
    return _grouped(values, unpack_integers(qzeros, bits)[:, : scales.shape[1]] + zero_offset, scales, group)


def _grouped(
    values: Int[Tensor, "in out"],
    zeros: Int[Tensor, "groups out"],
    scales: Float[Tensor, "groups out"],
    group: Int[Tensor, " in"],
) -> Float[Tensor, "out in"]:
    """Integers with a zero and a scale for each group of inputs; `group` names each input's.

    Raises
    ------
    ValueError
        If the parts do not fit together.
    """
    if zeros.shape != scales.shape or scales.shape[1] != values.shape[1] or len(group) != len(values):
        raise ValueError(
            f"zeros {tuple(zeros.shape)}, scales {tuple(scales.shape)}, integers {tuple(values.shape)}, and {len(group)} inputs"
        )
    if group.is_floating_point() or int(group.min()) < 0 or int(group.max()) >= len(scales):
        raise ValueError(f"inputs of groups that are not among {len(scales)}")
    group = group.long()
    return ((values - zeros[group]) * scales.to(torch.float32)[group]).T.contiguous()


def hqq_weight(packed: Tensor, scale: Tensor, zero: Tensor, shape: tuple[int, ...], packing: str) -> Float[Tensor, "out in"]:
    """HQQ's `Quantizer.dequantize`: integers in rows or columns of a group each, with a scale and a zero for a group.

    Raises
    ------
    ValueError
        If the parts do not fit together.
    """
    bits, share = HQQ_PACKINGS[packing]
    words = packed.view(torch.int32 if packing.endswith("_32") else torch.uint8)  # they may be stored as if they were floats
    rows = math.prod(shape) // words.shape[1]
    values = torch.cat([(words >> bits * (share - 1 - place)) & (2**bits - 1) for place in range(share)])[:rows]
    fitting = ((rows, 1), (1, words.shape[1]))
    if values.numel() != math.prod(shape) or scale.shape != zero.shape or tuple(scale.shape) not in fitting:
        raise ValueError(f"{tuple(packed.shape)} words, scales {tuple(scale.shape)} and zeros {tuple(zero.shape)} of {shape}")
    return ((values.to(torch.float32) - zero.to(torch.float32)) * scale.to(torch.float32)).reshape(shape)
