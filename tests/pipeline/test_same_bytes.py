"""Equal inputs give equal bytes, however the work was cut and in whatever order it was done."""

import io
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.conftest import edit, new_project
from tiny import write_llama, write_manifest

MODEL = "tiny-llama"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same") / "project"
    project = new_project(folder)
    write_llama(folder / "models" / "llama", layers=3)
    write_manifest(folder / "config" / "models.tsv", {MODEL: "models/llama"})
    edit(folder / "config" / "config.yaml", "layers_per_job: auto", "layers_per_job: 2")
    edit(folder / "config" / "config.yaml", "layers_per_tile: auto", "layers_per_tile: 2")
    return project


@pytest.fixture(scope="module")
def whole(project):
    """The tables of a run on two cores."""
    project.run()
    return project.tables()


def test_one_job_after_the_other_in_any_order(project, whole):
    """On one core, two jobs of chance first, by commands of their own."""
    results = project.folder / "results"
    records = [str(path.relative_to(project.folder)) for path in project.records()]
    results.rename(results.with_name("first"))
    for target in random.Random(0).sample([record for record in records if "/eigen/" in record or "/gram/" in record], 2):
        project.run("--cores", "1", target)
    project.run("--cores", "1")
    assert project.tables() == whole


def rows(tables: dict[str, bytes], table: str) -> list[dict]:
    return pq.read_table(io.BytesIO(tables[f"atlas/{table}/model={MODEL}/{table}.parquet"])).to_pylist()


def numbers(tables: dict[str, bytes], table: str) -> dict[str, np.ndarray]:
    """The columns of a table; its metadata name another configuration, as they should."""
    content = pq.read_table(io.BytesIO(tables[f"atlas/{table}/model={MODEL}/{table}.parquet"]))
    return {name: content[name].to_numpy() for name in content.column_names}


def test_other_shards_and_tiles(project, whole):
    """Spectra are a head's own, so that no bit depends on the shards; Gram tiles sum in another order."""
    edit(project.folder / "config" / "config.yaml", "layers_per_job: 2", "layers_per_job: 3")
    edit(project.folder / "config" / "config.yaml", "layers_per_tile: 2", "layers_per_tile: 1")
    project.run()
    other = project.tables()
    assert other.keys() == whole.keys()
    for table in ("heads", "spectra"):
        before, after = numbers(whole, table), numbers(other, table)
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name], equal_nan=before[name].dtype.kind == "f") for name in before)
    directions = [torch.load(io.BytesIO(tables[f"atlas/directions/{MODEL}.pt"]), weights_only=True) for tables in (whole, other)]
    for name, tensor in directions[0]["qk"]["self"].items():
        assert torch.equal(tensor, directions[1]["qk"]["self"][name])
    before, after = numbers(whole, "gram"), numbers(other, "gram")
    for name in ("stack", "layer_a", "layer_b", "head"):
        assert np.array_equal(before[name], after[name])
    norms = {(row["layer"], row["head"]): row["fro_sq"] ** 0.5 for row in rows(whole, "heads")}
    for one, two in zip(rows(whole, "gram"), rows(other, "gram"), strict=True):
        size = norms[one["layer_a"], one["head"]] * norms[one["layer_b"], one["head"]]
        assert abs(one["gram"] - two["gram"]) <= 1e-6 * size
        assert abs(one["transposed"] - two["transposed"]) <= 1e-6 * size
