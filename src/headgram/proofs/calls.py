"""What is caught of one attention module: its queries and keys, what it reads by their softmax, and what projects that."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

#: How far attention weights may sum from 1: some models keep them in bfloat16.
_SUM_TOLERANCE = 1e-2


@dataclass
class Attended:
    """One product of attention weights and values, `(H, t, s)` and `(H, s, r_v)`, and what is made of it.

    `others` is what heads gather besides, from what is no token. `project` is the module that writes, and `given` what it is
    given, `(t, H·r_v)`; None until it runs.
    """

    weights: Float[Tensor, "heads t s"]
    value: Float[Tensor, "heads s value_rank"]
    others: Float[Tensor, "heads t value_rank"] | None = None
    project: nn.Module | None = None
    given: Float[Tensor, "t all_heads"] | None = None

    @property
    def heads(self) -> Float[Tensor, "heads t value_rank"]:
        """What every head has gathered from tokens."""
        return self.weights @ self.value

    @property
    def has_sink(self) -> bool:
        """Whether something besides tokens takes part in the softmax: then its weights do not sum to 1."""
        return not bool((self.weights.sum(-1) - 1).abs().max() < _SUM_TOLERANCE)

    @property
    def side_by_side(self) -> Float[Tensor, "t all_heads"]:
        """What all heads have gathered, head after head."""
        return (self.heads if self.others is None else self.heads + self.others).transpose(0, 1).flatten(1)

    def written(self, heads: Float[Tensor, "heads t value_rank"]) -> Float[Tensor, "heads t width"]:
        """What the model's projection makes of single heads: for each, the places of all others are zero."""
        assert self.project is not None
        count, tokens, rank = heads.shape
        alone = heads.new_zeros(count, tokens, count, rank)
        alone[range(count), :, range(count)] = heads
        width: Any = self.project.weight.shape
        alone = alone.reshape(count, tokens, -1)
        if 2 * alone.shape[-1] in width and alone.shape[-1] not in width:
            alone = torch.cat([alone, torch.zeros_like(alone)], -1)
        with torch.no_grad():
            zero, *made = (first_of(self.project(one[None])) for one in (torch.zeros_like(alone[0]), *alone))
        return torch.cat([one - zero for one in made])


@dataclass
class Call:
    """One product of queries and keys, `(H, t, r)` and `(H, s, r)`, and the inputs `(t, d)` and `(s, d)` that they come from.

    `reading` is what the module did next with the softmax of that product, if that was a matrix product, and `logits` what that
    softmax was given. `outer` has what the modules around it were given, by their paths. `written` is what all heads
    write together, which is added to `stream` as `added`; `source` is what the last block left of the stack that ran before.
    `between` has what lies between values and outputs besides: a `gate`, a `norm`. `placed`: the module itself added places to
    the inputs of queries and keys, and not to those of values.
    """

    module: str
    query: Float[Tensor, "heads t rank"]
    key: Float[Tensor, "heads s rank"]
    x: Float[Tensor, "t hidden"]
    y: Float[Tensor, "s hidden"]
    z: Float[Tensor, "s hidden"]  # what values come from: `y` but in few modules
    reading: Attended | None = None
    logits: Float[Tensor, "heads t scores"] | None = None
    outer: dict[str, Tensor] = field(default_factory=dict)
    written: Tensor | None = None
    added: Tensor | None = None
    stream: Tensor | None = None
    source: Tensor | None = None
    between: set[str] = field(default_factory=set)
    placed: bool = False

    @property
    def layer(self) -> int | None:
        """The first number in the module's path."""
        number = re.search(r"\.(\d+)(\.|$)", self.module)
        return int(number[1]) if number else None

    @property
    def complete(self) -> bool:
        """Whether its heads were seen to be handed on."""
        return self.reading is not None and self.reading.given is not None

    @property
    def telling(self) -> bool:
        """Whether it can show something of its weights: neither what it reads nor a single token to attend to hides them."""
        return len(self.y) > 1 and all(bool(one.any() and one.isfinite().all()) for one in (self.x, self.y, self.z))

    @property
    def one_stream(self) -> bool:
        """Whether queries and keys are made of the same tokens, as in self-attention."""
        return self.x.shape == self.y.shape and torch.equal(self.x, self.y)

    def may_be(self, layer: int) -> bool:
        """Whether the module may be that of a layer: its path has that number, or none at all."""
        numbers = re.findall(r"\.(\d+)(?=\.|$)", self.module)
        return not numbers or str(layer) in numbers

    @property
    def block(self) -> str:
        """The module's path up to that number: the block of layers that it is part of."""
        return re.sub(r"(?<=\.)(\d+)\..*", r"\1", self.module)


def first_of(result: Any) -> Any:
    """What a module returns, or the first of it."""
    return result[0] if isinstance(result, tuple) else result
