"""Extracted factors: the `.pt` files between extraction and measurement."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.errors import HeadgramError
from headgram.forms.circuits import CIRCUITS, shared_head
from headgram.forms.heads import Heads
from headgram.forms.reading import Frames
from headgram.forms.transforms import folded
from headgram.forms.variants import FOLDED, Variant, needs
from headgram.geometry.costs import Block, blocks
from headgram.results.around import read_around
from headgram.results.files import written_whole
from headgram.results.record import Provenance, check, record_of


def write_factors(path: Path, layers: Sequence[int], factors: Mapping[str, Float[Tensor, "layers heads rank width"]]) -> None:
    """Write the factors of a group of layers, by role: queries `(n, H, r, d)`, keys `(n, K, r, d)`, …"""
    with written_whole(path) as file:
        torch.save({"layers": list(layers), **factors}, file)


class FactorFiles:
    """The factors of one form of some layers, in checked files.

    A file is mapped for as long as something is read of it, no longer: pages once read would count as memory of the job.

    Parameters
    ----------
    paths, key
        Files of extracted factors, and the key of that extraction.
    form
        `qk` or `ov`, as extracted; or one that is made of them as they are read, as `qk-folded` (`headgram.forms.variants`).
    frames
        What stands around the projections, which such forms follow from.

    Raises
    ------
    HeadgramError
        If a file is damaged or has another key, or what the form follows from is not known.
    """

    def __init__(self, paths: Sequence[Path], key: str, form: str, frames: Frames | None = None) -> None:
        self._variant = Variant.of(form)
        self._circuit = CIRCUITS[self._variant.circuit]
        self._frames = frames or Frames({}, dict.fromkeys(needs(self._variant), f"{form} needs what stands around heads"))
        for role in needs(self._variant):
            if role in self._frames.missing:
                raise HeadgramError(f"the form {form} cannot be made: {self._frames.missing[role]}")
        self._home: dict[int, tuple[Path, int]] = {}
        for path in paths:
            check(record_of(path), key)
            self._home.update({layer: (path, i) for i, layer in enumerate(_mapped(path)["layers"])})
        first = _mapped(next(path for path, _ in self._home.values()))
        own, shared = (first[role][0] for role in self._circuit.roles)
        self.heads, self.kv_heads = len(own), len(shared)
        self.rank, self.width = own.shape[1:]
        #: Bytes of one layer's factors, as stored.
        self.layer_bytes = int(own.nbytes + shared.nbytes)

    @property
    def layers(self) -> list[int]:
        """The layers that the files hold, in order."""
        return sorted(self._home)

    @property
    def is_folded(self) -> bool:
        """Whether norms are folded into the forms."""
        return self._variant.norm == FOLDED

    def single(self, places: Sequence[tuple[int, int]]) -> Heads:
        """Single heads, each given as layer and index, in this order; with factors of their own."""
        found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for layer in sorted({layer for layer, _ in places}):
            heads = self.read([layer])
            found |= {(layer, head): (heads.left([head]), heads.right([head])) for each, head in places if each == layer}
        a, b = (torch.cat([found[place][side] for place in places]) for side in (0, 1))
        return Heads(a, b, torch.arange(len(places)), torch.arange(len(places)))

    def blocks(self, layers: Sequence[int], size: int) -> list[Block]:
        """The heads of some layers in order, in blocks of at most so many bytes: of whole layers, or of a layer's heads."""
        return blocks(layers, self.heads, self.rank, self.width, size)

    def read(self, layers: Sequence[int], heads: range | None = None, device: str = "cpu") -> Heads:
        """The heads of some layers, all of them or those of neighbouring indices, layer by layer.

        Parameters
        ----------
        device
            Where they are wanted: a layer after the other is copied there, so that only one is in the memory of the host.

        Raises
        ------
        KeyError
            If no file holds a layer.
        """
        heads = heads if heads is not None else range(self.heads)
        reads = shared_head(self.heads, self.kv_heads)[heads.start : heads.stop]
        first, last = int(reads[0]), int(reads[-1])
        own, shared = [], []
        of_own, of_shared = slice(heads.start, heads.stop), slice(first, last + 1)
        for path, of_path in itertools.groupby(layers, key=lambda layer: self._home[layer][0]):
            group = _mapped(path)
            for layer in of_path:
                _, i = self._home[layer]
                own.append(self._made(self._circuit.own, group, i, layer, of_own).to(device))
                shared.append(self._made(self._circuit.shared, group, i, layer, of_shared).to(device))
        return self._circuit.heads(torch.stack(own), torch.stack(shared), reads - first)

    def _made(self, role: str, group: Mapping[str, Tensor], place: int, layer: int, heads: slice) -> Tensor:
        """Some factors (n, r, width) of a layer, as the form has them: made in float64, and rounded once, to at least float32."""
        stored = group[role][place, heads].clone()
        if self._variant == self._variant.raw:
            return stored
        frame = self._frames.layers[layer]
        factors = folded(role, stored, frame, heads) if self._variant.norm == FOLDED else stored
        if role == "query" and self._variant.offset and frame.rotary is not None:
            factors = frame.rotary.scaled(frame.rotary.turned(factors, self._variant.offset))
        return factors.to(torch.promote_types(stored.dtype, torch.float32))


def factors_of(weights: Sequence[Path], around: tuple[Path, Path] | None, provenance: Provenance) -> FactorFiles:
    """The factors of the form that a job is about.

    Parameters
    ----------
    around
        What stands around the model's projections, and its record; None where the form does not follow from it.
    """
    assert provenance.circuit is not None
    assert provenance.stack is not None
    upstream = provenance.recipe.upstream
    frames = read_around(*around, upstream[1])[provenance.stack] if around else None
    return FactorFiles(weights, upstream[0], provenance.circuit, frames)


def _mapped(path: Path) -> dict[str, Any]:
    group: dict[str, Any] = torch.load(path, mmap=True, weights_only=True)
    return group
