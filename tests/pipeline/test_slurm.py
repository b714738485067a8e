"""The pipeline through `--profile profiles/slurm` on a real Slurm."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from pipeline.conftest import Project, default_project, small_project
from pipeline.s3_server import SECRET_KEY, s3_server
from pipeline.slurm_cluster import INSTALL, OPTIONS, SlurmCluster, missing, slurm_cluster

RULES = Path(__file__).parents[2] / "workflow" / "rules"
GPU_STAGES = {path.stem for path in RULES.glob("*.smk") if "gpu=GPUS" in path.read_text()}


@pytest.fixture(scope="module")
def cluster():
    lacking = missing()
    if lacking:
        sentence = f"this machine lacks Slurm's {', '.join(lacking)}: {INSTALL}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(sentence)
    with slurm_cluster() as running:
        yield running


def start(project: Project, cluster: SlurmCluster, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        project.command("--profile", "profiles/slurm", *OPTIONS, *arguments),
        cwd=project.folder,
        env=project.environment() | cluster.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def records(project: Project) -> list[dict]:
    report = project.folder / "results" / "report"
    return [json.loads(path.read_text()) for path in [*project.records(), *report.rglob("*.json")]]


def test_every_rule_that_computes_has_a_partition_with_gpus():
    profile = yaml.safe_load((RULES.parents[1] / "profiles" / "slurm" / "config.yaml").read_text())
    assert set(profile["set-resources"]) == GPU_STAGES > {"eigen", "gram", "composition"}
    assert all(asked == {"slurm_partition": "gpu", "gpu": 1} for asked in profile["set-resources"].values())


def test_the_default_manifest(cluster, measured, tmp_path):
    """Every artifact was made by a Slurm job of its own; those that compute held one GPU; the bytes are a local run's."""
    project = default_project(tmp_path / "project")
    before = set(cluster.jobs())
    output, _ = start(project, cluster).communicate(timeout=400)
    made = records(project)
    jobs = {name: job for name, job in cluster.jobs().items() if name not in before}
    assert project.tables() == Project(measured.parent).tables(), output
    assert sorted(record["slurm_job"] for record in made) == sorted(jobs)
    for record in made:
        job = jobs[record["slurm_job"]]
        computes = record["stage"] in GPU_STAGES
        assert job["Comment"].startswith(f"rule_{record['stage']}")
        assert (job["JobState"], job["Account"]) == ("COMPLETED", "headgram")
        assert (job["Partition"], job["JOB_GRES"]) == (("gpu", "gpu:1") if computes else ("cpu", "(null)"))
        assert record["gpu"] == ("0" if computes else None)  # the one device that Slurm lets the job see
        assert record["device"] == "cpu"  # torch finds nothing there
        assert cluster.completed()[record["slurm_job"]]["JobState"] == "COMPLETED"
    assert {jobs[record["slurm_job"]]["NodeList"] for record in made if record["gpu"]} == {"n1", "n2"}
    log = next((project.folder / "results" / "logs" / "eigen").rglob("*.log")).read_text()
    assert "computing on the CPU" in log


def test_results_in_object_storage(cluster, small, tmp_path, monkeypatch):
    """Jobs on nodes read and write the bucket; the keys travel in the environment alone."""
    with s3_server(tmp_path / "s3.log") as s3:
        for name, value in s3.environment().items():
            monkeypatch.setenv(name, value)
        project = small_project(tmp_path / "project")
        before = set(cluster.jobs())
        run = start(project, cluster, "--default-storage-provider", "s3", "--default-storage-prefix", "s3://atlas/study")
        output, _ = run.communicate(timeout=400)
        assert run.returncode == 0, output
        synced = Project(tmp_path / "synced")
        s3.sync("atlas", "study", synced.folder)
    assert synced.tables() == small.tables()
    assert {record["slurm_job"] for record in records(synced)} == set(cluster.jobs()) - before
    texts = [path.read_bytes() for folder in (project, synced) for path in folder.folder.rglob("*") if path.is_file()]
    assert not any(SECRET_KEY.encode() in text for text in [*texts, output.encode(), str(cluster.jobs()).encode()])


def test_a_node_that_dies(cluster, small, tmp_path):
    """Its jobs are sent again, to the other node, and the results are a local run's."""
    project = small_project(tmp_path / "project")
    run = start(project, cluster)
    end = time.monotonic() + 240
    while not (victims := gpu_jobs(cluster, "n1")) and run.poll() is None and time.monotonic() < end:
        time.sleep(0.3)
    assert victims
    cluster.kill_node("n1")
    output, _ = run.communicate(timeout=400)
    assert run.returncode == 0, output
    jobs = cluster.jobs()
    for victim in victims:
        assert jobs[victim]["JobState"] == "NODE_FAIL"
        sent = [job for name, job in jobs.items() if int(name) > int(victim) and job["Comment"] == jobs[victim]["Comment"]]
        assert [(job["JobState"], job["NodeList"]) for job in sent] == [("COMPLETED", "n2")]
    assert project.tables() == small.tables()
    assert not list((project.folder / "results").rglob("*.tmp"))


def gpu_jobs(cluster: SlurmCluster, node: str) -> list[str]:
    jobs = cluster.jobs()
    return [name for name in cluster.at_work(node) if jobs[name]["Partition"] == "gpu"]
