"""How the layers of a stack are cut into jobs: groups that are extracted together, eigen shards, tiles of inner products.

Sizes follow from dimensions and options alone, never from the machine. Nothing here imports torch.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from headgram.geometry.costs import Sizes, cheapest, flops, spectra_flops
from headgram.study.lock import LockedCircuit, LockedStack
from headgram.study.options import Config

#: What one core does, roughly; only the sizes of jobs follow from it.
_FLOPS_PER_SECOND = 40e9
#: A job should take about this long, so that starting it is noise: half a second here, three on a cluster's node.
_JOB_SECONDS = 10.0
#: The same of a tile of inner products: fewer and larger ones cost fewer operations, but a tile is also what a crash can lose.
_TILE_SECONDS = 300.0
#: Operations up to which all heads are multiplied with all heads where the options leave it open.
MOST_PAIR_FLOPS = 2e14
_STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

Layers = tuple[int, ...]


@dataclass(frozen=True)
class HeadsPlan:
    """How the layers of one circuit of a stack are cut into jobs: names and layers, in order.

    Attributes
    ----------
    all_pairs
        Whether every two heads are multiplied, or only those of the same index.
    groups
        Layers extracted together, one weights file each.
    shards
        Layers whose spectra one job measures.
    tiles
        Layers along one side of a Gram tile; tile `i` and all tiles from `i` on make row `i`.
    """

    stack: LockedStack
    locked: LockedCircuit
    all_pairs: bool
    groups: dict[str, Layers]
    shards: dict[str, Layers]
    tiles: tuple[Layers, ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows of tiles."""
        return tuple(f"row-{i:03d}" for i in range(len(self.tiles)))

    def groups_of(self, layers: Layers) -> list[str]:
        """The groups that hold any of these layers."""
        wanted = set(layers)
        return [name for name, members in self.groups.items() if wanted & set(members)]

    def row(self, name: str) -> tuple[Layers, ...]:
        """The tiles of a row: its own first, then all later ones."""
        return self.tiles[self.rows.index(name) :]

    def row_layers(self, name: str) -> Layers:
        """All layers that a row reads."""
        return tuple(layer for tile in self.row(name) for layer in tile)


def plan_heads(stack: LockedStack, circuit: str, config: Config) -> HeadsPlan:
    """Cut the layers of one circuit of a stack into jobs."""
    locked = stack.circuits[circuit]
    heads, rank, width, budget = stack.heads, locked.rank, stack.hidden, config.memory_budget
    stored = stored_bytes(locked, config)
    layer_bytes = (heads + stack.kv_heads) * rank * width * stored

    eigen_seconds = spectra_flops(heads, stack.kv_heads, rank, width) / _FLOPS_PER_SECOND
    directions = 4 * 4 * heads * min(config.eigen.topk, rank) * width
    group = budget // 4 // layer_bytes
    shard = min(_JOB_SECONDS / eigen_seconds, budget // 4 // directions)
    all_pairs = config.gram.pairs == "all" or (
        config.gram.pairs == "auto" and _tile_flops(stack, rank, len(stack.layers), True) <= MOST_PAIR_FLOPS
    )
    affordable = _TILE_SECONDS * _FLOPS_PER_SECOND
    lasting = [n for n in range(1, len(stack.layers) + 1) if _tile_flops(stack, rank, n, all_pairs) <= affordable]
    # Of one index at a time, the weights of the layers of both sides of a tile, as stored and in float32, beside products of a
    # constant size; of all heads, blocks of a constant size, and the results.
    fitting = math.isqrt(budget // 4 // 128) // heads if all_pairs else budget // 2 // (2 * 2 * rank * width * (stored + 4))
    tile = min(max(lasting, default=1), max(1, fitting))
    if config.eigen.layers_per_job != "auto":
        shard = config.eigen.layers_per_job
    if config.gram.layers_per_tile != "auto":
        tile = config.gram.layers_per_tile
    return HeadsPlan(
        stack=stack,
        locked=locked,
        all_pairs=all_pairs,
        groups=_named(_cut(stack.layers, group)),
        shards=_named(_cut(stack.layers, shard)),
        tiles=tuple(_cut(stack.layers, tile)),
    )


def stored_bytes(locked: LockedCircuit, config: Config) -> int:
    """Bytes of a number of extracted factors."""
    return {"stored": _STORED_BYTES.get(locked.dtype, 4), "bfloat16": 2, "float32": 4}[config.weights.dtype]


def _tile_flops(stack: LockedStack, rank: int, layers: int, all_pairs: bool) -> float:
    """Operations of a tile of some layers with themselves."""
    if not all_pairs:
        sizes = Sizes.unshared(layers, layers, rank, stack.hidden, same=True)
        return stack.heads * flops(cheapest(sizes), sizes)
    own, shared = layers * stack.heads, layers * stack.kv_heads
    sizes = Sizes((own, own), (shared, shared), (own, own), (rank, rank), stack.hidden, same=True)
    return flops(cheapest(sizes), sizes)


def composition_flops(qk: HeadsPlan, ov: HeadsPlan) -> float:
    """Operations of all compositions of a stack, and of all its kernels of spans.

    Every head is composed with every head: by queries, keys and values, by the first two also in the mean over offsets.
    """
    count = len(qk.stack.layers) * qk.stack.heads
    both = (count, count)
    of_kinds = [
        Sizes(both, both, both, (reading.locked.rank, ov.locked.rank), qk.stack.hidden, same=False, symmetric=True)
        for reading in (*(qk,) * (4 if turns(qk) else 2), ov)
    ]
    spans, rank = (2 * (count + len(qk.stack.layers) * qk.stack.kv_heads),) * 2, max(qk.locked.rank, ov.locked.rank)
    of_kinds.append(Sizes(spans, spans, spans, (rank, rank), qk.stack.hidden, same=True, symmetric=True))
    return sum(flops(cheapest(sizes), sizes) for sizes in of_kinds)


def turns(heads: HeadsPlan) -> bool:
    """Whether positions are known to turn queries and keys."""
    return heads.stack.around is not None and heads.stack.around.turns


def _cut(layers: Layers, size: float) -> list[Layers]:
    """Cut into the fewest parts of at most `size` layers, of nearly equal length."""
    count = math.ceil(len(layers) / max(1, int(size)))
    borders = [round(i * len(layers) / count) for i in range(count + 1)]
    return [layers[start:stop] for start, stop in itertools.pairwise(borders)]


def _named(parts: list[Layers]) -> dict[str, Layers]:
    return {f"layers-{part[0]:03d}-{part[-1]:03d}": part for part in parts}
