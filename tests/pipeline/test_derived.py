"""The derived tables of a finished run against their definitions."""

import numpy as np
import pytest
import torch

import headgram
from headgram.results.tables import TABLES
from pipeline.conftest import edit, new_project
from tiny import llama_tensors, write_llama, write_manifest

NUMBERS = ("fro_sq", "trace", "symmetry", "effective_rank", "positive_energy", "residual", "symmetry_score", "directionality")


@pytest.fixture(scope="module")
def atlas(finished):
    return headgram.open_atlas(finished.folder / "results")


def forms(finished, source, layer):
    """All forms of a layer, held whole: (H, d, d)."""
    q, k = headgram.open_checkpoint(finished.folder / "models" / source).qk("self", layer)
    k = k.repeat_interleave(len(q) // len(k), 0)
    return np.einsum("hrx,hry->hxy", k.double().numpy(), q.double().numpy())


@pytest.mark.parametrize(("model", "layers"), [("tiny-llama", 4), ("tiny-bert", 3)])
def test_layers_summarise_their_heads(atlas, model, layers):
    heads = atlas.heads().query("model == @model")
    table = atlas.layers().query("model == @model").set_index("layer")
    assert list(table.index) == list(range(layers))
    for name in NUMBERS:
        for layer, values in heads.groupby("layer")[name]:
            quartiles = [table.loc[layer, f"{name}_{label}"] for label in ("q25", "median", "q75")]
            np.testing.assert_allclose(quartiles, np.percentile(values, [25, 50, 75]), rtol=1e-12)
    cosine = atlas.gram(model, value="cosine").mean("head").to_numpy()
    for layer in range(layers):
        others = [cosine[layer, other] for other in range(layers) if other != layer]
        assert table.loc[layer, "cosine_all"] == pytest.approx(np.mean(others))
        assert table.loc[layer, "cosine_previous"] == pytest.approx(cosine[layer, layer - 1] if layer else 0)
        assert table.loc[layer, "cosine_next"] == pytest.approx(cosine[layer, layer + 1] if layer < layers - 1 else 0)


@pytest.mark.parametrize(("model", "source", "layers"), [("tiny-llama", "llama", 4), ("tiny-bert", "bert", 3)])
def test_scores_of_layers_are_those_of_the_sum_of_their_forms(atlas, finished, model, source, layers):
    table = atlas.layers().query("model == @model").set_index("layer")
    for layer in range(layers):
        g = forms(finished, source, layer).sum(0)
        assert table.loc[layer, "layer_symmetry_score"] == pytest.approx((g * g.T).sum() / (g**2).sum())
        query, key = (
            norms[norms > norms.mean() + 2 * norms.std(ddof=1)].sum() for norms in (np.linalg.norm(g, axis=a) for a in (0, 1))
        )
        expected = (query - key) / (query + key) if query + key else 0
        assert table.loc[layer, "layer_directionality"] == pytest.approx(expected)


@pytest.mark.parametrize("side", ["right", "left", "signed"])
def test_overlaps_are_those_of_the_directions(atlas, side):
    directions = atlas.directions("tiny-llama")["self"][side].double().numpy()
    overlap = atlas.overlap("tiny-llama", side=side)
    layers, heads, kept, hidden = directions.shape
    assert overlap.attrs["expected"] == kept / hidden
    assert overlap.shape == (layers, layers, heads)
    for a in range(layers):
        for b in range(layers):
            for head in range(heads):
                defined = np.linalg.norm(directions[a, head] @ directions[b, head].T) ** 2 / kept
                assert overlap.sel(layer_a=a, layer_b=b, head=head).item() == pytest.approx(defined, abs=1e-12)


@pytest.mark.parametrize(("model", "source"), [("tiny-llama", "llama"), ("tiny-bert", "bert")])
def test_pairs_are_those_of_the_forms(atlas, finished, model, source):
    layers = len(atlas.layers().query("model == @model"))
    g = np.concatenate([forms(finished, source, layer) for layer in range(layers)])
    g /= np.linalg.norm(g, axis=(1, 2), keepdims=True)
    expected = {"cosine": np.einsum("aij,bij->ab", g, g), "transposed": np.einsum("aij,bji->ab", g, g)}
    for value, truth in expected.items():
        found = atlas.pairs(model, value=value)
        assert found.dims == ("layer_a", "head_a", "layer_b", "head_b")
        np.testing.assert_allclose(found.to_numpy().reshape(truth.shape), truth, atol=2e-6)
    table, heads = atlas.table("pairs", model), len(g) // layers
    assert set(table["circuit"]) == {"qk"}
    readers = heads // atlas.summary().set_index("model").loc[model, "kv_heads"]
    shared = (table["layer_a"] == table["layer_b"]) & (table["head_a"] // readers == table["head_b"] // readers)
    assert (table["shared"] == shared).all()


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-bert"])
def test_neighbours_are_the_best_of_all_pairs(atlas, model):
    table = atlas.table("neighbours", model)
    width = atlas.summary().set_index("model").loc[model, "hidden"]
    for measure in ("cosine", "transposed"):
        values = atlas.pairs(model, value=measure)
        heads = len(values["head_a"])
        matrix = values.to_numpy().reshape(len(values["layer_a"]) * heads, -1).copy()
        np.fill_diagonal(matrix, 0)
        mine = table.query("measure == @measure").sort_values(["layer", "head", "place"])
        first = mine.query("place == 0")
        best = np.abs(matrix).argmax(1)
        assert ((first["other_layer"] * heads + first["other_head"]).to_numpy() == best).all()
        np.testing.assert_allclose(first["value"], matrix[np.arange(len(best)), best], rtol=1e-6)
        assert (mine["same_layer"] == (mine["layer"] == mine["other_layer"])).all()
        assert mine["same_layer"].any()
        np.testing.assert_allclose(mine["deviations"], mine["value"].abs() * width, rtol=1e-6)
        assert (mine.groupby(["layer", "head"]).size() == 8).all()


def test_equal_indices_alone(finished, tmp_path):
    """`gram.pairs: same` measures what it says, and the rest of the tables is the same."""
    project = finished.copy(tmp_path / "project")
    edit(project.folder / "config" / "config.yaml", "pairs: auto", "pairs: same")
    project.run()
    before, atlas = (headgram.open_atlas(each.folder / "results") for each in (finished, project))
    table = atlas.table("pairs")
    assert (table["head_a"] == table["head_b"]).all()
    pairs = atlas.pairs("tiny-llama")
    assert np.isnan(pairs.sel(layer_a=0, head_a=0, layer_b=1, head_b=1))
    place = {"layer_a": 0, "head_a": 1, "layer_b": 2, "head_b": 1}
    np.testing.assert_allclose(pairs.sel(place), before.pairs("tiny-llama").sel(place), atol=2e-6)
    assert set(atlas.table("neighbours")["measure"]) == {"right", "left", "signed"}
    largest = float(before.gram("tiny-llama").max())  # by another route, inner products differ by 1e-6 of both norms at most
    for column, size in (("gram", largest), ("transposed", largest), ("cosine", 1.0)):
        one, other = (each.gram("tiny-llama", value=column).to_numpy() for each in (before, atlas))
        np.testing.assert_allclose(one, other, atol=1e-6 * size)
    done = project.headgram("verify")
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_row_per_model_and_stack(atlas):
    table = atlas.summary().set_index("model")
    llama = table.loc["tiny-llama"]
    facts = ["circuit", "stack", "architecture", "stored_dtype", "layers", "heads", "kv_heads", "rank", "hidden", "directions"]
    assert list(llama[facts]) == ["qk", "self", "llama", "F32", 4, 4, 2, 8, 32, 8]
    heads = atlas.heads().query("model == 'tiny-llama'")
    for name in NUMBERS:
        assert llama[f"{name}_median"] == pytest.approx(heads[name].median())
    cosine = atlas.gram("tiny-llama", value="cosine").to_numpy()
    adjacent = [cosine[layer, layer + 1] for layer in range(3)]
    assert llama["cosine_adjacent"] == pytest.approx(np.mean(adjacent))
    assert llama["cosine_all"] == pytest.approx(np.mean([cosine[a, b] for a in range(4) for b in range(4) if a != b]))
    overlap = atlas.overlap("tiny-llama", side="signed").to_numpy()
    assert llama["overlap_signed_adjacent"] == pytest.approx(np.mean([overlap[layer, layer + 1] for layer in range(3)]))
    assert llama["overlap_expected"] == 8 / 32


def test_one_layer_and_heads_that_fall_short(tmp_path):
    """No other layer to compare with; a zero head; one of rank one: nothing is NaN; missing directions overlap with nothing."""
    project = new_project(tmp_path / "project")
    tensors = llama_tensors(1, 4, 2, 8, 32, seed=0)
    query = tensors["model.layers.0.self_attn.q_proj.weight"]
    query[:8] = 0
    query[8:16] = torch.outer(2.0 ** torch.arange(8), query[8])
    write_llama(project.folder / "models" / "llama", layers=1, tensors=tensors)
    write_manifest(project.folder / "config" / "models.tsv", {"one": "models/llama"})
    edit(project.folder / "config" / "config.yaml", "compression: zstd", "compression: none")
    project.run()
    atlas = headgram.open_atlas(project.folder / "results")
    for name in ("heads", "layers", "models"):
        assert atlas.table(name)[[field.name for field in TABLES[name] if not field.nullable]].notna().all().all()
    heads = atlas.heads()
    assert heads.loc[0, ["symmetry_score", "directionality"]].tolist() == [0, 0]
    assert atlas.layers().loc[0, ["cosine_previous", "cosine_next", "cosine_all"]].tolist() == [0, 0, 0]
    for side, ranks in (("right", [0, 1, 8, 8]), ("left", [0, 1, 8, 8]), ("signed", [0, 2, 8, 8])):
        np.testing.assert_allclose(atlas.overlap("one", side=side)[0, 0], np.array(ranks) / 8, atol=1e-6)
    done = project.headgram("verify")
    assert done.returncode == 0, done.stderr
