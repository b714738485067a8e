"""Products of queries and keys, or of weights and values, as matrices of single heads, however a model computes them."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def sequences(x: Tensor) -> int:
    """How many sequences there are; some models put the tokens of one before it."""
    return 1 if x.dim() < 3 or (x.dim() == 3 and x.shape[1] == 1) else x.shape[0]


def flat(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an Einstein sum, whose factors may be in a tuple."""
    return (args[0], *args[1]) if len(args) == 2 and isinstance(args[1], tuple | list) else args


def as_product(equation: Any, *operands: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """The factors of an Einstein sum, and the sum, as a product of matrices; None if it is another kind of sum."""
    if isinstance(equation, str) and equation.count("...") == 3:
        equation = equation.replace("...", "ABCDEF"[: operands[0].dim() - equation.index(",") + 3])
    words = re.fullmatch(r"(\w+),(\w+)->(\w+)", str(equation).replace(" ", ""))
    if words is None or len(operands) != 3:
        return None
    left, right, out = words.groups()
    rows, columns, inner = set(left) - set(right), set(right) - set(left), (set(left) & set(right)) - set(out)
    if not len(rows) == len(columns) == len(inner) == 1:
        return None
    batch = [letter for letter in out if letter not in rows | columns]
    (i,), (j,), (k,) = rows, columns, inner
    orders = ((left, [*batch, i, k]), (right, [*batch, k, j]), (out, [*batch, i, j]))
    x, y, z = (
        tensor.permute([letters.index(letter) for letter in order])
        for tensor, (letters, order) in zip(operands, orders, strict=True)
    )
    return x, y, z


def rows(x: Tensor, tokens: int) -> Float[Tensor, "tokens width"]:
    """The tokens of the first sequence."""
    return x.double().reshape(-1, x.shape[-1])[:tokens]


def per_head(tensor: Tensor, heads: int) -> Float[Tensor, "heads rows columns"]:
    """The first `heads` matrices; fewer, which several heads share, are repeated."""
    flat = tensor.reshape(-1, *tensor.shape[-2:]).double()
    return flat.repeat_interleave(-(-heads // len(flat)), 0)[:heads]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest entry of the second; infinite if their shapes differ."""
    difference = float((ours - theirs).abs().max() / theirs.abs().max()) if ours.shape == theirs.shape else math.inf
    return difference if math.isfinite(difference) else math.inf


def relative_to_multiple(ours: Tensor, theirs: Tensor) -> float:
    """As `relative`, of that multiple of the first which is nearest to the second; negative multiples do not count."""
    if ours.shape != theirs.shape:
        return math.inf
    return relative(ours * ((ours * theirs).sum() / ours.square().sum()).clamp(min=0), theirs)


def of_same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same rows, in any order, and as often as they will."""
    return torch.equal(*(torch.unique(each.double().flatten(0, -2).sum(-1)) for each in (one, other)))
