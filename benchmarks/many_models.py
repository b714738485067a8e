"""Many small models, end to end: how long a run over them takes, what a job costs, and how much memory Snakemake holds.

    python benchmarks/many_models.py 250 --cores 2 --folder /tmp/many

Checkpoints of a few KB, of eight architectures in turn, are written with random weights; then the real `snakemake` runs over
them, once for everything and once with nothing to do. The last lines are the rows of the table in docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("llama", "gpt2", "bert", "gpt_neox", "opt", "bloom", "qwen3", "falcon")
_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
    "ffn_dim": 16,
    "word_embed_proj_dim": 16,
    "vocab_size": 8,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SAMPLE_SECONDS = 1.0


def write_models(folder: Path, count: int) -> None:
    """Write `count` checkpoints and the manifest `models.tsv` that lists them by absolute paths."""
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()

    patterns = {}
    for kind in ARCHITECTURES:
        known = AutoConfig.for_model(kind)
        settable = [
            name for name in _SIZES if hasattr(known, name) and not isinstance(getattr(type(known), name, None), property)
        ]
        sizes = {name: _SIZES[name] for name in settable}
        AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder / "patterns" / kind)
        patterns[kind] = load_file(folder / "patterns" / kind / "model.safetensors")
    rows = ["name\tsource\trevision"]
    for i, kind in enumerate(islice(cycle(ARCHITECTURES), count)):
        chance = np.random.default_rng(i)
        home = folder / "models" / f"{kind}-{i:04d}"
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "patterns" / kind / "config.json", home)
        tensors = {name: chance.standard_normal(value.shape, dtype=np.float32) for name, value in patterns[kind].items()}
        save_file(tensors, home / "model.safetensors")
        rows.append(f"{home.name}\t{home}\t")
    (folder / "models.tsv").write_text("\n".join(rows) + "\n")


@dataclass(frozen=True)
class Run:
    """One run of snakemake: wall and CPU seconds of it and all its jobs, and its own memory over time."""

    wall: float
    cpu: float
    memory: list[tuple[float, int]]  # seconds since the start, MiB resident in the main process


def snakemake(folder: Path, *arguments: str) -> Run:
    """Run snakemake, sampling the memory of its main process.

    Raises
    ------
    SystemExit
        If it fails; its output is in `snakemake.log`.
    """
    command = [sys.executable, "-m", "snakemake", "--config", f"manifest={folder}/models.tsv", f"results={folder}/results"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    memory = []
    with (folder / "snakemake.log").open("w") as log:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            memory.append((time.monotonic() - start, _resident(process.pid)))
            time.sleep(_SAMPLE_SECONDS)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        sys.exit(f"snakemake failed: see {folder}/snakemake.log")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(time.monotonic() - start, cpu, memory)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    except (OSError, IndexError):  # it ended just now
        return 0


def main() -> None:
    """Write the models, run, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=1000, help="how many models")
    parser.add_argument("--cores", default="2")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "many", help="where everything is written; made anew")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_models(folder, arguments.count)
    plan = snakemake(folder, "--dry-run", "--quiet")
    whole = snakemake(folder, "--cores", arguments.cores)
    again = snakemake(folder, "--cores", arguments.cores)
    found = [path for part in ("models", "provenance", "report") for path in (folder / "results" / part).rglob("*.json")]
    jobs, own = len(found), sum(json.loads(path.read_text())["cpu_seconds"] for path in found)
    start = (whole.cpu - again.cpu - own) / jobs
    running = [size for _, size in whole.memory if size]
    quarters = [max(running[len(running) * i // 4 : len(running) * (i + 1) // 4]) for i in range(4)]
    print(f"models {arguments.count}, jobs {jobs}, cores {arguments.cores}")
    print(f"locked and planned in {plan.wall:.0f} s, at most {max(size for _, size in plan.memory)} MiB")
    print(
        f"run: {whole.wall:.0f} s, {whole.cpu:.0f} s of CPU; per job {whole.wall / jobs:.2f} s, {whole.cpu / jobs:.2f} s of CPU"
    )
    print(
        f"of these, the jobs' own work {own:.0f} s of CPU, and {start:.2f} s to start each; with one start a model instead: "
        f"about {own + start * arguments.count + again.cpu:.0f} s of CPU"
    )
    print(f"resident memory of the main process in each quarter of the run, at most: {', '.join(map(str, quarters))} MiB")
    print(f"nothing to do: {again.wall:.1f} s")


if __name__ == "__main__":
    main()
