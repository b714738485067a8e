"""`headgram show`, `compare` and `export` of finished runs, against the atlas itself."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

import headgram
from headgram.cli import app
from pipeline.conftest import Project, new_project
from tiny import llama_tensors, write_llama, write_manifest

TABLES = ("heads", "spectra", "gram", "pairs", "overlap", "neighbours", "layers", "models", "drift", "changes", "matches")
TABLES += ("composition", "channels", "kernels", "tokens", "token_paths", "rotary", "frequencies")


def headgram_command(project: Project, *arguments: str) -> str:
    """What a command prints; its error is raised."""
    done = CliRunner().invoke(app, [*arguments, "--results", str(project.folder / "results")])
    if done.exception:
        raise done.exception
    return done.stdout


def rows(printed: str, title: str, columns: int) -> list[list[str]]:
    """The cells of the table with a title that have no blanks in them, row by row."""
    lines = iter(printed.split(title)[1].splitlines())
    for line in lines:
        if set(line.strip()) == {"─"}:
            break
    found = []
    for line in lines:
        if not line.strip():
            break
        found.append([cell for cell in line.split() if not set(cell) <= set("▏▎▍▌▋▊▉█")][:columns])
    return found


@pytest.fixture(scope="module")
def atlas(finished):
    return headgram.open_atlas(finished.folder / "results")


def test_show_says_what_the_tables_say(finished, atlas):
    printed = headgram_command(finished, "show", "tiny-llama", "--top", "3")
    facts = "llama, 4 layers of 4 heads, which share 2 factors, rank 8, width 32, stored as F32"
    assert f"tiny-llama, circuit qk, stack self: {facts}" in printed
    layers = atlas.layers().query("model == 'tiny-llama'")
    expected = [[str(row.layer), f"{row.symmetry_median:.3f}", f"{row.layer_symmetry_score:+.3f}"] for row in layers.itertuples()]
    assert rows(printed, "Layers: ", 3) == expected
    heads = atlas.heads().query("model == 'tiny-llama'")
    for title, chosen in (("Most", heads.nlargest(3, "symmetry")), ("Least", heads.nsmallest(3, "symmetry"))):
        expected = [[str(row.layer), str(row.head), f"{row.symmetry:.3f}"] for row in chosen.itertuples()]
        assert rows(printed, f"{title} symmetric heads", 3) == expected
    gram = atlas.table("gram", "tiny-llama").query("layer_a < layer_b")
    gram = gram.loc[gram["cosine"].abs().nlargest(3).index]
    expected = [[str(row.layer_a), str(row.layer_b), str(row.head), f"{row.cosine:+.3f}"] for row in gram.itertuples()]
    assert rows(printed, "Strongest couplings", 4) == expected


def test_show_without_a_name_lists_the_models(finished):
    printed = headgram_command(finished, "show")
    assert [row[:5] for row in rows(printed, "Models: ", 5)] == [
        ["tiny-bert", "qk", "self", "bert", "3"],
        ["tiny-llama", "qk", "self", "llama", "4"],
    ]


@pytest.mark.parametrize("command", [("show", "none"), ("compare", "none", "tiny-bert"), ("export", "none", "--to", "no")])
def test_unknown_models_are_refused_with_the_known_ones(finished, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(headgram.HeadgramError, match="'none' is not in .*; there are: tiny-bert, tiny-llama"):
        headgram_command(finished, *command)
    assert list(tmp_path.iterdir()) == []


def test_unknown_stacks_are_refused(finished):
    with pytest.raises(headgram.HeadgramError, match="no stack 'cross'; there are: self"):
        headgram_command(finished, "show", "tiny-bert", "--stack", "cross")
    with pytest.raises(headgram.HeadgramError, match="no stack 'cross'; there are: self"):
        headgram_command(finished, "compare", "tiny-bert", "tiny-bert", "--stack", "cross")


def test_csv_holds_every_table_to_the_last_bit(finished, atlas, tmp_path):
    printed = headgram_command(finished, "export", "--to", str(tmp_path / "csv"))
    assert str(tmp_path / "csv" / "overlap.csv") in printed
    assert sorted(path.name for path in (tmp_path / "csv").iterdir()) == sorted(f"{name}.csv" for name in TABLES)
    for name in TABLES:
        table = atlas.table(name)
        narrow = {column: dtype for column, dtype in table.dtypes.items() if dtype == np.float32}
        empty = {column: [""] for column, values in table.items() if values.dtype.kind == "f" or values.isna().any()}
        written = pd.read_csv(tmp_path / "csv" / f"{name}.csv", dtype=narrow, keep_default_na=False, na_values=empty)
        pd.testing.assert_frame_equal(written, table, check_exact=True, check_dtype=False)


def test_netcdf_holds_every_table_with_named_dimensions(finished, atlas, tmp_path):
    headgram_command(finished, "export", "tiny-llama", "--to", str(tmp_path), "--format", "netcdf")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-llama.nc"]
    with xr.open_dataset(tmp_path / "tiny-llama.nc", group="qk/self") as data:
        for name in ("gram", "cosine", "antisymmetric", "z"):
            np.testing.assert_array_equal(data[name], atlas.gram("tiny-llama", value=name))
        np.testing.assert_array_equal(data["left"], atlas.overlap("tiny-llama", side="left"))
        heads = atlas.table("heads", "tiny-llama").set_index(["layer", "head"])
        assert data["directionality"].sel(layer=2, head=3) == heads.loc[(2, 3), "directionality"]
        spectra = atlas.table("spectra", "tiny-llama").set_index(["layer", "head", "index"])
        assert data["singular_value"].sel(layer=1, head=0, index=5) == spectra.loc[(1, 0, 5), "singular_value"]
        assert data["cosine_next"].dims == ("layer",)
        assert (data.attrs["architecture"], data.attrs["rank"], data.attrs["model"]) == ("llama", 8, "tiny-llama")


@pytest.fixture(scope="module")
def revisions(tmp_path_factory) -> Project:
    """A model; a later revision of it, with one head turned round, one scaled and one new; and a wider model of its shape."""
    project = new_project(tmp_path_factory.mktemp("revisions") / "project")
    before = llama_tensors(2, 4, 2, 8, 32, seed=0)
    before |= {f"model.layers.{layer}.input_layernorm.weight": torch.linspace(0.1, 2, 32) for layer in (0, 1)}
    after = {name: tensor.clone() for name, tensor in before.items()}
    query = after["model.layers.1.self_attn.q_proj.weight"]
    query[:8] *= -1
    query[8:16] *= 3
    query[16:24] = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    write_llama(project.folder / "before", layers=2, tensors=before)
    write_llama(project.folder / "after", layers=2, tensors=after)
    write_llama(project.folder / "wide", layers=2, hidden=48)
    write_manifest(project.folder / "config" / "models.tsv", {name: name for name in ("before", "after", "wide")})
    project.run("--config", "weights={norm: [raw, folded]}", "rotary={offsets: [0, 3]}")
    return project


def test_compare_finds_the_heads_that_moved(revisions, tmp_path):
    out = tmp_path / "moved.csv"
    printed = headgram_command(revisions, "compare", "before", "after", "--circuit", "qk", "--top", "2", "--out", str(out))
    heads = pd.read_csv(out).set_index(["layer", "head"])
    np.testing.assert_allclose(heads.loc[0, "cosine"], 1)
    np.testing.assert_allclose(heads.loc[1, "cosine"].to_numpy()[[0, 1, 3]], [-1, 1, 1])
    pair = [headgram.open_checkpoint(revisions.folder / name).qk("self", 1) for name in ("before", "after")]
    one, other = (k[1].double().numpy().T @ q[2].double().numpy() for q, k in pair)
    cosine = (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)
    assert heads.loc[(1, 2), "cosine"] == pytest.approx(cosine)
    np.testing.assert_allclose(heads.loc[0, ["right", "left", "signed"]], 1, atol=1e-6)
    spaces = [np.linalg.svd(form)[2][:8] for form in (one, other)]
    assert heads.loc[(1, 2), "right"] == pytest.approx(np.linalg.norm(spaces[0] @ spaces[1].T) ** 2 / 8, abs=1e-6)
    assert heads.loc[(1, 1), "spectral_norm_b"] == pytest.approx(3 * heads.loc[(1, 1), "spectral_norm_a"])
    assert [row[:3] for row in rows(printed, "Heads that moved most", 3)] == [["1", "0", "-1.000"], ["1", "2", f"{cosine:+.3f}"]]
    assert "Random subspaces overlap by 0.250 on average." in printed


@pytest.mark.parametrize("form", ["qk-folded", "qk@3", "qk-folded@3"])
def test_forms_that_are_made_are_compared_and_shown(revisions, form):
    """Against gains and angles in NumPy, by the definition of rotary encoding with pairs of halves."""
    angles = (3 if form.endswith("@3") else 0) * 10_000.0 ** (-np.arange(4) / 4)
    rotation = np.block([[np.diag(np.cos(angles)), -np.diag(np.sin(angles))], [np.diag(np.sin(angles)), np.diag(np.cos(angles))]])
    gain = torch.linspace(0.1, 2, 32).double().numpy() if "folded" in form else 1
    pair = [headgram.open_checkpoint(revisions.folder / name).qk("self", 1) for name in ("before", "after")]
    one, other = ((k[1].double().numpy() * gain).T @ rotation @ (q[2].double().numpy() * gain) for q, k in pair)
    found = headgram.compare("before", "after", revisions.folder / "results", circuit=form)
    assert found.why_no_drift is None
    assert set(found.heads["circuit"]) == {form}
    heads = found.heads.set_index(["layer", "head"])
    cosine = (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)
    assert heads.loc[(1, 2), "cosine"] == pytest.approx(cosine, abs=1e-6)
    assert heads.loc[(1, 2), "norm_before"] == pytest.approx(np.linalg.norm(one), rel=1e-6)
    assert heads.loc[(1, 2), "fro_sq_b"] == pytest.approx(np.linalg.norm(other) ** 2, rel=1e-6)
    assert form in headgram_command(revisions, "compare", "before", "after", "--circuit", form)
    printed = headgram_command(revisions, "show", "after", "--circuit", form, "--head", "1.2")
    assert f"after, self, {form}: layer 1, head 2" in printed
    assert f"circuit {form}, stack self" in headgram_command(revisions, "show", "after", "--circuit", form)
    atlas = headgram.open_atlas(revisions.folder / "results")
    assert atlas.pairs("after", circuit=form).shape == atlas.pairs("after").shape
    assert atlas.gram("before", circuit=form).sel(layer_a=1, layer_b=1, head=2) == pytest.approx(
        np.linalg.norm(one) ** 2, rel=1e-6
    )


def test_a_form_that_was_not_measured_is_one_sentence(revisions):
    known = "there are: qk, qk@3, qk-folded, qk-folded@3; the options weights.norm and rotary.offsets ask for more"
    atlas = headgram.open_atlas(revisions.folder / "results")
    for ask in (
        lambda: headgram_command(revisions, "show", "before", "--circuit", "qk@5"),
        lambda: headgram_command(revisions, "compare", "before", "after", "--circuit", "qk@5"),
        lambda: atlas.pairs("before", circuit="qk@5"),
        lambda: atlas.directions("before", "qk@5"),
    ):
        with pytest.raises(headgram.HeadgramError) as error:
            ask()
        assert str(error.value) == f"the circuit 'qk@5' of 'before' was not measured; {known}"
    with pytest.raises(headgram.HeadgramError, match=r"there are: qk, qk@3, qk-folded, qk-folded@3$"):
        headgram_command(revisions, "show", "before", "--circuit", "magic")


def test_compare_says_why_there_are_no_cosines(revisions, finished):
    found = headgram.compare("before", "wide", revisions.folder / "results")
    assert found.why_no_drift == "the forms differ in shape (width 32 and 48), so they have no cosine"
    assert "cosine" not in found.heads
    assert "right" not in found.heads
    assert "No cosines: the forms differ in shape" in headgram_command(revisions, "compare", "before", "wide")
    with pytest.raises(headgram.HeadgramError, match="tiny-bert has 3 layers of 3 heads, tiny-llama has 4 layers of 4 heads"):
        headgram_command(finished, "compare", "tiny-bert", "tiny-llama")


def test_compare_without_the_extracted_weights(revisions, tmp_path):
    project = revisions.copy(tmp_path / "project")
    for path in (project.folder / "results" / "models" / "after").rglob("weights/*"):
        path.unlink()
    printed = headgram_command(project, "compare", "before", "after")
    assert "No cosines: the extracted weights of after are no longer in" in printed
    assert "`headgram run --forcerun extract`" in printed
    assert rows(printed, "Heads that moved most", 2)[0] == ["1", "2"]  # by the overlap of the query side
