"""Two pretended GPUs under real snakemake runs: every job holds one, alone, for as long as it lasts."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.conftest import ROOT, OnStandIn, Project, new_project

SNAKEFILE = """
rule all:
    input: [f"job-{i}.json" for i in range(JOBS)]

rule job:
    output: "job-{i}.json"
    resources: gpu=1
    script: "job.py"
"""

JOB = """
import json, os, time
from pathlib import Path
from headgram.run.devices import leased_device

with leased_device(True) as device:
    start = time.time()
    Path(f"holder-{snakemake.wildcards.i}").write_text(str(os.getpid()))
    time.sleep(SECONDS)
    held = {"gpu": os.environ["CUDA_VISIBLE_DEVICES"], "start": start, "end": time.time()}
Path(snakemake.output[0]).write_text(json.dumps(held))
"""


def start(folder, jobs, seconds, *arguments, **environment) -> subprocess.Popen:
    """Run jobs that do nothing but hold a device and note when."""
    (folder / "Snakefile").write_text(SNAKEFILE.replace("JOBS", str(jobs)))
    (folder / "job.py").write_text(JOB.replace("SECONDS", str(seconds)))
    command = [sys.executable, "-m", "snakemake", "--cores", "6", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(folder)} | environment
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def assert_alone(held: list[tuple[str, float, float]], gpus: set[str]) -> None:
    """Every device was used, and none by two jobs at once."""
    assert {gpu for gpu, *_ in held} == gpus
    for gpu in gpus:
        spans = sorted((start, end) for used, start, end in held if used == gpu)
        for (_, end), (next_start, _) in itertools.pairwise(spans):
            assert end <= next_start, gpu


@pytest.mark.parametrize(
    ("cap", "environment"),
    [((), {}), (("--resources", "gpu=2"), {"SLURM_JOB_ID": "77"})],
    ids=["no cap", "gpu=2, in an allocation"],
)
def test_no_two_jobs_on_one_device(tmp_path, cap, environment):
    run = start(tmp_path, 8, 0.6, *cap, CUDA_VISIBLE_DEVICES="0,1", **environment)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    held = [json.loads(path.read_text()) for path in tmp_path.glob("job-*.json")]
    assert len(held) == 8
    assert_alone([(job["gpu"], job["start"], job["end"]) for job in held], {"0", "1"})


def test_two_allocations_do_not_wait_for_each_other(tmp_path):
    """Slurm numbers the devices of every allocation anew: 0 here and 0 there are two."""
    runs = []
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        runs.append(start(tmp_path / name, 1, 4, CUDA_VISIBLE_DEVICES="0", SLURM_JOB_ID=name, TMPDIR=str(tmp_path)))
    for run in runs:
        output, _ = run.communicate(timeout=120)
        assert run.returncode == 0, output
    first, second = (json.loads((tmp_path / name / "job-0.json").read_text()) for name in ("1", "2"))
    assert first["gpu"] == second["gpu"] == "0"
    assert first["start"] < second["end"]
    assert second["start"] < first["end"]


def test_the_device_of_a_killed_job_is_free_at_once(tmp_path):
    run = start(tmp_path, 2, 5, "--retries", "1", CUDA_VISIBLE_DEVICES="0")
    end = time.monotonic() + 60
    while not (holders := list(tmp_path.glob("holder-*"))) or not holders[0].read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    assert len(holders) == 1
    killed = time.time()
    os.kill(int(holders[0].read_text()), signal.SIGKILL)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    held = [json.loads(path.read_text()) for path in tmp_path.glob("job-*.json")]
    assert min(job["start"] for job in held) - killed < 3  # well before the five seconds were over
    assert_alone([(job["gpu"], job["start"], job["end"]) for job in held], {"0"})


def training(folder: Path) -> Project:
    """Two steps of a tiny llama that turns its heads, scaled by YaRN: every stage has work, on heads of both circuits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    project = new_project(folder)
    sizes = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 6}
    turning = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    rows = ["name\tsource\tlineage\tstep"]
    for step in (0, 1000):
        torch.manual_seed(step)
        config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=40, max_position_embeddings=64, rope_parameters=turning)
        LlamaForCausalLM(config).save_pretrained(folder / "models" / f"step{step}")
        vocabulary = {"model": {"vocab": {f"t{i}": i for i in range(40)}}}
        (folder / "models" / f"step{step}" / "tokenizer.json").write_text(json.dumps(vocabulary))
        rows.append(f"step{step}\tmodels/step{step}\ttraining\t{step}")
    (folder / "config" / "models.tsv").write_text("\n".join(rows) + "\n")
    return project


@pytest.mark.parametrize("basis", ["residual", "tokens"])
def test_the_pipeline_on_two_devices(tmp_path, monkeypatch, basis):
    """The jobs' own records say which device each held; what they measured is what a CPU measures."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    known = training(tmp_path / "on-cpu")
    project = OnStandIn(known.copy(tmp_path / "project").folder)
    for each in (known, project):
        each.run("--config", "tokens={enabled: true}", f"lineage={{basis: {basis}}}", "report={enabled: false}")
    made = {record["stage"]: record for record in (json.loads(path.read_text()) for path in project.records())}
    on_gpus = {"eigen", "gram", "rotary", "derive", "composition", "tokens", "lineage"}
    assert {stage for stage, record in made.items() if record["gpu"]} == on_gpus
    assert {stage for stage, record in made.items() if record["device"] == "cuda"} == on_gpus
    held = []
    for record in filter(lambda record: record["gpu"], made.values()):
        began = datetime.fromisoformat(record["started"])
        held.append((record["gpu"], began.timestamp(), (began + timedelta(seconds=record["seconds"])).timestamp()))
    assert {gpu for gpu, *_ in held} <= {"0", "1"}
    assert_alone(held, {gpu for gpu, *_ in held})

    found, expected = project.tables(), known.tables()
    assert found.keys() == expected.keys()
    for name in found:
        if name.endswith(".parquet"):
            assert_close(*(pq.read_table(pa.BufferReader(tables[name])).to_pandas() for tables in (found, expected)))


def assert_close(found: pd.DataFrame, known: pd.DataFrame) -> None:
    """Equal to the precision that a GPU is allowed, but for which of two equally near heads comes first."""
    assert list(found) == list(known)
    assert len(found) == len(known)
    for name in known.columns[~known.columns.str.startswith("residual")]:
        if known[name].dtype.kind == "f":
            size = known[name].abs().max() + 1e-300
            np.testing.assert_allclose(found[name] / size, known[name] / size, rtol=1e-4, atol=1e-5, err_msg=name)
