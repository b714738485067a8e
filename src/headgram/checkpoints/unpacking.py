"""Arithmetic of the formats of packed integers that need no library: back to float32.

Checked against the libraries that made the formats, in `tests/unit/test_quantised.py`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Where AWQ keeps the eight columns that share 32 bits.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack_integers(packed: Int[Tensor, "rows words"], bits: int) -> Int[Tensor, "rows integers"]:
    """Unsigned integers of `bits` bits, which divide 32, packed along the columns; the lowest bits come first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    integers: Tensor = (packed.to(torch.int32).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return integers.flatten(1)


def awq_weight(
    qweight: Int[Tensor, "in words"], qzeros: Int[Tensor, "groups words"], scales: Float[Tensor, "groups out"]
) -> Float[Tensor, "out in"]:
    """AWQ's GEMM format: 4-bit columns in an order of its own, a zero and a scale per group of inputs."""
    order = torch.arange(scales.shape[1]).view(-1, 8)[:, list(_AWQ_ORDER)].flatten()
    values, zeros = (unpack_integers(packed, 4)[:, order] for packed in (qweight, qzeros))
    group = torch.arange(len(values)) // (len(values) // len(scales))
    return ((values - zeros[group]) * scales.to(torch.float32)[group]).T.contiguous()


def gptq_weight(
    qweight: Int[Tensor, "words out"],
    qzeros: Int[Tensor, "groups zero_words"],
    scales: Float[Tensor, "groups out"],
    group: Int[Tensor, " in"] | None,
    bits: int,
    zero_offset: int,
) -> Float[Tensor, "out in"]:
    """GPTQ: integers packed along the inputs; `group` names each input's group, which follow in order if it is None."""
    values = unpack_integers(qweight.T.contiguous(), bits).T
    zeros = unpack_integers(qzeros, bits)[:, : scales.shape[1]] + zero_offset
    if group is None:
        group = torch.arange(len(values)) // (len(values) // len(scales))
    group = group.long()
    return ((values - zeros[group]) * scales.to(torch.float32)[group]).T.contiguous()
