"""Time headgram on a GPU against the original script's arithmetic, the batched eigensolver and bare bfloat16 products.

    PYTHONPATH=src python benchmarks/gpu.py > benchmarks/RESULTS-GPU.md

Needs torch, CuPy (before torch 2.12), pandas, pyarrow and jaxtyping: no Snakemake, no checkpoint. Of a model of Qwen3-4B's shape,
weights lie on disk as the extraction leaves them; ours is what the eigen and Gram jobs do from there to their tables. The
script's arithmetic reads the same weights and keeps everything in memory; it measures some layers' spectra, and that time is
multiplied; most of it is `torch.linalg.eigvals`, of which versions differ much. Everything runs once before it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import kernels
import naive
import torch

from headgram.geometry import eigen
from headgram.geometry.routes import longest_sum
from headgram.results.factors import FactorFiles, write_factors
from headgram.results.record import Provenance, Recipe, record_of, seal
from headgram.stages.eigen import measure_shard
from headgram.stages.gram import measure_row
from headgram.study.options import Config
from headgram.tensors import gram, spectrum

OPTIONS = Config()
EXTRACT = Recipe("extract", "{}", "benchmark", "benchmark")
#: Layers whose spectra the script's arithmetic is timed on.
NAIVE_LAYERS = 2


def timed(run: Callable[[], object], rounds: int = 3) -> float:
    """The smallest time of several runs, after one more."""
    run()
    return kernels.seconds(run, rounds=rounds, device="cuda")[0]


def model(shape: kernels.Shape) -> kernels.Shape:
    """With all its heads; of 80 wide layers a part."""
    return replace(shape, timed_heads=shape.heads)


def kernels_table() -> list[str]:
    """A row per shape: all heads of the timed layers."""
    rate = kernels.gemm_rate(torch.bfloat16, "cuda", 8192)
    longest = longest_sum(torch.device("cuda", torch.cuda.current_device()))
    rows = [
        f"Bare bfloat16 products: {rate / 1e12:,.0f} TFLOP/s. Accurate are sums of {longest:,} terms.",
        "",
        "| shape | layers | spectra, ms a layer | / eigensolver alone | inner products, ms | route | share of bare rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in map(model, kernels.SHAPES):
        q, k = shape.weights("cuda")
        layers = min(8, shape.timed_layers)
        queries, keys = q[:layers].flatten(0, 1), k[:layers].flatten(0, 1)
        ours = timed(lambda queries=queries, keys=keys: spectrum(queries, keys, 8))
        problems = torch.randn(2 * len(queries), 2 * shape.rank, 2 * shape.rank, dtype=torch.float64, device="cuda")
        problems = problems + problems.mT
        floor = timed(lambda problems=problems: eigen._batched_eigh(problems))
        del problems
        products = timed(lambda q=q, k=k: gram(q, k, q, k))
        route, operations = kernels.route_taken(shape, q, k)
        share = operations * shape.heads / products / rate
        rows.append(
            f"| {shape.name} | {shape.timed_layers} | {ours / layers * 1e3:.1f} | {ours / floor:.2f} | {products * 1e3:.1f} "
            f"| {route} | {share:.0%} |"
        )
        del q, k, queries, keys
        torch.cuda.empty_cache()
    return rows


def end_to_end(shape: kernels.Shape, folder: Path) -> list[str]:
    """From the weights on disk to the tables, against the script's arithmetic on the same weights."""
    path = folder / "layers.pt"
    write_factors(path, range(shape.layers), dict(zip(("query", "key"), shape.weights("cpu"), strict=True)))
    seal(record_of(path), Provenance(EXTRACT, shape.name, "self", "qk"), [path])
    layers = list(range(shape.layers))

    def provenance(stage: str) -> Provenance:
        return Provenance(Recipe(stage, "{}", "benchmark", "benchmark", (EXTRACT.key,)), shape.name, "self", "qk", "cuda")

    def eigen_job() -> None:
        measure_shard(folder / "eigen.parquet", folder / "eigen.pt", [path], layers, OPTIONS, provenance("eigen"))

    def gram_job() -> None:
        with contextlib.redirect_stdout(sys.stderr):  # the job's log
            measure_row(folder / "gram.parquet", [path], [layers], False, OPTIONS.gram, provenance("gram"))

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        source = FactorFiles([path], EXTRACT.key, "qk")
        heads = source.read(layers)
        q, k = (factors.unflatten(0, (len(layers), -1)) for factors in (heads.b, heads.a))
        return q.cuda(), k.cuda()

    ours_eigen, ours_gram = timed(eigen_job), timed(gram_job)
    q, k = read()
    reading = timed(read)
    naive.spectra(q[0], k[0], 8)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for layer in range(NAIVE_LAYERS):
        naive.spectra(q[layer], k[layer], 8)
    torch.cuda.synchronize()
    loop_eigen = (time.perf_counter() - start) * shape.layers / NAIVE_LAYERS
    loop_gram = timed(lambda: naive.gram(q, k), rounds=1)
    ours, loop = ours_eigen + ours_gram, reading + loop_eigen + loop_gram
    return [
        "| | script's arithmetic, s | ours, s | ratio |",
        "|---|---|---|---|",
        f"| reading | {reading:.2f} | | |",
        f"| spectra | {loop_eigen:.2f} | {ours_eigen:.2f} | {loop_eigen / ours_eigen:.0f} |",
        f"| inner products | {loop_gram:.2f} | {ours_gram:.2f} | {loop_gram / ours_gram:.0f} |",
        f"| all | {loop:.2f} | {ours:.2f} | {loop / ours:.0f} |",
    ]


def main() -> None:
    """Print the tables."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use is visible")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}.\n")
    print("### Kernels, all heads at once\n", *kernels_table(), sep="\n", end="\n\n", flush=True)
    shape = model(next(shape for shape in kernels.SHAPES if shape.name == "Qwen3-4B"))
    with tempfile.TemporaryDirectory() as folder:
        print(f"### {shape.name} from weights on disk to tables\n", *end_to_end(shape, Path(folder)), sep="\n")


if __name__ == "__main__":
    main()
