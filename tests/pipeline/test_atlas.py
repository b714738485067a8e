"""The finished results, through the door that notebooks use."""

import numpy as np
import pandas as pd
import pytest
import torch

import headgram
from same_index import pair_products


@pytest.fixture(scope="module")
def atlas(finished):
    return headgram.open_atlas(finished.folder / "results")


def weights(finished, name, layers):
    checkpoint = headgram.open_checkpoint(finished.folder / "models" / name)
    pairs = [checkpoint.qk("self", layer) for layer in range(layers)]
    return tuple(torch.stack(each) for each in zip(*pairs, strict=True))


@pytest.mark.parametrize(("model", "source", "layers"), [("tiny-llama", "llama", 4), ("tiny-bert", "bert", 3)])
def test_tables_hold_what_the_functions_return(atlas, finished, model, source, layers):
    w_q, w_k = weights(finished, source, layers)
    heads = atlas.heads().query("model == @model").set_index(["layer", "head"]).sort_index()
    spectra = atlas.spectra().query("model == @model").set_index(["layer", "head", "index"]).sort_index()
    directions = atlas.directions(model)["self"]
    assert directions["layers"].tolist() == list(range(layers))
    for layer in range(layers):
        result = headgram.spectrum(w_q[layer], w_k[layer], topk=8)
        for name in ("fro_sq", "trace", "self_overlap", "stable_rank", "symmetry", "positive_energy"):
            np.testing.assert_array_equal(heads.loc[layer][name], getattr(result, name))
        rank = w_q.shape[2]
        measured = spectra.loc[layer]["symmetric_eigenvalue"].to_numpy().reshape(-1, 2 * rank)
        np.testing.assert_array_equal(measured, result.symmetric_eigenvalues)
        singular = spectra.loc[layer]["singular_value"].to_numpy().reshape(-1, 2 * rank)
        np.testing.assert_array_equal(singular[:, :rank], result.singular_values)
        assert (singular[:, rank:] == 0).all()
        for name in ("right", "left", "signed"):
            assert torch.equal(directions[name][layer], getattr(result, name).float())
    gram = atlas.gram(model)
    assert gram.dims == ("layer_a", "layer_b", "head")
    exact = pair_products(w_q, w_k, w_q, w_k)
    norms = np.sqrt(np.einsum("aah->ah", exact.gram))
    bound = 1e-6 * norms[:, None] * norms[None]
    z = exact.gram.numpy() / norms[:, None] / norms[None] * w_q.shape[-1]
    expected = {
        "gram": exact.gram,
        "transposed": exact.transposed,
        "symmetric": (exact.gram + exact.transposed) / 2,
        "antisymmetric": (exact.gram - exact.transposed) / 2,
    }
    for name, values in expected.items():
        assert (np.abs(atlas.gram(model, value=name).to_numpy() - values.numpy()) <= bound).all()
    np.testing.assert_allclose(atlas.gram(model, value="z"), z, atol=1e-6 * w_q.shape[-1])
    np.testing.assert_array_equal(gram, gram.transpose("layer_b", "layer_a", "head"))


def test_unknown_names_are_refused(atlas, tmp_path):
    with pytest.raises(headgram.HeadgramError, match="'none' is not in"):
        atlas.gram("none")
    with pytest.raises(headgram.HeadgramError, match="no stack 'cross'"):
        atlas.gram("tiny-bert", "cross")
    with pytest.raises(headgram.HeadgramError, match="not in"):
        atlas.directions("../x")
    with pytest.raises(headgram.HeadgramError, match="no column 'sine'"):
        atlas.gram("tiny-bert", value="sine")
    for rows_of in (atlas.heads, atlas.spectra, atlas.layers, atlas.summary):
        with pytest.raises(headgram.HeadgramError, match="circuit 'vo'; there are: qk"):
            rows_of("vo")
    for of_model in (atlas.gram, atlas.pairs, atlas.overlap, atlas.circuits, atlas.stacks, atlas.by_offset, atlas.dataset):
        with pytest.raises(headgram.HeadgramError, match="`model` is a text, not NoneType"):
            of_model(None)
    with pytest.raises(headgram.HeadgramError, match=r"no tokens .* tokens\.enabled"):
        atlas.tokens("tiny-bert", 0, 0)
    with pytest.raises(headgram.HeadgramError, match="no finished model"):
        headgram.open_atlas(tmp_path)


def test_charts_hold_the_numbers_of_the_tables(finished, tmp_path):
    atlas = headgram.open_atlas(finished.folder / "results")
    where = {"stack": "self", "circuit": "qk"}

    def rows(chart, name, keys, value="value"):
        return pd.DataFrame(chart.to_dict()["datasets"][name]).set_index(keys)[value].sort_index()

    heads = atlas.of_heads("heads", "tiny-llama", **where).set_index(["layer", "head"]).sort_index()
    for column in ("symmetry", "stable_rank"):
        chart = headgram.plot.heads(atlas, "tiny-llama", column, **where)
        np.testing.assert_array_equal(rows(chart, "cells", ["layer", "head"]), heads[column])
    gram = atlas.gram("tiny-llama", value="cosine")
    keys = ["layer_a", "layer_b"]
    np.testing.assert_allclose(
        rows(headgram.plot.layers(atlas, "tiny-llama"), "cells", keys), gram.mean("head").to_numpy().ravel()
    )
    one = headgram.plot.layers(atlas, "tiny-llama", "left", head=2)
    np.testing.assert_array_equal(
        rows(one, "cells", keys), atlas.overlap("tiny-llama", side="left").sel(head=2).to_numpy().ravel()
    )
    spectra = atlas.of_heads("spectra", "tiny-llama", **where).query("layer == 1 and head == 3")
    for signed, name, count in ((False, "singular_value", 8), (True, "symmetric_eigenvalue", 16)):
        chart = headgram.plot.spectrum(atlas, "tiny-llama", 1, 3, signed)
        np.testing.assert_array_equal(rows(chart, "chosen", ["index"]), -np.sort(-spectra[name])[:count])
        assert len(rows(chart, "others", ["head", "index"])) == 3 * count
    chart = headgram.plot.depth(atlas, atlas.models, "stable_rank")
    layers = atlas.of_heads("layers", "tiny-bert", **where).sort_values("layer")
    np.testing.assert_array_equal(rows(chart, "profile", ["series", "x"], "median")["tiny-bert"], layers["stable_rank_median"])
    assert chart.to_dict()["datasets"]["chance"] == []
    (chance,) = headgram.plot.depth(atlas, "tiny-bert").to_dict()["datasets"]["chance"]
    assert (chance["low"] + chance["high"]) / 2 == pytest.approx(0.5 + 1 / 2 / int(atlas.heads()["hidden"].iloc[0]))
    chart.save(tmp_path / "depth.svg")
    assert "Stable rank along the depth" in (tmp_path / "depth.svg").read_text()
    pairs = atlas.pairs("tiny-llama", value="transposed").to_numpy().reshape(16, 16)
    chart = headgram.plot.matrix(atlas, "tiny-llama", "transposed")
    np.testing.assert_array_equal(rows(chart, "cells", ["heads_a", "heads_b"]).to_numpy().reshape(16, 16), pairs)
    for name, *arguments in [
        ("matrix", "tiny-llama", "none"),
        ("composition", "tiny-llama"),
        ("composition", "tiny-llama", "x"),
        ("trajectory", "symmetry", "none"),
        ("heads", "none"),
        ("heads", "tiny-llama", "none"),
        ("layers", "tiny-llama", "none"),
        ("layers", "tiny-llama", "cosine", 9),
        ("spectrum", "tiny-llama", 9, 0),
        ("depth", []),
        ("depth", "tiny-bert", "none"),
    ]:
        with pytest.raises(headgram.HeadgramError):
            getattr(headgram.plot, name)(atlas, *arguments)
    with pytest.raises(headgram.HeadgramError, match="open_atlas"):
        headgram.plot.heads("results", "tiny-llama")
