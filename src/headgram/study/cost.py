"""What a plan costs, before anything runs: jobs, operations, bytes and, on paper, seconds of a GPU.

A roofline: a stage takes as long as its operations at the GPU's peak, or as the bytes that go through its memory if that is
longer; and then as long as copies to the GPU take, which do not overlap with work. No kernel reaches the peak, and the
eigensolver least, so these are the least times: measured ones are held against them. Imports no torch.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from headgram.geometry.costs import GPU, TENSOR_CORES, Route, Sizes, blocks, cheapest, flops, spectra_flops, traffic
from headgram.study.jobs import HeadsPlan, Layers, stored_bytes
from headgram.study.options import Config
from headgram.study.plan import Plan

#: The stages that compute on a GPU, where there is one.
STAGES = ("eigen", "gram", "derive")
#: How often the weights of a batch go through memory while its spectra are measured: products, triangles, directions, checks.
_PASSES = 8
#: Terms that tensor cores are taken to add up accurately.
_LONGEST = 4096


@dataclass(frozen=True)
class Gpu:
    """What a GPU does at most, as its maker says: operations a second by precision, and bytes a second."""

    name: str
    flops: dict[str, float]  # of dense products, on tensor cores where these have the precision
    memory: float
    link: float  # one way, from the host


GPUS = (
    Gpu("H100", {"float64": 67e12, "float32": 67e12, "bfloat16": 989e12}, 3.35e12, 64e9),
    Gpu("H200", {"float64": 67e12, "float32": 67e12, "bfloat16": 989e12}, 4.8e12, 64e9),
    Gpu("A100", {"float64": 19.5e12, "float32": 19.5e12, "bfloat16": 312e12}, 2.04e12, 32e9),
    Gpu("L4", {"float64": 0.47e12, "float32": 30.3e12, "bfloat16": 121e12}, 0.3e12, 32e9),
)


@dataclass
class Work:
    """What some jobs do.

    Attributes
    ----------
    flops
        Operations, by precision.
    memory, copied
        Bytes through a GPU's memory, and bytes copied to it.
    distinct
        How many different bytes are copied.
    """

    jobs: int = 0
    flops: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    memory: float = 0
    copied: float = 0
    distinct: float = 0

    @property
    def copies(self) -> float:
        """How often each byte of the weights is copied to a GPU."""
        return self.copied / self.distinct if self.distinct else 0.0

    def seconds(self, gpu: Gpu) -> float:
        """The least time of one GPU."""
        return max(sum(count / gpu.flops[kind] for kind, count in self.flops.items()), self.memory / gpu.memory) + (
            self.copied / gpu.link
        )

    def add(self, other: Work) -> None:
        """Add what other jobs do."""
        self.jobs += other.jobs
        for kind, count in other.flops.items():
            self.flops[kind] += count
        self.memory += other.memory
        self.copied += other.copied
        self.distinct += other.distinct


def costs(plan: Plan) -> dict[str, Work]:
    """What each stage does that computes on GPUs, for all models of a plan.

    Examples
    --------
    >>> from headgram.study.cost import GPUS, costs
    >>> from headgram.study.options import Config
    >>> from headgram.study.plan import Plan
    >>> nothing = costs(Plan(Config(), {}, [], "", "", ""))
    >>> nothing["eigen"].seconds(GPUS[0])
    0.0
    """
    found = {stage: Work() for stage in STAGES}
    for model in plan.models.values():
        found["derive"].jobs += 1
        for (circuit, _), heads in model.heads.items():
            found["eigen"].add(_eigen(heads, plan.config, plan.config.original.enabled and circuit == "qk"))
            found["gram"].add(_gram(heads, plan.config))
            found["derive"].add(_derive(heads, plan.config.eigen.topk))
    return found


def _layer_bytes(plan: HeadsPlan, config: Config) -> int:
    stack = plan.stack
    return (stack.heads + stack.kv_heads) * plan.locked.rank * stack.hidden * stored_bytes(plan.locked, config)


def _eigen(plan: HeadsPlan, config: Config, original: bool) -> Work:
    stack, rank, layers = plan.stack, plan.locked.rank, len(plan.stack.layers)
    copied = float(layers * _layer_bytes(plan, config))
    work = Work(len(plan.shards), copied=copied, distinct=copied)
    work.flops["float64"] = layers * spectra_flops(stack.heads, stack.kv_heads, rank, stack.hidden)
    work.memory = _PASSES * 8.0 * layers * 2 * stack.heads * rank * stack.hidden
    if original:  # the product of both factors, its singular values from a problem of twice the size
        work.flops["float32"] = layers * stack.heads * 2.0 * rank**2 * stack.hidden
        work.flops["float64"] += layers * stack.heads * 30.0 * (2 * rank) ** 3
    return work


def _gram(plan: HeadsPlan, config: Config) -> Work:
    work = Work(len(plan.tiles), distinct=float(len(plan.stack.layers) * _layer_bytes(plan, config)))
    met = Counter[tuple[Sizes, int]]()
    for name in plan.rows:
        for sizes, copied, count in (_block_pairs if plan.all_pairs else _layer_pairs)(plan, name):
            met[sizes, copied] += count
    stored = stored_bytes(plan.locked, config)
    weights = "float64" if stored == 8 else "bfloat16" if plan.locked.dtype == "BF16" and stored == 2 else "float32"
    longest = _LONGEST if weights == "bfloat16" else GPU.longest
    for (sizes, copied), count in met.items():
        route = cheapest(sizes, TENSOR_CORES if weights == "bfloat16" else GPU)
        for kind, operations in _by_precision(route, sizes, weights):
            work.flops[kind] += count * operations
        if not sizes.same:  # of other blocks, the norms of both sides, which say what is accurate
            work.flops[weights] += count * 2.0 * (sum(sizes.left) + sum(sizes.right)) * sizes.rank[0] ** 2 * sizes.width
        work.memory += count * traffic(route, sizes, longest) * (2 if weights == "float64" else 1)
        work.copied += count * copied * stored
    return work


def _by_precision(route: Route, sizes: Sizes, weights: str) -> Iterator[tuple[str, float]]:
    """Products of weights, and those of the forms that they make, which are as wide as the results."""
    if route == "products":
        yield weights, flops(route, sizes)
    else:
        yield weights, float(sizes.formed)
        yield "float64" if weights == "float64" else "float32", sizes.summed


def _block_pairs(plan: HeadsPlan, row: str) -> Iterator[tuple[Sizes, int, int]]:
    """Blocks of heads that are multiplied with one another, how many numbers are copied to a GPU for that, and how often."""
    stack, rank = plan.stack, plan.locked.rank
    own, *_ = tiles = plan.row(row)

    def sides(layers: Layers) -> list[tuple[int, int]]:
        """Heads of each block, and the shared factors that they read."""
        cut = blocks(layers, stack.heads, rank, stack.hidden)
        return [(len(some) * len(heads), len(some) * _shared(plan, heads)) for some, heads in cut]

    for tile in tiles:
        same, xs, ys = tile == own, sides(own), sides(tile)
        for i, x in enumerate(xs):
            for j in range(i if same else 0, len(ys)):
                itself = same and i == j
                heads, shared = zip(x, ys[j], strict=True)
                first = j == (i if same else 0)  # a block of the row stays while it meets those of the tile
                numbers = (sum(x) if first else 0) + (0 if itself else sum(ys[j]))
                yield Sizes(heads, shared, heads, (rank, rank), stack.hidden, itself), numbers * rank * stack.hidden, 1


def _shared(plan: HeadsPlan, heads: Sequence[int]) -> int:
    """How many shared factors neighbouring heads read."""
    first, last = (head * plan.stack.kv_heads // plan.stack.heads for head in (heads[0], heads[-1]))
    return last - first + 1


def _layer_pairs(plan: HeadsPlan, row: str) -> Iterator[tuple[Sizes, int, int]]:
    """The same of heads of one index: both sides of a tile, for each index; the shared factors once for all that read them."""
    stack, rank = plan.stack, plan.locked.rank
    own, *_ = tiles = plan.row(row)
    for tile, (factors, count) in itertools.product(tiles, ((2, stack.kv_heads), (1, stack.heads - stack.kv_heads))):
        same = tile == own
        numbers = factors * (len(own) + (0 if same else len(tile))) * rank * stack.hidden
        yield Sizes.unshared(len(own), len(tile), rank, stack.hidden, same), numbers, count


def _derive(plan: HeadsPlan, topk: int) -> Work:
    """Overlaps of directions on three sides: of equal indices in float64, of all heads in float32."""
    stack, layers = plan.stack, len(plan.stack.layers)
    kept, count = min(topk, plan.locked.rank), layers * stack.heads
    work = Work(distinct=3 * 4.0 * count * kept * stack.hidden)
    work.copied = 2 * work.distinct
    for kind, sets, heads in (("float64", stack.heads, layers), ("float32", 1, count)):
        both = heads, heads
        sizes = Sizes(both, both, both, (kept, kept), stack.hidden, same=True, symmetric=True)
        route = cheapest(sizes, GPU)
        work.flops[kind] = 3 * sets * flops(route, sizes)
        work.memory += 3 * sets * traffic(route, sizes, GPU.longest) * (2 if kind == "float64" else 1)
    return work


def table(found: dict[str, Work]) -> str:
    """A row for each stage, in Markdown."""
    kinds = ("float64", "float32", "bfloat16")
    head = ["stage", "jobs", *(f"TFLOP {kind}" for kind in kinds), "GB in memory", "GB copied", "times each"]
    head += [f"{gpu.name}, s" for gpu in GPUS]
    lines = [head, ["---"] * len(head)]
    for stage, work in found.items():
        numbers = [*(work.flops[kind] / 1e12 for kind in kinds), work.memory / 1e9, work.copied / 1e9, work.copies]
        numbers += [work.seconds(gpu) for gpu in GPUS]
        lines.append([stage, str(work.jobs), *(f"{number:,.0f}" if number >= 100 else f"{number:.2g}" for number in numbers)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
