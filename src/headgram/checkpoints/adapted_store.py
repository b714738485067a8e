"""Weights and an adapter's factors, with the sums in the place of both.

A low-rank adapter (LoRA, DoRA) keeps two factors for each weight that it changes: `W + s B A`. DoRA brings every row of that to
a length of its own. The sum is made in float64 and given as float32, or as float64 where the base is: rounded to 16 bits, as
many bases are stored, most of a small change would be lost.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from headgram.checkpoints.sources import HUB_DIGEST
from headgram.checkpoints.stores import TensorStore, cut_of
from headgram.checkpoints.views import View
from headgram.errors import HeadgramError
from headgram.families.layouts import Cut

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

#: Numbers that are summed at once.
_BLOCK = 2**22


@dataclass(frozen=True)
class Change:
    """What an adapter makes of one weight.

    Attributes
    ----------
    base
        The weight that is changed; of one that is replaced, what replaces it.
    factors
        By part (`lora_A`, `lora_B`, `lora_magnitude_vector`, …) the stored tensor; empty if the weight is replaced.
    scale
        `s`.
    problem
        Why the result cannot be read, if it cannot.
    """

    base: str
    factors: Mapping[str, str] = field(default_factory=dict)
    scale: float = 1.0
    problem: str | None = None


class AdaptedStore(View):
    """A store that holds weights and an adapter's factors, with the sums in the place of both.

    Parameters
    ----------
    store
        The store of both.
    changes
        By the name of a weight, what becomes of it.
    transposed
        Whether the settings say that weights are stored `(in, out)`. Shapes and biases are believed first: an adapter may
        change weights of both kinds, and peft states only the kind of the last one.
    names
        The weights' names, changed or not.
    """

    def __init__(self, store: TensorStore, changes: Mapping[str, Change], transposed: bool, names: Iterable[str]) -> None:
        super().__init__(store)
        self._changes = changes
        self._transposed = transposed
        self._untouched = {name for name in names if name not in changes}

    def sources(self, name: str) -> list[str]:
        change = self._changes.get(name)
        return [change.base, *change.factors.values()] if change else [name]

    def is_stored(self, name: str) -> bool:
        return not self._changes.get(name) and super().is_stored(name)

    def __contains__(self, name: str) -> bool:
        return name in self._changes or (name in self._untouched and name in self._store)

    def names(self) -> Collection[str]:
        return [*self._untouched, *self._changes]

    def shape(self, name: str) -> tuple[int, ...]:
        self._check_readable(name)
        shape = self._store.shape(self.sources(name)[0])
        if (change := self._changes.get(name)) and change.factors:
            self._is_transposed(name, change, shape)
        return shape

    def dtype(self, name: str) -> str:
        self._check_readable(name)
        words = [self._store.dtype(source) for source in self.sources(name)]
        return f"{words[0]}+LoRA" if len(words) > 1 else words[0]

    def _check_readable(self, name: str) -> None:
        if (change := self._changes.get(name)) and change.problem:
            raise HeadgramError(change.problem)

    def pin(self, names: Iterable[str]) -> str | None:
        names = list(names)
        pinned = super().pin(names)
        scales = b"".join(self._scale_bytes(name) for name in names)
        if pinned is None or not scales:
            return pinned
        return HUB_DIGEST + hashlib.blake2b(pinned.encode() + scales, digest_size=16).hexdigest()

    def raw(self, name: str, cut: Cut | None = None) -> memoryview:
        return memoryview(bytes(super().raw(name, cut)) + self._scale_bytes(name))

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        self.dtype(name)
        return super().read(name, cut) if self.is_stored(name) else cut_of(self._changed(name), cut)

    def _changed(self, name: str) -> Tensor:
        change = self._changes[name]
        base = self._store.read(change.base)
        if not change.factors:
            return base
        factors = {part: self._store.part(key) for part, key in change.factors.items()}
        if "bias" in factors:
            return (base.double() + change.scale * factors["bias"].double()).to(_result_dtype(base))
        if "lora_embedding_A" in factors:
            left, right = factors["lora_embedding_A"].T, factors["lora_embedding_B"].T
        else:
            left, right = factors["lora_B"], factors["lora_A"]
        turned = self._is_transposed(name, change, tuple(base.shape))
        result = merge(base.T if turned else base, left, right, change.scale, factors.get("lora_magnitude_vector"))
        return result.T.contiguous() if turned else result

    def _scale_bytes(self, name: str) -> bytes:
        change = self._changes.get(name)
        return struct.pack("<d", change.scale) if change and change.factors else b""

    def _is_transposed(self, name: str, change: Change, shape: tuple[int, ...]) -> bool:
        """Whether a weight is stored `(in, out)`.

        Its shape says so, unless it is square. Then it is stored as others of its layer are, or else as the settings say.

        Raises
        ------
        HeadgramError
            If the factors fit its shape in neither way.
        """
        shapes = {part: self._store.shape(key) for part, key in change.factors.items()}
        if "bias" in shapes:
            fitting = {shapes["bias"]: False}
        else:
            embedding = "lora_embedding_A" in shapes
            inner, outer = (shapes[f"lora_embedding_{which}" if embedding else f"lora_{which}"] for which in "AB")
            fits = len(inner) == len(outer) == 2 and inner[0] == outer[1]
            fits = fits and math.prod(shapes.get("lora_magnitude_vector", outer[:1])) == outer[0]
            whole = (outer[0], inner[1]) if fits else ()
            turned = whole[::-1]
            fitting = {turned: True, whole: False}
            if whole == turned == shape:
                fitting = {shape: self._by_layer.get(_layer_of(name), self._transposed)}
            fitting = {turned: False} if embedding else fitting  # an embedding is stored as (tokens, width)
        if shape not in fitting:
            stated = ", ".join(f"{part} {found}" for part, found in shapes.items())
            raise HeadgramError(f"the adapter's factors of {name} ({stated}) do not fit its shape {shape}: name the right base")
        return fitting[shape]

    @cached_property
    def _by_layer(self) -> dict[str, bool]:
        """By layer, whether weights are stored `(in, out)`: a bias is as long as the output of a weight that is not square."""
        ways: dict[str, set[bool]] = defaultdict(set)
        for bias in (name for name in self.names() if name.endswith(".bias")):
            weight = f"{bias.removesuffix('bias')}weight"
            with suppress(HeadgramError):  # what cannot be read tells nothing
                shape = self._base_shape(weight)
                if len(shape) == 2 and shape[0] != shape[1]:
                    ways[_layer_of(bias)] |= {axis == 1 for axis in (0, 1) if self._base_shape(bias) == (shape[axis],)}
        return {layer: way.pop() for layer, way in ways.items() if len(way) == 1}

    def _base_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight before it is changed; empty if there is no such weight."""
        source = self.sources(name)[0]
        return self._store.shape(source) if source in self._store else ()


def _layer_of(name: str) -> str:
    """What a name begins with, up to the number of its layer."""
    found = re.match(r".*?\.\d+\.", f".{name}")
    return found[0] if found else ""


def merge(
    weight: Float[Tensor, "out in"],
    left: Float[Tensor, "out r"],
    right: Float[Tensor, "r in"],
    scale: float,
    lengths: Tensor | None = None,
) -> Float[Tensor, "out in"]:
    """`weight + scale left right`, its rows brought to the given lengths, if any; float64 if `weight` is, else float32.

    Examples
    --------
    >>> import torch
    >>> merge(torch.eye(2), torch.ones(2, 1), torch.ones(1, 2), 0.5)
    tensor([[1.5000, 0.5000],
            [0.5000, 1.5000]])
    """
    import torch

    result = torch.empty(weight.shape, dtype=_result_dtype(weight))
    right = right.double()
    step = max(1, _BLOCK // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        block = weight[rows].double() + scale * (left[rows].double() @ right)
        if lengths is not None:
            block *= (lengths.double().flatten()[rows] / torch.linalg.vector_norm(block, dim=1))[:, None]
        result[rows] = block
    return result


def _result_dtype(base: Tensor) -> torch.dtype:
    import torch

    return torch.float64 if base.dtype == torch.float64 else torch.float32
