"""Many small models, end to end: what a run over them costs, and what it would cost if one job measured one model, or eight.

    python benchmarks/many_models.py 1 8 64           # Markdown; a quiet minute for eight models
    python benchmarks/many_models.py 1000 --as-it-is  # a quarter of an hour

Checkpoints of a few KB, of eight architectures in turn, are written with random weights. Then the real `snakemake` runs over
them, once for everything and once with nothing to do. It keeps the scripts of its jobs. `fused.smk` runs the same scripts
again, those of one model or of eight in one process, and the report last. Its jobs, too, are copies of the fork server.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import chain, cycle, islice
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
#: What a run over so many would cost is computed.
_MANY = 1000


def write_models(folder: Path, count: int) -> None:
    """Write `count` checkpoints and the manifest that lists them by absolute paths."""
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
    (folder / "config").mkdir()
    (folder / "config" / "models.tsv").write_text("\n".join(rows) + "\n")


@dataclass(frozen=True)
class Run:
    """One run of snakemake: wall and CPU seconds of it and all its jobs, and its own memory over time."""

    wall: float
    cpu: float
    memory: list[int]  # MiB resident in the main process, once a second

    def __str__(self) -> str:
        return f"{self.wall:.0f} / {self.cpu:.0f}"


def snakemake(folder: Path, *arguments: str) -> Run:
    """Run snakemake in a folder, sampling the memory of its main process.

    Raises
    ------
    SystemExit
        If it fails; its output is in `snakemake.log`.
    """
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", str(ROOT / "profiles" / "default")]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    memory = []
    with (folder / "snakemake.log").open("w") as log:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([*command, *arguments], cwd=folder, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            memory.append(_resident(process.pid))
            time.sleep(_SAMPLE_SECONDS)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        sys.exit(f"snakemake failed: see {folder}/snakemake.log")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(time.monotonic() - start, cpu, [size for size in memory if size])


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    except (OSError, IndexError):  # it ended just now
        return 0


def fused(folder: Path, models: int, cores: str) -> Run:
    """Run the jobs of an earlier run again, those of so many models in one job."""
    scripts = sorted((folder / ".snakemake" / "scripts").iterdir(), key=lambda script: script.stat().st_mtime_ns)
    of_model: dict[str, list[list[str]]] = {}
    for job in map(_started, scripts):
        of_model.setdefault(json.loads(job[-1])["wildcards"].get("model", ""), []).append(job)
    report = of_model.pop("")
    each = list(of_model.values())
    groups = [list(chain(*each[i : i + models])) for i in range(0, len(each), models)]
    (folder / "groups.json").write_text(json.dumps([*groups, report]))
    shutil.rmtree(folder / "fused", ignore_errors=True)
    for part in (folder / "results").iterdir():
        if part.is_dir():
            shutil.rmtree(part)
    return snakemake(folder, "--snakefile", str(ROOT / "benchmarks" / "fused.smk"), "--cores", cores)


def _started(script: Path) -> list[str]:
    """Of a job, from the script that Snakemake wrote for it: the script that it started, its log, and what it was told."""
    found = {}
    for line in script.read_text().splitlines():
        if line.startswith("declare -A "):
            name, _, values = line.removeprefix("declare -A ").partition("=")
            found[name] = dict(part.split("]=", 1) for part in shlex.split(values) if part.startswith("["))
    params = found["snakemake_params"]
    return [f"{found['snakemake']['[scriptdir']}/{params['[script']}.py", found["snakemake_log"]["[0"], params["[job"]]


@dataclass(frozen=True)
class Measured:
    """Runs over so many models, with as many jobs; `own` is the CPU time of the jobs' own work, as their records have it."""

    models: int
    jobs: int
    stages: Run
    own: float
    idle: Run
    one: Run | None = None
    eight: Run | None = None

    def row(self) -> str:
        return (
            f"| {self.models} | {self.jobs} | {self.stages} | {self.own:.0f} | {self.one or '–'} | {self.eight or '–'} "
            f"| {self.idle.wall:.1f} | {max(self.stages.memory)} |"
        )


def measured(folder: Path, count: int, cores: str, as_it_is: bool) -> Measured:
    """Run over so many models: as it is, and, unless that is all, in the other ways."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_models(folder, count)
    run = ("--snakefile", str(ROOT / "Snakefile"), "--cores", cores)
    snakemake(folder, *run[:2], "--dry-run", "--quiet")
    whole = snakemake(folder, *run, "--skip-script-cleanup")
    idle = snakemake(folder, *run)
    records = [path for part in ("models", "provenance", "report") for path in (folder / "results" / part).rglob("*.json")]
    own = sum(json.loads(path.read_text())["cpu_seconds"] for path in records)
    others = [] if as_it_is else [fused(folder, models, cores) for models in (1, 8)]
    return Measured(count, len(records), whole, own, idle, *others)


def _extrapolated(few: int, before: Run, more: int, after: Run) -> float:
    """CPU seconds for `_MANY` models, of runs over few and over more."""
    return after.cpu + (after.cpu - before.cpu) / (more - few) * (_MANY - more)


def main() -> None:
    """Write the models, run, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=int, nargs="*", default=[1, 64], help="how many models")
    parser.add_argument("--cores", default="2")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "many", help="where everything is written; made anew")
    parser.add_argument("--as-it-is", action="store_true", help="only the pipeline as it is, no jobs of other sizes")
    arguments = parser.parse_args()
    print(
        f"\n### Many small models, {arguments.cores} cores: seconds of wall / of CPU\n\n"
        "| models | jobs | a job a stage | of this, the jobs' own work | a job a model | a job for eight models "
        "| nothing to do, wall | Snakemake, MiB |\n|---|---|---|---|---|---|---|---|"
    )
    found = []
    for count in arguments.counts:
        found.append(measured(arguments.folder.resolve(), count, arguments.cores, arguments.as_it_is))
        print(found[-1].row(), flush=True)
    first, last = found[0], found[-1]
    if last.models > first.models:
        ways = {
            "a job a stage": (first.stages, last.stages),
            "a job a model": (first.one, last.one),
            "a job for eight": (first.eight, last.eight),
        }
        many = [
            f"{_extrapolated(first.models, before, last.models, after) / 60:.0f} with {way}"
            for way, (before, after) in ways.items()
            if before and after
        ]
        print(f"\nComputed from the first and the last row, minutes of CPU for {_MANY} models: {', '.join(many)}.")


if __name__ == "__main__":
    main()
