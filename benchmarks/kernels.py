"""Time headgram's arithmetic against the original script's loop and against bare LAPACK and BLAS, side by side in one process.

    python benchmarks/kernels.py                    # a Markdown table; takes some minutes
    python benchmarks/kernels.py --device cuda      # on a machine with a GPU; needs src/ on the path, torch and jaxtyping

Every figure is the smallest of several runs that take turns, so that what else the machine does meets all alike. Weights are
random, in bfloat16, of the shapes of real models; of large ones, the heads of one key head.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import naive
import torch

from headgram.forms.circuits import ov, qk, shared_head
from headgram.geometry.composition import reads, scores, writes
from headgram.geometry.costs import Route, Sizes, cheapest, flops
from headgram.geometry.eigen import largest_magnitude
from headgram.geometry.inner import inner_products, sizes_of
from headgram.geometry.same_index import same_index_products
from headgram.run.forkserver import KEEP_MEMORY
from headgram.tensors import gram, spectrum

Timed = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A model's, and how many of its heads and layers are timed."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    rank: int
    hidden: int
    timed_heads: int
    timed_layers: int

    @property
    def whole(self) -> Shape:
        """The same with all heads and layers timed."""
        return replace(self, timed_heads=self.heads, timed_layers=self.layers)

    def weights(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Random `W_Q (L, H, r, d)` and `W_K (L, K, r, d)` of the part that is timed."""
        generator = torch.Generator().manual_seed(0)
        kv_heads = max(1, self.timed_heads * self.kv_heads // self.heads)
        return tuple(
            torch.randn(self.timed_layers, count, self.rank, self.hidden, generator=generator).bfloat16().to(device)
            for count in (self.timed_heads, kv_heads)
        )


SHAPES = (
    Shape("SmolLM2-135M", 30, 9, 3, 64, 576, timed_heads=9, timed_layers=30),
    Shape("Qwen3-0.6B", 28, 16, 8, 128, 1024, timed_heads=4, timed_layers=28),
    Shape("Qwen3-4B", 36, 32, 8, 128, 2560, timed_heads=4, timed_layers=36),
    Shape("Llama-70B", 80, 64, 8, 128, 8192, timed_heads=2, timed_layers=20),
)


#: Pairs of heads that a loop over all of them is timed on.
SAMPLE = 400
#: All heads with all heads of a model of more heads take minutes: they are timed once.
MANY_HEADS = 500


def seconds(*timed: Timed, rounds: int, device: str) -> list[float]:
    """The smallest time of each, in turns."""
    best = [float("inf")] * len(timed)
    for _ in range(rounds):
        for i, run in enumerate(timed):
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def set_threads(threads: int) -> None:
    """How many threads torch and scipy's BLAS use from now on."""
    import scipy.linalg.blas  # noqa: F401  (loads the library)
    import threadpoolctl  # which a machine with a GPU may not have

    threadpoolctl.threadpool_limits(threads)
    torch.set_num_threads(threads)


def libraries() -> str:
    """Which BLAS scipy brings, with the kernels that it chose, and what the environment tells both BLAS."""
    import scipy.linalg.blas  # noqa: F401  (loads the library)
    import threadpoolctl

    (scipys,) = (each for each in threadpoolctl.threadpool_info() if "scipy.libs" in each["filepath"])
    told = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(("OMP_", "MKL_", "OPENBLAS_"))]
    name = f"{scipys['internal_api']} {scipys['version']}, kernels for {scipys['architecture']}"
    return f"{name}; {', '.join(told) or 'no variable is set'}"


def gemm_rate(dtype: torch.dtype, device: str, size: int) -> float:
    """Operations per second of one large square product."""
    a, b, product = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return 2 * size**3 / seconds(lambda: torch.mm(a, b, out=product), rounds=9, device=device)[0]


def spectra_floor(q: torch.Tensor, k: torch.Tensor) -> None:
    """Bare float64 LAPACK: the products (of a key head once), one symmetric `2r` problem and one `r` SVD for every head."""
    q, k = q.double(), k.double()
    kk = k @ k.mT
    reads = shared_head(len(q), len(k)).to(q.device)
    qq, qk = q @ q.mT, q @ k[reads].mT
    torch.linalg.eigh(torch.cat([torch.cat([qq, qk], 2), torch.cat([qk.mT, kk[reads]], 2)], 1))
    torch.linalg.svd(qk)


def route_of(q: torch.Tensor, k: torch.Tensor) -> Route:
    """How inner products of some layers with themselves are formed."""
    layers = qk(q, k)
    return same_index_products(layers, layers, q.shape[1]).route


def factored_matrix(folder: Path) -> type:
    """TransformerLens' FactoredMatrix, without the rest of the package and all that it needs."""
    sys.path.append(str(folder))
    for name in ("transformer_lens", "transformer_lens.utilities"):
        package = ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    peer: type = importlib.import_module("transformer_lens.FactoredMatrix").FactoredMatrix
    return peer


def spectra_table(device: str, rounds: int, peer: type | None) -> list[str]:
    """A row per shape: one layer."""
    rows = [
        "| shape | ours, ms per head | ours / floor | loop / ours | FactoredMatrix.svd / ours |",
        "|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        q, k = (weights[0] for weights in shape.weights(device))
        reads = shared_head(len(q), len(k)).to(q.device)
        timed = [
            lambda q=q, k=k: spectrum(q, k, 8),
            lambda q=q, k=k: spectra_floor(q, k),
            lambda q=q, k=k: naive.spectra(q, k, 8),
        ]
        if peer:
            timed.append(lambda q=q, k=k, reads=reads: peer(k[reads].float().mT, q.float()).svd())
        ours, *others = seconds(*timed, rounds=rounds, device=device)
        floor, loop, svd = [*others, None][:3]
        rows.append(
            f"| {shape.name} | {ours / shape.timed_heads * 1e3:.1f} | {ours / floor:.2f} | {loop / ours:.2f} "
            f"| {'' if svd is None else f'{svd / ours:.2f}'} |"
        )
    return rows


def refined(rough: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """The four products of a step of refinement of eigenvectors, in float64 (Ogita & Aishima, JJIAM 35, 2018)."""
    vectors = rough.double()
    return vectors @ (vectors.mT @ vectors + vectors.mT @ (matrices @ vectors))


def eigenproblem_table(device: str, rounds: int) -> list[str]:
    """A row per size: the symmetric eigenproblem of a head, all values and the vectors of the 8 largest."""
    rows = ["| rows | ours, ms | all vectors / ours | in float32, then refined / ours |", "|---|---|---|---|"]
    for rank in sorted({shape.rank for shape in SHAPES}):
        matrices = torch.randn(8, 2 * rank, 2 * rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
        matrices = matrices + matrices.mT
        ours, everything, twice = seconds(
            lambda m=matrices: largest_magnitude(m, 8),
            lambda m=matrices: torch.linalg.eigh(m),
            lambda m=matrices: refined(torch.linalg.eigh(m.float())[1], m),
            rounds=rounds,
            device=device,
        )
        rows.append(f"| {2 * rank} | {ours / len(matrices) * 1e3:.1f} | {everything / ours:.2f} | {twice / ours:.2f} |")
    return rows


def growth_table(device: str, rounds: int) -> list[str]:
    """How the time of a whole model grows when one of its sizes is doubled."""
    base = Shape("16 layers, 8 heads, 4 key heads, rank 64, width 512", 16, 8, 4, 64, 512, timed_heads=8, timed_layers=16)
    doubled = {
        "layers": replace(base, timed_layers=32),
        "heads and key heads": replace(base, heads=16, kv_heads=8, timed_heads=16),
        "rank": replace(base, rank=128),
        "width": replace(base, hidden=1024),
    }

    def times(shape: Shape) -> list[float]:
        q, k = shape.weights(device)
        return seconds(
            lambda: [spectrum(*layer, 8) for layer in zip(q, k, strict=True)],
            lambda: gram(q, k, q, k),
            rounds=rounds,
            device=device,
        )

    first = times(base)
    rows = ["| twice as many | spectra | inner products |", "|---|---|---|"]
    for name, shape in doubled.items():
        spectra, pairs = (time / before for time, before in zip(times(shape), first, strict=True))
        rows.append(f"| {name} | × {spectra:.1f} | × {pairs:.1f} |")
    return [f"Of {base.name}: {first[0]:.2f} s for the spectra, {first[1]:.2f} s for the inner products.", "", *rows]


def route_taken(shape: Shape, q: torch.Tensor, k: torch.Tensor) -> tuple[Route, float]:
    """To the inner products of the timed layers, and the operations that it takes for one head."""
    one = q[:, :1], k[:, :1]
    route = route_of(*one)
    return route, flops(route, Sizes.unshared(shape.timed_layers, shape.timed_layers, shape.rank, shape.hidden, same=True))


def pairs_table(device: str, rounds: int) -> list[str]:
    """A row per shape: all pairs of layers, both inner products (the loop: one of them)."""
    rate = gemm_rate(torch.bfloat16 if device == "cuda" else torch.float32, device, 8192 if device == "cuda" else 1024)
    rows = [
        f"Bare products: {rate / 1e9:,.0f} GFLOP/s.",
        "",
        "| shape | layers, heads timed | route | ours, s per head | share of the bare rate | loop / ours |",
        "|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        q, k = shape.weights(device)
        ours, loop = seconds(lambda q=q, k=k: gram(q, k, q, k), lambda q=q, k=k: naive.gram(q, k), rounds=rounds, device=device)
        route, operations = route_taken(shape, q, k)
        share = operations * shape.timed_heads / ours / rate
        rows.append(
            f"| {shape.name} | {shape.timed_layers}, {shape.timed_heads} | {route} | {ours / shape.timed_heads:.3f} "
            f"| {share:.0%} | {loop / ours:.2f} |"
        )
    return rows


def all_pairs_table(device: str, rounds: int) -> list[str]:
    """A row per shape: all heads with all heads, both inner products, against the loop over equal indices and one over pairs."""
    rate = gemm_rate(torch.float32, device, 1024)
    rows = [
        "| shape | heads | pairs | route | ours, s | share of the bare rate | loop over equal indices / ours | per pair "
        "| factored, per pair | loop over both numbers, per pair |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for whole in (shape.whole for shape in SHAPES[:3]):
        q, k = whole.weights(device)
        heads = qk(q, k)
        found = []
        ours, loop, factored, both = seconds(
            lambda heads=heads, found=found: found.append(inner_products(heads, heads).route),
            lambda q=q, k=k: naive.gram(q, k),
            lambda q=q, k=k: naive.all_pairs(q, k, SAMPLE),
            lambda q=q, k=k: naive.both_numbers(q, k, SAMPLE),
            rounds=1 if len(heads) > MANY_HEADS else rounds,
            device=device,
        )
        route, pairs = found[0], len(heads) * (len(heads) + 1) // 2
        share = flops(route, sizes_of(heads, heads)) / ours / rate
        equal = whole.heads * whole.layers * (whole.layers + 1) // 2
        rows.append(
            f"| {whole.name} | {len(heads)} | {pairs} | {route} | {ours:.2f} | {share:.0%} | {loop / ours:.2f} "
            + "".join(f"| {each / (ours / pairs):.0f} " for each in (loop / equal, factored / SAMPLE, both / SAMPLE))
            + "|"
        )
    return rows


def side_by_side_table(rounds: int) -> list[str]:
    """A row per shape: all pairs of two circuits at once, as the pipeline takes them on two cores: in two jobs, a thread each."""
    rate = gemm_rate(torch.float32, "cpu", 1024)
    rows = ["| shape | heads of both | both, s | share of the bare rate of two threads |", "|---|---|---|---|"]
    for shape in SHAPES[:2]:
        heads = qk(*shape.whole.weights("cpu"))
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as jobs:
            both = max(jobs.map(job, [shape] * 2, [rounds] * 2))
        share = 2 * flops("strips", sizes_of(heads, heads)) / both / rate
        rows.append(f"| {shape.name} | {2 * len(heads)} | {both:.2f} | {share:.0%} |")
    return rows


def job(shape: Shape, rounds: int) -> float:
    """In a process of its own, with one thread: mean seconds of all pairs of a shape."""
    set_threads(1)
    heads = qk(*shape.whole.weights("cpu"))
    inner_products(heads, heads)
    start = time.perf_counter()
    for _ in range(rounds):
        inner_products(heads, heads)
    return (time.perf_counter() - start) / rounds


def composition_table(device: str, rounds: int) -> list[str]:
    """A row per shape: K-composition of all heads with all heads, against a loop over pairs, of which some are timed."""
    rate = gemm_rate(torch.float32, device, 1024)
    rows = ["| shape | pairs | ours, s | share of the bare rate | loop / ours |", "|---|---|---|---|---|"]
    for whole in (shape.whole for shape in SHAPES[:3]):
        (q, k), (o, v) = whole.weights(device), whole.weights(device)
        heads, pairs = qk(q, k), (whole.layers * whole.heads) ** 2
        ours, loop = seconds(
            lambda heads=heads, v=v, o=o: scores(reads("k", heads), writes(ov(v, o))),
            lambda weights=(q, k, v, o): naive.composition(*weights, pairs=SAMPLE),
            rounds=1 if len(heads) > MANY_HEADS else rounds,
            device=device,
        )
        sizes = replace(sizes_of(heads, heads), same=False, symmetric=True)
        sizes = replace(sizes, left=sizes.heads, right=sizes.heads)
        share = flops(cheapest(sizes), sizes) / ours / rate
        rows.append(f"| {whole.name} | {pairs} | {ours:.2f} | {share:.0%} | {loop / SAMPLE * pairs / ours:.0f} |")
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="a folder with TransformerLens, to be timed as well")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu" and not KEEP_MEMORY.items() <= os.environ.items():  # as in headgram's jobs; read when a program starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    peer = factored_matrix(arguments.peers) if arguments.peers else None
    beside = "" if device == "cuda" else f" Beside torch's BLAS, scipy's: {libraries()}."
    print(f"torch {torch.__version__}, {name}.{beside}\n")
    for threads in (1,) if device == "cuda" else (1, 2):
        if device == "cpu":
            set_threads(threads)
        where = "the GPU" if device == "cuda" else f"{threads} thread{'s' if threads > 1 else ''}"
        if threads == 1:
            print(f"### Spectra of a layer, {where}\n", *spectra_table(device, arguments.rounds, peer), sep="\n", end="\n\n")
            print(f"### Eigenproblems, {where}\n", *eigenproblem_table(device, arguments.rounds), sep="\n", end="\n\n")
            print(f"### Growth, {where}\n", *growth_table(device, arguments.rounds), sep="\n", end="\n\n")
        print(f"### Inner products, {where}\n", *pairs_table(device, arguments.rounds), sep="\n", end="\n\n", flush=True)
        print(f"### All heads with all heads, {where}\n", *all_pairs_table(device, arguments.rounds), sep="\n", end="\n\n")
        if threads == 2:
            title = "### All heads with all heads, two jobs of one thread each\n"
            print(title, *side_by_side_table(arguments.rounds), sep="\n", end="\n\n", flush=True)
        print(f"### Composition, {where}\n", *composition_table(device, arguments.rounds), sep="\n", end="\n\n", flush=True)


if __name__ == "__main__":
    main()
