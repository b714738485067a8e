"""Time compositions of all pairs of heads against a loop over pairs, in one run: python benchmarks/composition.py [SHAPE ...]

The loop is what a script does: for every two heads the `r × r` triangles of both and one product of factors. It is timed on a
thousand pairs, and its time for all pairs follows. Weights are random, in bfloat16, on one core.
"""

import sys
import time

import torch

from headgram.forms.circuits import ov, qk
from headgram.forms.heads import Heads
from headgram.geometry.composition import KINDS, reads, scores, writes
from headgram.geometry.costs import cheapest, flops
from headgram.geometry.inner import sizes_of

#: Layers, heads, key heads, rank, width.
SHAPES = {"SmolLM2-135M": (30, 9, 3, 64, 576), "Qwen3-0.6B": (28, 16, 8, 128, 1024)}
PAIRS = 1000


def main(names: list[str]) -> None:
    """Print a row for every shape."""
    torch.set_num_threads(1)
    print("| shape | all pairs, s | loop over pairs, s | loop / ours | share of the bare rate |\n|---|--:|--:|--:|--:|")
    for name in names or SHAPES:
        layers, heads, kv_heads, rank, width = SHAPES[name]
        generator = torch.Generator().manual_seed(0)
        counts = (heads, kv_heads, kv_heads, heads)
        weights = [torch.randn(layers, n, rank, width, generator=generator).bfloat16() for n in counts]
        forms = {"qk": qk(*weights[:2]), "ov": ov(*weights[2:])}
        start = time.thread_time()
        written, work = writes(forms["ov"]), 0.0
        for kind, circuit in KINDS.items():
            read = reads(kind, forms[circuit])
            scores(read, written)
            sizes = sizes_of(read.forms, written.forms)
            work += flops(cheapest(sizes), sizes)
        ours = time.thread_time() - start
        looped = sum(loop(kind, forms[circuit], forms["ov"]) for kind, circuit in KINDS.items())
        print(f"| {name} | {ours:.2f} | {looped:.0f} | {looped / ours:.0f} | {work / ours / rate():.0%} |", flush=True)


def loop(kind: str, forms: Heads, writers: Heads) -> float:
    """Seconds for all pairs of one kind."""
    count = len(writers)
    start = time.thread_time()
    for i in range(PAIRS):
        b, a = divmod(i * (count * count // PAIRS), count)
        reader, writer = forms.take([b]).to(torch.float32), writers.take([a]).to(torch.float32)
        outer, inner = (reader.b, reader.a) if kind == "k" else (reader.a, reader.b)
        left, right = (torch.linalg.qr(each[0].mT, mode="r")[1] for each in (outer, writer.b))
        (left @ (inner[0] @ writer.a[0].mT) @ right.mT).norm()
    return (time.thread_time() - start) * count * count / PAIRS


def rate() -> float:
    """Operations per second of one large product in float32."""
    square = torch.randn(3000, 3000)
    start = time.thread_time()
    square @ square
    return 2 * 3000**3 / (time.thread_time() - start)


if __name__ == "__main__":
    main(sys.argv[1:])
