"""Small floats and integers with scales: of a tensor, of rows, of blocks, of groups along the inputs.

What the parts mean follows from their types, what a scale belongs to from its shape, and only one reading may fit. Published
definitions: `FP8QTensor`, `NVFP4QTensor`, `MXFP4QTensor`, `MXFP8QTensor` and `pack_int4_in_uint8` of NVIDIA's modelopt (0.47),
`Pack_fp4` of AMD's Quark (0.13), `Float8Tensor` of torchao (0.18), the OCP Microscaling formats (MX) 1.0, `FP8Linear` of
transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.checkpoints.dtypes import FLOATS, word_of

Block = tuple[int, int]
_FP8 = ("F8_E4M3", "F8_E5M2")
#: Powers of two, stored as their exponent plus 127.
_EXPONENTS = ("U8", "F8_E8M0")
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MX_GROUP = 32
_NV_GROUP = 16


@dataclass(frozen=True)
class Reading:
    """What a weight and its scale mean.

    Attributes
    ----------
    shape
        Of the weight.
    packed
        `fp4` (two floats of 4 bits in a byte, along the inputs), `int4` (two integers, along the outputs) or None.
    block
        The rows and columns that share a scale; None where the tensor has one.
    """

    shape: tuple[int, int]
    packed: str | None
    block: Block | None


def reading_of(
    weight: str, weight_shape: tuple[int, ...], scale: str, scale_shape: tuple[int, ...], blocks: tuple[Block, ...]
) -> Reading:
    """What parts of some types and shapes mean.

    Parameters
    ----------
    weight, weight_shape, scale, scale_shape
        Their types, in safetensors' words, and their shapes.
    blocks
        The blocks that may share a scale, besides rows and the whole tensor.

    Raises
    ------
    ValueError
        If the types mean nothing together, or the scale's shape fits nothing.
    """
    if len(weight_shape) != 2:
        raise ValueError(f"a weight of shape {weight_shape}")
    rows, columns = weight_shape
    if weight == "U8" and scale in ("F8_E4M3", *_EXPONENTS):
        group = _NV_GROUP if scale == "F8_E4M3" else _MX_GROUP
        return _grouped((rows, 2 * columns), "fp4", group, scale_shape)
    if weight == "U8" and scale in FLOATS and len(scale_shape) == 2 and scale_shape[0] == 2 * rows:
        groups = max(1, scale_shape[1])
        if columns % groups == 0:
            return Reading((2 * rows, columns), "int4", (1, columns // groups))
    if (weight in _FP8 or weight == "I8") and scale in (*FLOATS, *_EXPONENTS):
        grid = scale_shape[::2] if len(scale_shape) == 4 and scale_shape[1] == scale_shape[3] == 1 else scale_shape
        if math.prod(grid) == 1:
            return Reading((rows, columns), None, None)
        if grid in ((rows,), (rows, 1)):
            return Reading((rows, columns), None, (1, columns))
        for high, wide in (*blocks, *(((1, _MX_GROUP),) if scale in _EXPONENTS else ())):
            if grid == (math.ceil(rows / high), math.ceil(columns / wide)):
                return Reading((rows, columns), None, (high, wide))
        if weight == "I8" and len(grid) == 2 and grid[0] == rows and grid[1] > 1 and columns % grid[1] == 0:
            return Reading((rows, columns), None, (1, columns // grid[1]))
    raise ValueError(f"a weight {weight} of shape {weight_shape} with a scale {scale} of shape {scale_shape}")


def _grouped(shape: tuple[int, int], packed: str | None, group: int, scale_shape: tuple[int, ...]) -> Reading:
    """A scale for every so many inputs; some producers store the scales in one column."""
    rows, columns = shape
    count = columns // group
    if columns % group or scale_shape not in ((rows, count), (rows * count, 1), (rows * count,), (rows, count, 1)):
        raise ValueError(f"a weight of shape {shape} with scales of groups of {group} of shape {scale_shape}")
    return Reading(shape, packed, (1, group))


def scaled_weight(
    weight: Tensor,
    scale: Tensor,
    blocks: tuple[Block, ...] = (),
    second: Tensor | None = None,
    columns: Tensor | None = None,
) -> Float[Tensor, "out in"]:
    """The weight that stored parts mean, float32.

    Parameters
    ----------
    weight, scale
        As stored.
    blocks
        As of `reading_of`.
    second
        A scale of all scales.
    columns
        What inputs are multiplied by before the weight.

    Raises
    ------
    ValueError
        If the parts do not fit together.
    """
    reading = reading_of(word_of(weight.dtype), tuple(weight.shape), word_of(scale.dtype), tuple(scale.shape), blocks)
    values, factors = _unpacked(weight, reading.packed), _scales(scale)
    if second is not None:
        if second.numel() != 1:
            raise ValueError(f"a second scale of shape {tuple(second.shape)}")
        factors = factors * second.to(torch.float32)
    if reading.block is None:
        values *= factors.reshape(())
    else:
        high, wide = reading.block
        grid = factors.reshape(math.ceil(reading.shape[0] / high), math.ceil(reading.shape[1] / wide))
        values *= grid.repeat_interleave(high, 0)[: reading.shape[0]].repeat_interleave(wide, 1)[:, : reading.shape[1]]
    return values if columns is None else values * columns.to(torch.float32).reshape(1, reading.shape[1])


def _unpacked(weight: Tensor, packed: str | None) -> Float[Tensor, "out in"]:
    if packed is None:
        return weight.to(torch.float32)
    low, high = weight & 0x0F, weight >> 4
    if packed == "int4":
        codes = torch.stack([low, high], 1).flatten(0, 1).to(torch.int16)
        return (codes - 16 * (codes >= 8)).to(torch.float32)
    codes = torch.stack([low, high], -1).flatten(1).long()
    table = torch.tensor(_FP4_VALUES)
    return torch.cat([table, -table])[codes]


def _scales(scale: Tensor) -> Tensor:
    """As factors; the exponent 255 means that there is no number."""
    if word_of(scale.dtype) not in _EXPONENTS:
        return scale.to(torch.float32)
    exponents = scale.view(torch.uint8).to(torch.float32)
    return torch.where(exponents == 255, torch.nan, torch.exp2(exponents - 127))
