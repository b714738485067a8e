"""A training whose story is known: its checkpoints are measured in one run, one is added, and the tables tell the story.

`HEADGRAM_CHECKPOINTS` says how many there are before the last one (`make lineage`: 154).
"""

import dataclasses
import itertools
import json
import os
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import headgram
from headgram.atlas.verify import verify
from headgram.report.columns import columns
from headgram.report.pack import from_beside
from headgram.report.steps import LAYER_COLUMNS
from headgram.results.files import checksum
from packs import unpack
from pipeline.conftest import ROOT, Project, edit, new_project
from pipeline.test_docs import TRAINING, follow, follow_function
from pipeline.test_verify import resealed
from tiny import write_llama

COUNT = int(os.environ.get("HEADGRAM_CHECKPOINTS", "3"))
LAYERS, HEADS, RANK, WIDTH = 2, 4, 4, 24
ROTATES, DIES, GROWS, TURNS = (0, 0), (1, 0), (1, 2), (1, 3)
SWAP_WITHIN, SWAP_ACROSS = ((0, 2), (0, 3)), ((0, 1), (1, 1))


def story(step: int) -> dict[str, torch.Tensor]:
    """The checkpoint at a step from 0 to `COUNT`; every head has its own key and value."""
    generator = torch.Generator().manual_seed(5)
    roles = ("q", "k", "v", "o")
    weights = {role: torch.randn(LAYERS, HEADS, RANK, WIDTH, generator=generator) / 4 for role in roles}
    new = torch.randn(RANK, WIDTH, generator=generator) / 4
    weights["q"][ROTATES] = torch.linalg.qr(weights["q"][ROTATES].mT)[0].mT
    new = torch.linalg.qr((new - new @ weights["q"][ROTATES].mT @ weights["q"][ROTATES]).mT)[0].mT
    angle = torch.tensor(np.pi / 2 * step / COUNT)
    weights["q"][ROTATES] = angle.cos() * weights["q"][ROTATES] + angle.sin() * new
    weights["q"][DIES] *= 1 - step / COUNT
    weights["k"][GROWS] *= 1 + step
    if step == COUNT:
        weights["o"][TURNS] *= -1
    if step > COUNT // 2:
        for one, other in (SWAP_WITHIN, SWAP_ACROSS):
            for role in roles:
                weights[role][one], weights[role][other] = weights[role][other].clone(), weights[role][one].clone()
    tensors = {"model.embed_tokens.weight": torch.zeros(8, WIDTH)}
    for layer in range(LAYERS):
        for role in roles:
            rows = weights[role][layer].reshape(HEADS * RANK, WIDTH)
            tensors[f"model.layers.{layer}.self_attn.{role}_proj.weight"] = (rows.mT if role == "o" else rows).contiguous()
    return tensors


def add(project: Project, step: int) -> None:
    write_llama(project.folder / "steps" / str(step), LAYERS, HEADS, kv_heads=HEADS, rank=RANK, hidden=WIDTH, tensors=story(step))
    with (project.folder / "config" / "models.tsv").open("a") as file:
        file.write(f"step{step}\tsteps/{step}\ttraining\t{1000 * step}\tpile\n")


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Project:
    """All checkpoints but the last in one run, then the last one."""
    project = new_project(tmp_path_factory.mktemp("training") / "project")
    project = dataclasses.replace(project, patience=project.patience + 60 * COUNT)
    (project.folder / "config" / "models.tsv").write_text("name\tsource\tlineage\tstep\tdata\n")
    edit(project.folder / "config" / "config.yaml", "report:\n  enabled: true", "report:\n  enabled: false")
    edit(project.folder / "config" / "config.yaml", "original:\n  enabled: true", "original:\n  enabled: false")
    edit(project.folder / "config" / "config.yaml", "enabled: auto", "enabled: false")  # compositions
    for step in range(COUNT):
        add(project, step)
    project.run()
    before = project.records()
    add(project, COUNT)
    last = f"step{COUNT}"
    planned = project.planned()
    compared = {f"Comparing {last} with step{COUNT - 1}", f"Comparing {last} with step0"}
    assert {job for job in planned if job.startswith("Comparing")} == compared
    assert all(f" {last}" in job for job in planned)
    project.run()
    assert {path: state for path, state in project.records().items() if path in before} == before
    assert project.planned() == set()
    return project


@pytest.fixture(scope="module")
def atlas(training):
    return headgram.open_atlas(training.folder / "results")


def test_columns_of_the_manifest_are_chosen_in_the_reader(atlas):
    table = atlas.summary().set_index("model")
    assert set(table["lineage"]) == {"training"}
    assert set(table["label_data"]) == {"pile"}
    assert set(table.loc["step1", "step"]) == {1000}
    assert set(atlas.where(step=[0, 1000]).heads()["model"]) == {"step0", "step1"}
    assert atlas.where(data="pile", lineage="training", architecture="llama").models == atlas.models
    assert atlas.where(step=0).table("drift").empty
    with pytest.raises(headgram.HeadgramError, match="models have no 'colour'; there are: model, "):
        atlas.where(colour="red")
    with pytest.raises(headgram.HeadgramError, match="holds no model with step = 7"):
        atlas.where(step=7)
    assert list(atlas.lineage("training")) == [f"step{step}" for step in range(COUNT + 1)]  # in the order of steps, not of names


def test_trajectories_tell_who_rotates_dies_and_grows(atlas):
    steps = np.arange(COUNT + 1)
    norms = atlas.trajectory("fro_sq", "training") ** 0.5
    assert list(norms["step"]) == list(1000 * steps)
    assert list(norms["model"]) == [f"step{step}" for step in steps]
    np.testing.assert_allclose(norms.sel(layer=1, head=0) / norms[0, 1, 0], 1 - steps / COUNT, atol=1e-6)
    np.testing.assert_allclose(norms.sel(layer=1, head=2) / norms[0, 1, 2], 1 + steps, rtol=1e-6)
    assert atlas.trajectory("symmetry_median", "training").dims == ("step", "layer")

    first, previous = (atlas.trajectory("cosine", "training", to=to) for to in ("first", "previous"))
    angle = np.pi / 2 / COUNT
    np.testing.assert_allclose(first.sel(layer=0, head=0), np.cos(angle * steps[1:]), atol=1e-6)
    np.testing.assert_allclose(previous.sel(layer=0, head=0), np.cos(angle), atol=1e-6)
    swapped = steps[1:] > COUNT // 2
    for layer, head in (head for pair in (SWAP_WITHIN, SWAP_ACROSS) for head in pair):
        assert ((first.sel(layer=layer, head=head) < 0.5) == swapped).all()
    turned = atlas.trajectory("cosine", "training", to="previous", circuit="ov").sel(layer=1, head=3)
    np.testing.assert_allclose(turned, [1] * (COUNT - 1) + [-1], atol=1e-6)


@pytest.mark.skipif(COUNT != 3, reason="the page shows a training of four checkpoints")
def test_the_training_is_what_the_page_shows(training, monkeypatch):
    monkeypatch.chdir(training.folder)
    follow(ROOT / "docs" / "lineages.md")
    for name in TRAINING:
        follow_function(name)


def test_a_chart_of_a_trajectory_holds_its_numbers(atlas):
    values = atlas.trajectory("fro_sq", "training")
    rows = pd.DataFrame(headgram.plot.trajectory(atlas, "fro_sq", "training").to_dict()["datasets"]["profile"])
    for name, share in (("q25", 0.25), ("median", 0.5), ("q75", 0.75)):
        drawn = rows.pivot(index="x", columns="series", values=name)
        np.testing.assert_allclose(drawn, values.quantile(share, "head"))
    rows = pd.DataFrame(headgram.plot.trajectory(atlas, "fro_sq", "training", layer=1).to_dict()["datasets"]["profile"])
    np.testing.assert_array_equal(rows.pivot(index="x", columns="series", values="median"), values.sel(layer=1))
    for arguments in (("none", "training"), ("fro_sq", "none"), ("fro_sq", "training", 9), ("symmetry_median", "training", 1)):
        with pytest.raises(headgram.HeadgramError):
            headgram.plot.trajectory(atlas, *arguments)


def test_the_change_of_a_rotating_head_is_new_on_the_side_that_rotates(atlas):
    table = pair(atlas, "drift", f"step{COUNT}", "step0").loc["qk"]
    rotates = table.loc[ROTATES]
    # From Q to a Q' orthogonal to it: half of the change leaves the old span, and half is new; keys stay.
    assert rotates["inside_left"] == pytest.approx(1, abs=1e-6)
    assert rotates["inside_right"] == pytest.approx(0.5, abs=1e-6)
    assert rotates["change"] == pytest.approx(2**0.5, abs=1e-6)
    assert rotates["equal"] == pytest.approx(0.5, abs=0.02)  # the key
    assert rotates["inside_expected"] == RANK / WIDTH
    assert table.loc[TURNS][["change", "change_rank", "equal"]].tolist() == [0, 0, 1]
    assert (table["floor"] > 1e-3).all()
    values = pair(atlas, "changes", f"step{COUNT}", "step0").loc["qk"].loc[ROTATES]["singular_value"]
    assert len(values) == 2 * RANK
    assert np.linalg.norm(values) == pytest.approx(rotates["change_norm"])


def test_swapped_heads_are_found_again(atlas):
    swap = COUNT // 2 + 1
    table = pair(atlas, "matches", f"step{swap}", f"step{swap - 1}")
    for circuit in ("qk", "ov"):
        found = {among: table.loc[circuit][table.loc[circuit]["among"] == among] for among in ("layer", "stack")}
        expected = {(layer, head): (layer, head) for layer in range(LAYERS) for head in range(HEADS)}
        expected |= {one: other for pair in (SWAP_WITHIN, SWAP_ACROSS) for one, other in (pair, pair[::-1])}
        alive = [head for head in expected if swap < COUNT or (circuit, head) != ("qk", DIES)]
        for head in alive:
            row = found["stack"].loc[head]
            assert (row["other_layer"], row["other_head"]) == expected[head], (circuit, head)
            assert row["mutual"]
            assert abs(row["cosine"]) > 0.5
            assert row["margin"] > 0.3
            assert abs(row["cosine"]) > row["chance"] > 0
        assert (found["layer"]["other_layer"] == found["layer"].index.get_level_values("layer")).all()
        for one, other in (SWAP_WITHIN, SWAP_WITHIN[::-1]):
            assert found["layer"].loc[one]["other_head"] == other[1]
            assert found["layer"].loc[one]["cosine"] == pytest.approx(1, abs=1e-6)
        assert abs(found["layer"].loc[SWAP_ACROSS[0]]["cosine"]) < 0.5


def test_models_that_were_not_compared_are_named(training, atlas):
    with pytest.raises(headgram.HeadgramError, match="holds no lineage 'other'; there are: training"):
        atlas.trajectory("cosine", "other", to="first")
    with pytest.raises(headgram.HeadgramError, match="no number 'cosine': ask for to='first'"):
        atlas.trajectory("cosine", "training")
    with pytest.raises(headgram.HeadgramError, match="have no number 'layer'$"):  # no comparison has one either
        atlas.trajectory("layer", "training")
    with pytest.raises(headgram.HeadgramError, match="the table drift has no number 'layer'$"):
        atlas.trajectory("layer", "training", to="first")


@pytest.mark.parametrize("changed", ["step0", f"step{COUNT}"])
def test_what_was_compared_before_a_model_changed_is_not_read(training, tmp_path, changed):
    """As where a model was measured anew, and no plan asks for the pair any more."""
    results = training.copy(tmp_path / "project").folder / "results"
    record = results / "provenance" / f"{changed}.json"
    stages = json.loads(record.read_text())["stages"]
    stages["extract"]["qk"]["key"] = "of other weights"
    resealed(record, stages=stages)
    atlas = headgram.open_atlas(results)
    assert "step0" not in atlas.others(f"step{COUNT}")
    assert not (atlas.table("drift")["other"] + atlas.table("drift")["model"]).str.contains(changed).any()
    with pytest.raises(headgram.HeadgramError, match="was not compared with step0"):
        atlas.trajectory("cosine", "training", to="first")


def test_tables_that_contradict_each_other_are_named(training, tmp_path):
    assert training.headgram("verify").returncode == 0
    results = training.copy(tmp_path / "project").folder / "results"
    record = results / "provenance" / "lineage" / f"step{COUNT}" / "step0.json"
    for name, column, words in (
        ("drift", "cosine", "2 <X, Y>"),
        ("drift", "change_norm", "sum(s²)"),
        ("matches", "other_head", "twice"),
    ):
        path = results / "atlas" / name / f"model=step{COUNT}" / "other=step0" / f"{name}.parquet"
        table, data, sealed = pq.read_table(path, partitioning=None), path.read_bytes(), record.read_bytes()
        place = table.schema.get_field_index(column)
        values = table[column].to_numpy().copy()
        values[1] = values[0] if column == "other_head" else values[1] + 0.01
        pq.write_table(table.set_column(place, table.schema.field(place), pa.array(values)), path)
        files = json.loads(sealed)["files"]
        (entry,) = [entry for each, entry in files.items() if each.endswith(f"/{name}.parquet")]
        entry |= {"bytes": path.stat().st_size, "blake2b": checksum(path)}
        resealed(record, files=files)
        assert any(words in str(problem) for problem in verify(results)[1]), column
        path.write_bytes(data)
        record.write_bytes(sealed)
    assert verify(results)[1] == []


def test_a_lineage_of_several_shapes_is_refused_before_any_job(project):
    (project.folder / "config" / "models.tsv").write_text(
        "name\tsource\tlineage\tstep\ntiny-llama\tmodels/llama\tone\t0\ntiny-bert\tmodels/bert\tone\t1\n"
    )
    done = project.snakemake("-n")
    assert done.returncode != 0
    words = "line 3 (tiny-bert): it has width 18 in stack self, but tiny-llama has 32, of the lineage 'one': name another lineage"
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_what_makes_a_pair_stale(training, tmp_path):
    """The rest of the contract is held by the keys of the plan, in `test_plan.py`."""
    project = training.copy(tmp_path / "project")
    config, manifest = (project.folder / "config" / name for name in ("config.yaml", "models.tsv"))
    pairs = 2 * COUNT - 1
    edit(config, "pairs: [neighbours, first]", "pairs: [last]")
    planned = project.planned()
    assert len(planned) == COUNT - 2  # with the first and with its predecessor, the last one is compared already
    assert all(job.startswith("Comparing") for job in planned)
    edit(config, "pairs: [last]", "pairs: [neighbours, first]")
    edit(manifest, "\tpile\n", "\tc4\n")
    with (project.folder / "src" / "headgram" / "geometry" / "drift.py").open("a") as file:
        file.write("\n_X = 1\n")
    planned = project.planned()
    assert len([job for job in planned if job.startswith("Comparing")]) == pairs
    assert {job for job in planned if not job.startswith("Comparing")} == {"Deriving the tables of step0"}


def test_compare_reads_what_the_pipeline_wrote_and_else_computes_it(training, tmp_path):
    results, last = training.folder / "results", f"step{COUNT}"
    read = headgram.compare("step0", last, results)
    assert read.why_no_drift is None
    assert set(read.heads["circuit"]) == {"qk", "ov"}
    assert len(read.heads) == 2 * LAYERS * HEADS
    copy = training.copy(tmp_path / "project").folder / "results"
    for path in (copy / "provenance" / "lineage").rglob("*.json"):
        path.unlink()
    computed = headgram.compare("step0", last, copy)
    for name in ("heads", "changes", "matches"):
        pd.testing.assert_frame_equal(getattr(computed, name), getattr(read, name), rtol=1e-9, atol=1e-9)
    backwards = headgram.compare(last, "step0", results, circuit="ov")  # not planned
    np.testing.assert_allclose(backwards.heads["cosine"], read.heads.query("circuit == 'ov'")["cosine"], atol=1e-12)
    printed = training.headgram("compare", "step0", last)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.count("Heads that were another head before") == 2
    shown = training.headgram("show", "--where", "step=0", "--where", "step=1000")
    assert ("step0" in shown.stdout, "step1" in shown.stdout, "step2" in shown.stdout) == (True, True, False), shown.stderr


def test_the_page_draws_the_training(training, atlas, tmp_path):
    project = training.copy(tmp_path / "project")
    project.run("results/report/index.html")
    text = (project.folder / "results" / "report" / "lineages" / "0.js").read_text()
    _, arrays = unpack(from_beside(text))
    for to in ("first", "previous"):
        for circuit in ("qk", "ov"):
            drawn = atlas.trajectory("cosine", "training", to=to, circuit=circuit)
            np.testing.assert_allclose(arrays[f"{circuit}/self/{to}"][1:], drawn, rtol=2e-4, atol=1e-6)
    names = [column.name for column in columns()]
    drawn = arrays["qk/self/heads"][:, names.index("fro_sq")]
    np.testing.assert_allclose(drawn, atlas.trajectory("fro_sq", "training"), rtol=2e-4, atol=1e-6)
    drawn = arrays["qk/self/layers"][:, [*LAYER_COLUMNS].index("cosine_all")]
    np.testing.assert_allclose(drawn, atlas.trajectory("cosine_all", "training"), rtol=2e-4, atol=1e-6)
    assert project.headgram("verify").returncode == 0
    edit(project.folder / "config" / "config.yaml", "pairs: [neighbours, first]", "pairs: [first]")
    assert "Reporting on all models" in project.planned("results/report/index.html")
    assert not any(job.startswith("Rendering") for job in project.planned("results/report/index.html"))


def test_independent_models_are_matched_in_token_space(tmp_path):
    """Of other widths; the tokens of the second have other numbers, and its heads are those of the first in another order."""
    project = new_project(tmp_path / "project")
    config = project.folder / "config"
    (config / "models.tsv").write_text("name\tsource\tlineage\tstep\nnarrow\tnarrow\tall\t0\nwide\twide\tall\t1\n")
    for option in ("report:\n  enabled: true", "original:\n  enabled: true", "enabled: auto"):
        edit(config / "config.yaml", option, option.rpartition(" ")[0] + " false")
    edit(config / "config.yaml", "circuits: [qk, ov]", "circuits: [qk]")
    generator = torch.Generator().manual_seed(0)
    turned, order = torch.linalg.qr(torch.randn(36, 24, generator=generator))[0].mT, torch.randperm(90, generator=generator)
    narrow = {
        name: torch.randn(shape, generator=generator)
        for name, shape in (
            ("embed_tokens", (90, 24)),
            ("layers.0.self_attn.q_proj", (16, 24)),
            ("layers.0.self_attn.k_proj", (16, 24)),
        )
    }
    heads = [3, 0, 2, 1]  # of its first layer; a second one has heads of its own
    wide = {
        name: (rows[order] if name == "embed_tokens" else rows.view(4, 4, 24)[heads].reshape(16, 24)) @ turned
        for name, rows in narrow.items()
    }
    for name, tensors, texts in (("narrow", narrow, range(90)), ("wide", wide, order.tolist())):
        width = tensors["embed_tokens"].shape[1]
        named = {f"model.{name}.weight": tensor for name, tensor in tensors.items()}
        layers = ["0"] if name == "narrow" else ["0", "1"]
        named |= {f"model.layers.{layer}.self_attn.v_proj.weight": torch.zeros(16, width) for layer in layers}
        for role, layer in itertools.product("qk", layers[1:]):
            named[f"model.layers.{layer}.self_attn.{role}_proj.weight"] = torch.randn(16, width, generator=generator)
        write_llama(project.folder / name, len(layers), 4, kv_heads=4, rank=4, hidden=width, tensors=named)
        vocabulary = {f"t{text}": number for number, text in enumerate(texts)}
        (project.folder / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))

    refused = project.snakemake("-n")
    assert refused.returncode != 0
    assert "(wide): it has width 36 in stack self, but narrow has 24" in refused.stderr
    hint = re.search(r"--config '(lineage=.*?)'", refused.stderr)[1]
    project.run("--config", hint)
    found = headgram.compare("narrow", "wide", project.folder / "results")
    assert found.matches["other_head"].tolist() == heads
    np.testing.assert_allclose(found.matches["cosine"], 1, atol=1e-6)
    np.testing.assert_allclose(found.heads["symmetry_a"], found.heads["symmetry_b"], atol=1e-6)
    printed = project.headgram("compare", "narrow", "wide")
    assert "Heads that are alike in token space" in printed.stdout, printed.stderr
    assert project.headgram("verify").returncode == 0
    atlas = headgram.open_atlas(project.folder / "results")
    with pytest.raises(headgram.HeadgramError, match="wide was compared with narrow in token space"):
        atlas.trajectory("cosine", "all", to="first")
    for column in ("fro_sq", "symmetry_median"):
        with pytest.raises(headgram.HeadgramError, match=f"wide has other layers or heads than narrow, so {column} "):
            atlas.trajectory(column, "all")
    with pytest.raises(headgram.HeadgramError, match="compared in token space with narrow as the earlier one: name narrow first"):
        headgram.compare("wide", "narrow", project.folder / "results")
    assert "tokens have the same text" in (project.folder / "results" / "logs" / "lineage" / "wide" / "narrow.log").read_text()


def pair(atlas, name: str, model: str, other: str) -> pd.DataFrame:
    """A table about two models, by circuit, layer and head."""
    table = atlas.table(name, model)
    return table[table["other"] == other].set_index(["circuit", "layer", "head"]).sort_index()
