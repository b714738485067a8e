"""Extracted weights: the `.pt` files between extraction and measurement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from headgram.artifacts import check, record_of, written_whole


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
    """Query and key weights of some layers, mapped from checked files; pages are read on use."""

    def __init__(self, paths: Sequence[Path], key: str) -> None:
        self._home: dict[int, tuple[dict[str, Tensor], int]] = {}
        for path in paths:
            check(record_of(path), key)
            group = torch.load(path, mmap=True, weights_only=True)
            self._home.update({layer: (group, i) for i, layer in enumerate(group["layers"])})

    def layer(self, layer: int) -> tuple[Float[Tensor, "heads rank hidden"], Float[Tensor, "kv_heads rank hidden"]]:
        """`W_Q (H, r, d)` and `W_K (K, r, d)` of one layer."""
        group, i = self._home[layer]
        return group["w_q"][i], group["w_k"][i]

    def run(
        self, layers: Sequence[int], device: str
    ) -> tuple[Float[Tensor, "layers heads rank hidden"], Float[Tensor, "layers kv_heads rank hidden"]]:
        """The weights of several layers, stacked, on a device."""
        pairs = [self.layer(layer) for layer in layers]
        return torch.stack([q for q, _ in pairs]).to(device), torch.stack([k for _, k in pairs]).to(device)
