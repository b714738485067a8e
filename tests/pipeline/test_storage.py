"""Results in object storage, by a real S3 API."""

import json
import shutil

import pytest

import headgram
from pipeline.conftest import Project, edit, small_project
from pipeline.s3_server import SECRET_KEY, s3_server

STORAGE = ("--default-storage-provider", "s3", "--default-storage-prefix", "s3://atlas/study")
MERGED = {"Merging small-bert", "Deriving the tables of small-bert", "Rendering small-bert", "Reporting on all models"}
MEASURED = {"Spectra of small-bert, stack self, circuit qk, layers-000-002"} | MERGED


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as server:
        yield server


def files_with(secret: str, *folders) -> list:
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert found
    return [path for path in found if secret.encode() in path.read_bytes()]


def test_results_in_a_bucket(s3, small, tmp_path, monkeypatch):
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    project = small_project(tmp_path / "project")
    project.run(*STORAGE)
    synced = Project(tmp_path / "synced")
    s3.sync("atlas", "study", synced.folder)
    assert synced.tables() == small.tables()
    assert not list((project.folder / "results").rglob("*.parquet"))

    results = synced.folder / "results"
    assert headgram.open_atlas(results).heads().equals(headgram.open_atlas(small.folder / "results").heads())
    verified = project.headgram("verify", str(results))
    assert verified.returncode == 0, verified.stderr
    assert files_with(SECRET_KEY, project.folder, synced.folder) == []

    config = project.folder / "config" / "config.yaml"
    edit(config, "topk: 8", "topk: 4")
    assert project.planned(*STORAGE) == MEASURED
    shutil.rmtree(project.folder / ".snakemake")
    assert project.planned(*STORAGE) == MEASURED
    edit(config, "topk: 4", "topk: 8")
    assert project.planned(*STORAGE) == set()
    edit(config, "compression: zstd", "compression: none")
    assert project.planned(*STORAGE) == MERGED | {"Scores of small-bert by offset and frequency"}
    project.run(*STORAGE)
    client = s3.client()
    record = json.loads(client.get_object(Bucket="atlas", Key="study/results/provenance/small-bert.json")["Body"].read())
    assert record["config"]["export"]["compression"] == "none"
    assert project.planned(*STORAGE) == set()
    client.delete_object(Bucket="atlas", Key="study/results/atlas/directions/small-bert.pt")
    assert project.planned(*STORAGE) == MERGED


def test_a_storage_that_does_not_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SNAKEMAKE_STORAGE_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("SNAKEMAKE_STORAGE_S3_ACCESS_KEY", "key")
    monkeypatch.setenv("SNAKEMAKE_STORAGE_S3_SECRET_KEY", SECRET_KEY)
    done = small_project(tmp_path / "project").snakemake("-n", *STORAGE, "--storage-s3-retries", "0")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "s3://atlas/study/results/provenance/" in said
    assert "Could not connect to the endpoint" in said
    assert SECRET_KEY not in said
