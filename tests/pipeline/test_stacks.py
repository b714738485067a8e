"""Models with several stacks, layers that are not contiguous, and a home in another folder."""

import json
import shutil

import numpy as np
import pytest
import torch

import headgram
from headgram.forms.circuits import CIRCUITS
from headgram.measure import measure_model
from headgram.proofs.prove import _models
from pipeline.conftest import edit, new_project
from tiny import write_manifest


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A T5 and a Jamba, as transformers saves them, in shards of one layer; run from another folder than the workflow's."""
    project = new_project(tmp_path_factory.mktemp("stacks") / "project")
    for name in ("t5", "jamba"):
        model, _ = next(_models(name))
        model.save_pretrained(project.folder / "models" / name, max_shard_size="20KB")
    write_manifest(project.folder / "config" / "models.tsv", {name: f"models/{name}" for name in ("t5", "jamba")})
    edit(project.folder / "config" / "config.yaml", "layers_per_job: auto", "layers_per_job: 1")
    project.run("--config", "results=out/")
    return project


@pytest.mark.parametrize("circuit", ["qk", "ov"])
@pytest.mark.parametrize("name", ["t5", "jamba"])
def test_every_stack_is_measured(measured, name, circuit):
    atlas = headgram.open_atlas(measured.folder / "out")
    checkpoint = headgram.open_checkpoint(measured.folder / "models" / name)
    assert list(atlas.directions(name, circuit)) == [stack.name for stack in checkpoint.stacks]
    for stack in checkpoint.stacks:
        roles = CIRCUITS[circuit].roles
        read = [checkpoint.factors(stack.name, layer, roles) for layer in stack.layers]
        own, shared = (torch.stack([factors[role] for factors in read]) for role in roles)
        gram = atlas.gram(name, stack.name, circuit=circuit)
        assert tuple(gram["layer_a"].to_numpy()) == stack.layers
        # `o = W_O W_V` is the transpose of a form of outputs as queries and values as keys, and so has its inner products.
        exact = headgram.gram(own, shared, own, shared).numpy()
        norms = np.sqrt(np.einsum("aah->ah", exact))
        assert (np.abs(gram - exact) <= 1e-6 * norms[:, None] * norms[None]).all()
        heads = atlas.heads().query("model == @name and stack == @stack.name and circuit == @circuit")
        assert len(heads) == len(stack.layers) * stack.heads
    if name == "t5":
        assert [stack.name for stack in checkpoint.stacks] == ["encoder", "decoder", "cross"]


def test_the_seed_files_describe_the_first_stack(measured, tmp_path):
    measure_model(str(measured.folder / "models" / "t5"), tmp_path / "t5.json", 8, None, None, "stored", "cpu")
    expected, written = (
        json.loads(path.read_text()) for path in (tmp_path / "t5.json", measured.folder / "out" / "seed" / "t5.json")
    )
    assert written["num_layers"] == expected["num_layers"]
    np.testing.assert_allclose(written["gram"], expected["gram"], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(written["fro_sq"], expected["fro_sq"], rtol=1e-5)


def test_an_unfinished_model_does_not_hide_the_others(measured, tmp_path):
    results = shutil.copytree(measured.folder / "out", tmp_path / "out")
    (results / "provenance" / "t5.json").unlink()
    (results / "atlas" / "heads" / "model=t5" / "heads.parquet").unlink()
    atlas = headgram.open_atlas(results)
    assert atlas.models == ["jamba"]
    assert set(atlas.heads()["model"]) == {"jamba"}


def test_a_run_from_another_folder_needs_no_configuration_file(measured, tmp_path):
    manifest = write_manifest(tmp_path / "m.tsv", {"t5": measured.folder / "models" / "t5"})
    done = measured.snakemake("-n", "--directory", str(tmp_path), "--config", f"manifest={manifest}")
    assert done.returncode == 0, done.stderr
    assert "Merging t5" in done.stdout + done.stderr


def test_unknown_targets_are_named(measured):
    done = measured.snakemake("-n", "out/atlas/heads/model=none/heads.parquet", "--config", "results=out")
    assert done.returncode != 0
    assert "has no model 'none'" in done.stdout + done.stderr
