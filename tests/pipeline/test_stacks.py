"""Models with several stacks, layers that are not contiguous, and a home in another folder."""

import json
import shutil

import numpy as np
import pytest
import torch
import xarray as xr

import headgram
from headgram.forms.circuits import CIRCUITS
from headgram.measure import measure_model
from headgram.proofs.listed import listed_models
from pipeline.conftest import edit, new_project
from tiny import write_manifest

TOKENS = "tokens={enabled: true, count: 3}"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A T5 and a Jamba, as transformers saves them, in shards of one layer; run from another folder than the workflow's."""
    project = new_project(tmp_path_factory.mktemp("stacks") / "project")
    for name in ("t5", "jamba"):
        model, _ = next(listed_models(name))
        model.save_pretrained(project.folder / "models" / name, max_shard_size="20KB")
    write_manifest(project.folder / "config" / "models.tsv", {name: f"models/{name}" for name in ("t5", "jamba")})
    edit(project.folder / "config" / "config.yaml", "layers_per_job: auto", "layers_per_job: 1")
    project.run("--config", "results=out/", TOKENS)
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


def test_eigenvalues_are_of_heads_that_write_to_the_stream_they_read(measured):
    atlas = headgram.open_atlas(measured.folder / "out")
    for name in ("t5", "jamba"):
        checkpoint = headgram.open_checkpoint(measured.folder / "models" / name)
        for stack in checkpoint.stacks:
            data = {circuit: atlas.dataset(name, stack.name, circuit) for circuit in ("qk", "ov")}
            assert np.isnan(data["qk"]["copying"]).all()
            assert np.isnan(data["qk"]["eigenvalue_real"]).all()
            if stack.name == "cross":
                assert np.isnan(data["ov"]["copying"]).all()
                assert "copying_median" not in data["ov"].attrs or np.isnan(data["ov"].attrs["copying_median"])
                continue
            for layer in stack.layers:
                w = checkpoint.factors(stack.name, layer, ["value", "output"])
                shared = torch.arange(stack.heads) * stack.kv_heads // stack.heads
                o = w["output"].double().mT @ w["value"].double()[shared]
                found = data["ov"].sel(layer=layer)
                values = torch.linalg.eigvals(o)
                exact = (values.real.sum(-1) / values.abs().sum(-1)).numpy()
                np.testing.assert_allclose(found["copying"], exact, atol=1e-6)
                trace = o.diagonal(dim1=1, dim2=2).sum(-1).numpy()
                np.testing.assert_allclose(found["eigenvalue_real"].sum("index"), trace, atol=1e-9)
            medians = data["ov"]["copying"].median("head")
            np.testing.assert_allclose(data["ov"]["copying_median"], medians, atol=1e-12)
    assert "all as they were written" in measured.headgram("verify", "out").stdout


def test_compositions_are_of_the_stacks_that_share_a_stream(measured):
    table = headgram.open_atlas(measured.folder / "out").table("composition")
    kinds = {(model, stack): set(rows["kind"]) for (model, stack), rows in table.groupby(["model", "stack"])}
    every = {"q", "k", "v"}
    assert kinds == {("t5", stack): every for stack in ("encoder", "decoder", "cross")} | {("jamba", "self"): every}
    assert (table["layer_a"] < table["layer_b"])[table["writer"] == table["stack"]].all()
    # Cross-attention takes keys and values from what all layers of the encoder have written.
    assert set(table.query("stack == 'cross'")[["kind", "writer"]].itertuples(index=False, name=None)) == {
        ("q", "cross"),
        ("k", "encoder"),
        ("v", "encoder"),
    }
    crossing = headgram.open_atlas(measured.folder / "out").composition("t5", "v", "cross")
    assert crossing.notnull().all()
    assert crossing.attrs["writer"] == "encoder"
    assert table.set_index("stack")["folded"].to_dict() == {"encoder": True, "decoder": True, "cross": True, "self": True}
    assert table["averaged"].isna().all()  # neither model turns queries and keys
    scores = headgram.open_atlas(measured.folder / "out").composition("t5", "k", "decoder", "times_chance")
    assert int(scores.notnull().sum()) == len(table.query("model == 't5' and stack == 'decoder' and kind == 'k'"))
    with pytest.raises(headgram.HeadgramError, match="no compositions of the stack 'encode' and the kind 'v'"):
        headgram.open_atlas(measured.folder / "out").composition("t5", "v", "encode")


def test_tokens_are_of_the_stacks_that_read_embeddings(measured):
    atlas = headgram.open_atlas(measured.folder / "out")
    table = atlas.table("tokens")
    assert set(zip(table["model"], table["stack"], strict=True)) == {("t5", "encoder"), ("t5", "decoder"), ("jamba", "self")}
    assert set(table["place"]) == {0, 1, 2}
    assert table["text"].eq("").all()  # these checkpoints have no tokenizer
    with headgram.open_checkpoint(measured.folder / "models" / "jamba") as checkpoint:
        embedding = checkpoint.embedding().double()
        gains = {layer: frame.norm.gain for layer, frame in checkpoint.frames("self").layers.items()}
    embedding -= embedding.mean(0)
    found = atlas.directions("jamba", "qk")["self"]
    rows = table.query("model == 'jamba' and circuit == 'qk' and sign == 1 and place == 0 and direction == 0")
    shown = atlas.tokens("jamba", layer=int(rows["layer"].iloc[0]), head=int(rows["head"].iloc[0]))
    assert shown.loc[(rows["side"].iloc[0], 0, 1), 0] == f"#{rows['token'].iloc[0]}"
    paths = atlas.table("token_paths")
    # Of T5 the encoder and the decoder meet tokens on both sides, and what feeds within them; cross-attention does not.
    assert set(zip(paths["model"], paths["stack"], strict=True)) == {("t5", "encoder"), ("t5", "decoder"), ("jamba", "self")}
    assert set(paths["path"]) == {"qk", "ov", "k"}
    channels = atlas.table("channels").query("kind == 'k' and stack == writer")
    assert len(paths.query("path == 'k'")) == len(channels)
    with pytest.raises(headgram.HeadgramError, match="no tokens of layer 99, head 0"):
        atlas.tokens("jamba", layer=99, head=0)
    assert rows["folded"].all()
    for row in rows.itertuples():
        place = found["layers"].tolist().index(row.layer)
        before = found[row.side][place, row.head, 0].double() * gains[row.layer]
        projections = embedding @ torch.nn.functional.normalize(before, dim=0)
        assert row.token == int(projections.argmax())
        assert row.value == pytest.approx(float(projections.max()), rel=1e-4)


def test_one_head_and_its_tokens_on_the_command_line(measured):
    """What feeds a head, what reads it and which tokens it is about, as the tables have it; a head that is not there is named."""
    atlas = headgram.open_atlas(measured.folder / "out")
    table = atlas.table("composition", "jamba").query("kind == 'k'")
    best = table.loc[table["times_chance"].idxmax()]
    arguments = ("show", "jamba", "--results", "out", "--head")
    shown = measured.headgram(*arguments, f"{best['layer_b']:.0f}.{best['head_b']:.0f}")
    assert shown.returncode == 0, shown.stderr
    feeding = shown.stdout.split("Heads that feed it, by its keys")[1].split("Heads that")[0]
    first = next(line.split() for line in feeding.splitlines() if line.strip()[:1].isdigit())
    assert first[:2] == [f"{best['layer_a']:.0f}", f"{best['head_a']:.0f}"]
    assert f"{best['times_chance']:.2f}" in first
    tokens = atlas.tokens("jamba", layer=int(best["layer_b"]), head=int(best["head_b"]))
    assert f"'{tokens.iloc[0, 0]}' '{tokens.iloc[0, 1]}'" in shown.stdout
    table = atlas.table("composition", "t5").query("stack == 'cross' and kind == 'v' and writer == 'encoder'")
    best = table.loc[table["times_chance"].idxmax()]
    ends = [("cross", "b", "feed it, by what it moves", "encoder"), ("encoder", "a", "read it, by what they move", "cross")]
    for stack, side, title, other in ends:
        place = f"{best[f'layer_{side}']:.0f}.{best[f'head_{side}']:.0f}"
        shown = measured.headgram("show", "t5", "--results", "out", "--stack", stack, "--head", place)
        assert shown.returncode == 0, shown.stderr
        assert other in shown.stdout.split(title)[1].split("Heads that")[0]
    for head, reason in (("99.0", "has no head 99.0; its heads are 1.0 to 3.3"), ("first", "as LAYER.HEAD")):
        refused = measured.headgram(*arguments, head)
        assert refused.returncode == 1
        assert reason in refused.stderr
        assert "Traceback" not in refused.stderr


def test_compositions_in_netcdf(measured, tmp_path):
    atlas = headgram.open_atlas(measured.folder / "out")
    written = measured.headgram("export", "t5", "--results", "out", "--to", str(tmp_path), "--format", "netcdf")
    assert written.returncode == 0, written.stderr
    for stack, kind in (("decoder", "q"), ("cross", "v")):
        with xr.open_dataset(tmp_path / "t5.nc", group=f"composition/{stack}/{kind}") as data:
            xr.testing.assert_equal(data["times_chance"], atlas.composition("t5", kind, stack, "times_chance"))
            assert data.attrs["writer"] == ("encoder" if stack == "cross" else stack)


def test_options_of_compositions_and_tokens_make_nothing_else_stale(measured):
    def planned(*options):
        return measured.planned("--config", "results=out/", *options)

    read = {f"Tokens of the directions of {model}" for model in ("t5", "jamba")}
    drawn = {f"Rendering {model}" for model in ("t5", "jamba")} | {"Reporting on all models"}
    assert planned(TOKENS) == set()
    assert planned() == drawn  # the page has had tokens
    assert planned("tokens={enabled: true, count: 4}") == read | drawn
    composed = {f"Composition of the heads of {model}" for model in ("t5", "jamba")}
    assert planned("composition={strongest: 3}") == composed | drawn
    assert planned(TOKENS, "composition={strongest: 3}") == composed | read | drawn


def test_the_original_files_describe_the_first_stack(measured, tmp_path):
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
