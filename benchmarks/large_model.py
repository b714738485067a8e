"""A model of Llama-3.1-405B's shape: its plan, and the memory that its first and its last jobs take.

    python benchmarks/large_model.py --folder /tmp/large

The checkpoint has a shard per layer, 67 GiB of queries and keys in all; the first and the last hold numbers, the others zeros
that take no disk. The jobs are run by the real `snakemake`, one at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from headgram.checkpoints.known import open_checkpoint  # noqa: E402
from headgram.study.jobs import HeadsPlan  # noqa: E402
from headgram.study.lock import LockedModel, LockedStack, locked_file, write_lock  # noqa: E402
from headgram.study.options import load_config, read_options  # noqa: E402
from headgram.study.plan import make_plan  # noqa: E402

LAYERS, HEADS, KV_HEADS, RANK, HIDDEN = 126, 128, 8, 128, 16384
NAME = "large"


def write_checkpoint(folder: Path) -> None:
    """Write config.json, shards in bfloat16, and their index."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": RANK,
        "hidden_size": HIDDEN,
    }
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"model-{layer + 1:05d}-of-{LAYERS:05d}.safetensors" for layer in range(LAYERS)]
    index = {}
    for layer, name in enumerate(names):
        tensors = {f"model.layers.{layer}.self_attn.{role}_proj.weight": n for role, n in (("q", HEADS), ("k", KV_HEADS))}
        index |= dict.fromkeys(tensors, name)
        write_shard(folder / name, tensors, seed=layer if layer in (0, LAYERS - 1) else None)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def write_shard(path: Path, heads: dict[str, int], seed: int | None) -> None:
    """Write tensors of so many heads: random numbers, or zeros that take no disk."""
    sizes = {name: count * RANK * HIDDEN * 2 for name, count in heads.items()}
    ends = list(itertools.accumulate(sizes.values()))
    header = {
        name: {"dtype": "BF16", "shape": [heads[name] * RANK, HIDDEN], "data_offsets": [end - size, end]}
        for (name, size), end in zip(sizes.items(), ends, strict=True)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if seed is None:
            file.truncate(file.tell() + ends[-1])
            return
        chance = np.random.default_rng(seed)
        for _ in range(ends[-1] // (32 * HIDDEN)):  # 16 rows at a time
            rows = chance.standard_normal(16 * HIDDEN, dtype=np.float32) * 0.02
            file.write((rows.view(np.uint32) >> 16).astype(np.uint16).tobytes())  # bfloat16: the upper half


def lock(folder: Path) -> None:
    """Write the manifest and its lock; layers of zeros are hashed once, not 124 times."""
    manifest = folder / "models.tsv"
    manifest.write_text(f"name\tsource\n{NAME}\t{folder}/model\n")
    with open_checkpoint(folder / "model") as checkpoint:
        (stack,) = checkpoint.stacks
        zeros = checkpoint.digest(stack.name, 1)
        digests = [checkpoint.digest(stack.name, layer) if layer in (0, LAYERS - 1) else zeros for layer in stack.layers]
        names = [name for name in LockedStack.model_fields if name != "digests"]
        entry = LockedModel(
            source=f"{folder}/model",
            revision=None,
            overrides={},
            commit=None,
            format="safetensors",
            architecture="llama",
            files=tuple(locked_file(checkpoint.location, name) for name in (*checkpoint.location.weights, "config.json")),
            stacks=(LockedStack(**{name: getattr(stack, name) for name in names}, digests=tuple(digests)),),
            fingerprint="of a model of zeros",
        )
    write_lock(manifest.with_suffix(".lock.json"), {NAME: entry})


def planned(folder: Path) -> HeadsPlan:
    """The plan that snakemake makes of it."""
    content = json.loads((folder / "models.lock.json").read_text())
    entries = {name: LockedModel(**entry) for name, entry in content["models"].items()}
    config = load_config(read_options(ROOT / "config" / "config.yaml", {}))
    return make_plan(entries, config, ROOT / "workflow" / "scripts").models[NAME].heads["qk", "self"]


def run(folder: Path, *arguments: str) -> tuple[float, float, int]:
    """Run snakemake to its end: wall seconds, CPU seconds, and MiB resident in its largest process."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *arguments]
    settings = ["--config", f"manifest={folder}/models.tsv", f"results={folder}/results"]
    start = time.monotonic()
    with (folder / "snakemake.log").open("a") as log:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        process = subprocess.Popen([*command, *settings], cwd=ROOT, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"snakemake failed: see {folder}/snakemake.log")
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss >> 10


def main() -> None:
    """Write, plan, run, and print a row per job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "large", help="where everything is written; made anew")
    folder = parser.parse_args().folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(folder / "model")
    # In a process of its own: what this one holds would count as the memory of those that it starts.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(lock, folder).result()
    plan = planned(folder)
    groups, shards, last_row = list(plan.groups), list(plan.shards), plan.rows[-1]
    print(f"{len(groups)} groups, {len(shards)} shards, {len(plan.rows)} rows; layers in the last row: {len(plan.tiles[-1])}")
    home = f"{folder}/results/models/{NAME}/self"
    read_last = plan.groups_of(plan.tiles[-1])
    jobs = {
        "plan (dry run)": ["--dry-run", "--quiet"],
        f"extract {groups[0]}": [f"{home}/weights/{groups[0]}.json"],
        f"eigen {shards[0]}": [f"{home}/eigen/{shards[0]}.json"],
        f"extract {read_last[0]} … {read_last[-1]}": [f"{home}/weights/{group}.json" for group in read_last],
        f"gram {last_row}": [f"{home}/gram/{last_row}.json"],
        f"eigen {shards[-1]}": [f"{home}/eigen/{shards[-1]}.json"],
    }
    print("| job | wall s | CPU s | peak MiB |\n|---|---|---|---|", flush=True)
    for name, arguments in jobs.items():
        wall, cpu, peak = run(folder, *arguments)
        print(f"| {name} | {wall:.0f} | {cpu:.0f} | {peak} |", flush=True)


if __name__ == "__main__":
    main()
