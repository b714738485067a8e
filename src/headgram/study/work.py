"""What the jobs of a stage do on a GPU: operations, bytes, kernels. Counted from shapes alone; imports no torch."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from headgram.forms.variants import FOLDED, Variant
from headgram.geometry.costs import (
    BLOCK_BYTES,
    GPU,
    KEPT_SPANS,
    LAYERS_BYTES,
    ORIGINAL_BYTES,
    SPECTRA_BYTES,
    TENSOR_CORES,
    Route,
    Sizes,
    block_lengths,
    block_sizes,
    blocks,
    cheapest,
    flops,
    launches,
    pairs_of,
    spectra_flops,
    spectrum_bytes,
    traffic,
)
from headgram.results.paths import between_streams
from headgram.study.forms import why_not
from headgram.study.jobs import HeadsPlan, Layers, stored_bytes, turns
from headgram.study.lock import LockedStack
from headgram.study.options import Config
from headgram.study.plan import ModelPlan

#: How often the weights of a block go through memory while its spectra are measured: products, triangles, directions, checks.
_PASSES = 8
#: The same while the forms of their products are made.
_PASSES_OF_ENDS = 4
#: Terms that tensor cores are taken to add up accurately.
_LONGEST = 4096
#: How often small matrices of every head go through memory while it is measured how forms turn.
_PASSES_OF_TURNS = 50
#: What it takes to look at one pair of heads closely: QR; an SVD and eigenvalues.
_QR, _SMALL = 8, 60
#: The same of how a factor changed, three QR factorisations and two products, and of how a form did, of up to twice its rank.
_CHANGED_FACTOR, _CHANGED_FORM = 22, 160
#: About how many kernels a GPU is told to run: for the spectra of a block of heads, the scores of a layer, eigenvalues, the
#: original script's numbers of a block, and the rotary measures of a layer;
_SPECTRA, _SCORES, _EIGENVALUES, _ORIGINAL, _TURNING = 356, 78, 20, 87, 380
#: for what a block of heads reads or writes, the same where positions turn it, spans, pairs that are looked at closely, and the
#: changes of a layer's heads.
_ENDS, _TURNED_ENDS, _SPANS, _CLOSELY, _CHANGED = 55, 70, 48, 110, 234
#: Seconds that PyTorch takes to tell a GPU to run a kernel, at least, whichever GPU it is.
LAUNCH = 5e-6


@dataclass(frozen=True)
class Gpu:
    """What a GPU does at most, as its maker says: operations a second by precision, and bytes a second."""

    name: str
    flops: dict[str, float]  # of dense products, on tensor cores where these have the precision
    memory: float
    link: float  # one way, from the host


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
    launches
        How many kernels the GPU is told to run.
    """

    jobs: int = 0
    flops: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    memory: float = 0
    copied: float = 0
    distinct: float = 0
    launches: int = 0

    @property
    def copies(self) -> float:
        """How often each byte of the weights is copied to a GPU."""
        return self.copied / self.distinct if self.distinct else 0.0

    def seconds(self, gpu: Gpu) -> float:
        """The least time of one GPU."""
        operations = sum(count / gpu.flops[kind] for kind, count in self.flops.items())
        return max(operations, self.memory / gpu.memory, self.launches * LAUNCH) + self.copied / gpu.link

    def add(self, other: Work, times: int = 1) -> None:
        """Add what other jobs do, so many times."""
        self.jobs += times * other.jobs
        for kind, count in other.flops.items():
            self.flops[kind] += times * count
        self.memory += times * other.memory
        self.copied += times * other.copied
        self.distinct += times * other.distinct
        self.launches += times * other.launches


def _layer_bytes(plan: HeadsPlan, config: Config) -> int:
    stack = plan.stack
    return (stack.heads + stack.kv_heads) * plan.locked.rank * stack.hidden * stored_bytes(plan.locked, config)


def of_eigen(plan: HeadsPlan, config: Config, circuit: str) -> Work:
    """Spectra and scores of one circuit of a stack."""
    stack, rank, layers = plan.stack, plan.locked.rank, len(plan.stack.layers)
    copied = float(layers * _layer_bytes(plan, config))
    work = Work(len(plan.shards), copied=copied, distinct=copied)
    work.flops["float64"] = layers * spectra_flops(stack.heads, stack.kv_heads, rank, stack.hidden)
    work.memory = _PASSES * 8.0 * layers * 2 * stack.heads * rank * stack.hidden
    at_once = Counter[int]()  # layers that are measured at once
    for shard in plan.shards.values():
        at_once += block_lengths(len(shard), max(1, LAYERS_BYTES // _layer_bytes(plan, config)))

    def batches(heads: int) -> int:
        return sum(times * math.ceil(count * stack.heads / max(1, heads)) for count, times in at_once.items())

    size = SPECTRA_BYTES["cuda"] // spectrum_bytes(rank, stack.hidden, config.eigen.topk)
    work.launches = _SPECTRA * batches(size) + _SCORES * layers
    if Variant.of(circuit).circuit == "ov" and not between_streams(stack.name):
        work.launches += _EIGENVALUES * at_once.total()
    if config.original.enabled and circuit == "qk":  # from the product of both factors, by a problem of twice the size
        work.flops["float32"] = layers * stack.heads * 2.0 * rank**2 * stack.hidden
        work.flops["float64"] += layers * stack.heads * 30.0 * (2 * rank) ** 3
        work.launches += _ORIGINAL * batches(ORIGINAL_BYTES // (8 * rank * stack.hidden))
    return work


def of_gram(plan: HeadsPlan, config: Config) -> Work:
    """Inner products of one circuit of a stack: of all heads with all heads, or of those of equal indices."""
    work = Work(len(plan.tiles), distinct=float(len(plan.stack.layers) * _layer_bytes(plan, config)))
    met = Counter[Sizes]()
    for name in plan.rows:
        for sizes, copied, count in (_block_pairs if plan.all_pairs else _layer_pairs)(plan, name):
            met[sizes] += count
            work.copied += count * copied * stored_bytes(plan.locked, config)
    work.add(_inner(met, [plan], config))
    return work


def _inner(met: Counter[Sizes], plans: Sequence[HeadsPlan], config: Config) -> Work:
    """What inner products of blocks of heads take. `met` says how many pairs of blocks have each sizes."""
    work, stored = Work(), max(stored_bytes(plan.locked, config) for plan in plans)
    halves = all(plan.locked.dtype == "BF16" and stored_bytes(plan.locked, config) == 2 for plan in plans)
    weights = "float64" if stored == 8 else "bfloat16" if halves else "float32"
    longest = _LONGEST if weights == "bfloat16" else GPU.longest
    for sizes, count in met.items():
        route = cheapest(sizes, TENSOR_CORES if weights == "bfloat16" else GPU)
        for kind, operations in _by_precision(route, sizes, weights):
            work.flops[kind] += count * operations
        if not sizes.same:  # of other blocks, the norms of both sides, which say what is accurate
            work.flops[weights] += count * 2.0 * (sum(sizes.left) + sum(sizes.right)) * sizes.rank[0] ** 2 * sizes.width
        work.memory += count * traffic(route, sizes, longest) * (2 if weights == "float64" else 1)
        work.launches += count * launches(route, sizes, longest, exact=weights == "float64")
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
    for tile in tiles:
        same, xs, ys = tile == own, _sides(plan, own), _sides(plan, tile)
        for i, x in enumerate(xs):
            for j in range(i if same else 0, len(ys)):
                itself = same and i == j
                heads, shared = zip(x, ys[j], strict=True)
                first = j == (i if same else 0)  # a block of the row stays while it meets those of the tile
                numbers = (sum(x) if first else 0) + (0 if itself else sum(ys[j]))
                yield Sizes(heads, shared, heads, (rank, rank), stack.hidden, itself), numbers * rank * stack.hidden, 1


def _sides(plan: HeadsPlan, layers: Layers) -> list[tuple[int, int]]:
    """Heads of each block of some layers, and the shared factors that they read."""
    cut = blocks(layers, plan.stack.heads, plan.locked.rank, plan.stack.hidden, BLOCK_BYTES["cuda"])
    return [(len(some) * len(heads), len(some) * _shared(plan, heads)) for some, heads in cut]


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


def of_derive(plan: HeadsPlan, topk: int) -> Work:
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
        work.launches += 3 * sets * launches(route, sizes, GPU.longest, exact=kind == "float64")
    return work


def _folds(stack: LockedStack, circuit: str) -> bool:
    """Whether norms before a stack's heads are known, so that they are folded into the forms of a circuit."""
    return why_not(stack, Variant(circuit, FOLDED)) is None


def of_rotary(plan: HeadsPlan, config: Config) -> Work:
    """Products of queries and of keys, in float64, of each form; the small matrices of every head go through memory."""
    stack, rank, layers = plan.stack, plan.locked.rank, len(plan.stack.layers)
    work, forms = Work(distinct=float(layers * _layer_bytes(plan, config))), 1 + _folds(stack, "qk")
    work.copied = forms * work.distinct
    if not turns(plan):
        return work
    products = 2 * stack.heads + stack.kv_heads
    work.flops["float64"] = forms * layers * products * 2.0 * rank**2 * stack.hidden
    work.launches = forms * layers * _TURNING
    work.memory = forms * layers * 8.0 * (products * rank * stack.hidden + _PASSES_OF_TURNS * stack.heads * rank**2)
    return work


def of_composition(model: ModelPlan, name: str, config: Config) -> Work:
    """All compositions of a stack, the kernels of all spans, and the strongest pairs of each kind."""
    plans = {circuit: model.extracted[circuit, name] for circuit in ("qk", "ov")}
    work = Work(distinct=sum(float(len(plan.stack.layers) * _layer_bytes(plan, config)) for plan in plans.values()))
    writings: set[str] = set()  # of what is written, where one block holds all of it: formed once
    for kind, circuit in (("q", "qk"), ("k", "qk"), ("v", "ov")):
        reading = plans[circuit]
        crossing = between_streams(name) and kind != "q"  # keys and values are those of the encoder's stream
        if crossing and ("ov", "encoder") not in model.extracted:
            continue
        writing = model.extracted["ov", "encoder"] if crossing else plans["ov"]
        folded = _folds(reading.stack, circuit) and _folds(writing.stack, "ov")
        sides = 1 + (circuit == "qk" and turns(reading))
        work.add(_ends(reading, config, folded, sides))
        readers, writers = (
            block_sizes(len(each.stack.layers), each.stack.heads, each.locked.rank, each.stack.hidden, BLOCK_BYTES["cuda"])
            for each in (reading, writing)
        )
        formed = readers.total() if writers.total() > 1 else int(writing.stack.name not in writings)
        writings.add(writing.stack.name)
        work.add(_ends(writing, config, folded), times=formed)
        for (n_x, count_x), (n_y, count_y) in itertools.product(readers.items(), writers.items()):
            heads, ranks = (sides * n_x, n_y), (reading.locked.rank, writing.locked.rank)
            sizes = Sizes(heads, heads, heads, ranks, reading.stack.hidden, same=False, symmetric=True)
            work.add(_between(sizes), times=count_x * count_y)
        rank, width, pairs = reading.locked.rank, reading.stack.hidden, config.composition.strongest
        work.flops["float64"] += pairs * (_QR * rank**2 * width + _SMALL * rank**3)
        stored = 4 if folded else stored_bytes(reading.locked, config)
        work.copied += pairs * 2.0 * (rank + writing.locked.rank) * width * stored
        work.launches += _CLOSELY
    work.add(_kernels(plans, config))
    return work


def _ends(plan: HeadsPlan, config: Config, folded: bool, sides: int = 1) -> Work:
    """What heads read or write, as forms in float32 from products in float64; on two sides if positions turn what is read."""
    stack, rank, layers = plan.stack, plan.locked.rank, len(plan.stack.layers)
    factors, stored = layers * (stack.heads + stack.kv_heads), 4 if folded else stored_bytes(plan.locked, config)
    work = Work(copied=float(factors * rank * stack.hidden * stored))
    work.flops["float64"] = sides * (2.0 * factors * rank**2 * stack.hidden + layers * stack.heads * 4.0 * rank**3)
    work.flops["float64"] += (sides - 1) * factors * 30.0 * rank**3
    work.flops["float32"] = sides * layers * stack.heads * 2.0 * rank**2 * stack.hidden
    work.memory = sides * _PASSES_OF_ENDS * 8.0 * factors * rank * stack.hidden
    blocks_of_heads = block_sizes(layers, stack.heads, rank, stack.hidden, BLOCK_BYTES["cuda"]).total()
    work.launches = _ENDS * blocks_of_heads + (sides - 1) * _TURNED_ENDS * layers
    return work


def _kernels(plans: dict[str, HeadsPlan], config: Config) -> Work:
    """Spans of queries, keys, values and outputs, layer by layer in blocks, and the products of every two."""
    stack, rank = plans["qk"].stack, max(plan.locked.rank for plan in plans.values())
    folded = all(_folds(stack, circuit) for circuit in plans)
    roles = [stack.heads * 2, stack.kv_heads * 2] if between_streams(stack.name) else [2 * (stack.heads + stack.kv_heads)]
    work = Work()
    for spans in roles:
        most = max(1, BLOCK_BYTES["cuda"] // (4 * spans * rank * stack.hidden))
        cut = block_lengths(len(stack.layers), most)
        met = pairs_of(cut)
        read = cut.total() if cut.total() <= KEPT_SPANS["cuda"] else met.total()  # a block that is not kept is read again
        factors = spans * len(stack.layers) * read / cut.total()
        stored = 4 if folded else stored_bytes(plans["qk"].locked, config)
        work.copied += factors * rank * stack.hidden * stored
        work.flops["float64"] += 3.0 * factors * rank**2 * stack.hidden
        work.memory += _PASSES_OF_ENDS * 8.0 * factors * rank * stack.hidden
        work.launches += _SPANS * read * 4 // len(roles)
        for (one, other, same), times in met.items():
            heads = spans * one, spans * other
            sizes = Sizes(heads, heads, heads, (rank, rank), stack.hidden, same=same, symmetric=True)
            work.add(_between(sizes), times=times)
    return work


def _between(sizes: Sizes) -> Work:
    """Products of symmetric forms in float32."""
    work, route = Work(), cheapest(sizes, GPU)
    work.flops["float32"], work.memory = flops(route, sizes), traffic(route, sizes, GPU.longest)
    work.launches = launches(route, sizes, GPU.longest)
    return work


def of_lineage(new: HeadsPlan, old: HeadsPlan, config: Config) -> Work:
    """How each head changed, and inner products of the heads of both models: of all, or of those of each layer."""
    stack, rank, layers = new.stack, new.locked.rank, len(new.stack.layers)
    stored = [stored_bytes(plan.locked, config) for plan in (new, old)]
    work = Work(distinct=float(layers * sum(_layer_bytes(plan, config) for plan in (new, old))))
    work.copied = work.distinct
    factors = layers * (stack.heads + stack.kv_heads)
    work.flops["float64"] = _CHANGED_FACTOR * factors * rank**2 * stack.hidden + _CHANGED_FORM * layers * stack.heads * rank**3
    work.memory = _PASSES * 8.0 * 2 * factors * rank * stack.hidden
    work.launches = _CHANGED * layers * len(_sides(new, stack.layers[:1]))
    times, among = (1, stack.layers) if new.all_pairs and old.all_pairs else (layers, stack.layers[:1])
    sides, met = Counter(_sides(new, among)), Counter[Sizes]()
    for (x, count_x), (y, count_y) in itertools.product(sides.items(), repeat=2):
        heads, shared = zip(x, y, strict=True)
        met[Sizes(heads, shared, heads, (rank, rank), stack.hidden, same=False)] += times * count_x * count_y
    # Each block of the later model is copied once, and then meets all of the earlier one's.
    numbers = times * rank * stack.hidden * sum(sum(side) * count for side, count in sides.items())
    work.copied += numbers * (stored[0] + sides.total() * stored[1])
    work.add(_inner(met, (new, old), config))
    return work
