"""Extracted weights: the `.pt` files between extraction and measurement."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.artifacts import check, record_of
from headgram.files import written_whole


def write_weights(
    path: Path,
    layers: Sequence[int],
    w_q: Float[Tensor, "layers heads rank hidden"],
    w_k: Float[Tensor, "layers kv_heads rank hidden"],
) -> None:
    """Write the weights of a group of layers."""
    with written_whole(path) as file:
        torch.save({"layers": list(layers), "w_q": w_q, "w_k": w_k}, file)


class Weights:
    """Query and key weights of some layers, in checked files.

    A file is mapped for as long as something is read of it, no longer: pages once read would count as memory of the job.
    """

    def __init__(self, paths: Sequence[Path], key: str) -> None:
        self._home: dict[int, tuple[Path, int]] = {}
        for path in paths:
            check(record_of(path), key)
            self._home.update({layer: (path, i) for i, layer in enumerate(_mapped(path)["layers"])})

    def layer(self, layer: int) -> tuple[Float[Tensor, "heads rank hidden"], Float[Tensor, "kv_heads rank hidden"]]:
        """`W_Q (H, r, d)` and `W_K (K, r, d)` of one layer."""
        path, i = self._home[layer]
        group = _mapped(path)
        return group["w_q"][i].clone(), group["w_k"][i].clone()

    @property
    def heads(self) -> tuple[int, int]:
        """`H` and `K`."""
        group = _mapped(next(path for path, _ in self._home.values()))
        return len(group["w_q"][0]), len(group["w_k"][0])

    @property
    def layer_bytes(self) -> int:
        """Bytes of the weights of one layer, as stored."""
        group = _mapped(next(path for path, _ in self._home.values()))
        return int(group["w_q"][0].nbytes + group["w_k"][0].nbytes)

    def of_heads(
        self, layers: Sequence[int], heads: range, kv_heads: range
    ) -> tuple[Float[Tensor, "layers some_heads rank hidden"], Float[Tensor, "layers some_kv_heads rank hidden"]]:
        """The weights of neighbouring query heads and of neighbouring key heads in several layers."""
        queries, keys = [], []
        for path, places in itertools.groupby((self._home[layer] for layer in layers), key=lambda home: home[0]):
            group = _mapped(path)
            for _, i in places:
                queries.append(group["w_q"][i, heads.start : heads.stop].clone())
                keys.append(group["w_k"][i, kv_heads.start : kv_heads.stop].clone())
        return torch.stack(queries), torch.stack(keys)


def _mapped(path: Path) -> dict[str, Any]:
    group: dict[str, Any] = torch.load(path, mmap=True, weights_only=True)
    return group
