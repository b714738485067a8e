"""Extracted factors: the `.pt` files between extraction and measurement."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.forms.circuits import CIRCUITS, shared_head
from headgram.forms.heads import Heads
from headgram.geometry.costs import Block, blocks
from headgram.results.files import written_whole
from headgram.results.record import check, record_of


def write_factors(path: Path, layers: Sequence[int], factors: Mapping[str, Float[Tensor, "layers heads rank width"]]) -> None:
    """Write the factors of a group of layers, by role: queries `(n, H, r, d)`, keys `(n, K, r, d)`, …"""
    with written_whole(path) as file:
        torch.save({"layers": list(layers), **factors}, file)


class FactorFiles:
    """The factors of one circuit of some layers, in checked files.

    A file is mapped for as long as something is read of it, no longer: pages once read would count as memory of the job.
    """

    def __init__(self, paths: Sequence[Path], key: str, circuit: str) -> None:
        self._circuit = CIRCUITS[circuit]
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

    def blocks(self, layers: Sequence[int]) -> list[Block]:
        """The heads of some layers in order, in blocks of bounded size: of whole layers, or of a layer's heads."""
        return blocks(layers, self.heads, self.rank, self.width)

    def read(self, layers: Sequence[int], heads: range | None = None) -> Heads:
        """The heads of some layers, all of them or those of neighbouring indices, layer by layer.

        Raises
        ------
        KeyError
            If no file holds a layer.
        """
        heads = heads if heads is not None else range(self.heads)
        reads = shared_head(self.heads, self.kv_heads)[heads.start : heads.stop]
        first, last = int(reads[0]), int(reads[-1])
        own, shared = [], []
        for path, places in itertools.groupby((self._home[layer] for layer in layers), key=lambda home: home[0]):
            group = _mapped(path)
            for _, i in places:
                own.append(group[self._circuit.own][i, heads.start : heads.stop].clone())
                shared.append(group[self._circuit.shared][i, first : last + 1].clone())
        return self._circuit.heads(torch.stack(own), torch.stack(shared), reads - first)


def _mapped(path: Path) -> dict[str, Any]:
    group: dict[str, Any] = torch.load(path, mmap=True, weights_only=True)
    return group
