"""The tables about two models, against forms held whole in float64, in blocks of any size."""

import numpy as np
import pandas as pd
import pytest
import torch

from headgram.forms.circuits import CIRCUITS
from headgram.geometry.costs import BLOCK_BYTES
from headgram.geometry.spectra import spectra
from headgram.results.factors import FactorFiles, write_factors
from headgram.results.record import Provenance, Recipe, record_of, seal
from headgram.stages.lineage import Measured, measure

pytestmark = pytest.mark.usefixtures("both_ways")

LAYERS, HEADS, KV_HEADS, RANK, WIDTH = (2, 3, 7), 4, 2, 3, 20


def side(folder, name, circuit, own, shared) -> Measured:
    """What extraction and measurement leave of a model."""
    extract = Recipe("extract", "{}", name, "c")
    path = folder / name / f"{circuit}.pt"
    write_factors(path, LAYERS, dict(zip(CIRCUITS[circuit].roles, (own, shared), strict=True)))
    seal(record_of(path), Provenance(extract, name, "self", circuit), [path])
    found = [spectra(CIRCUITS[circuit].heads(*each), 2) for each in zip(own, shared, strict=True)]
    directions = [{name: getattr(each, name).float() for name in ("right", "left", "signed")} for each in found]
    return Measured(FactorFiles([path], extract.key, circuit), directions)


@pytest.mark.parametrize("circuit", list(CIRCUITS))
def test_tables_about_two_models(tmp_path, monkeypatch, circuit):
    """The later model has the layers of the earlier one in another order, a little changed."""
    generator = torch.Generator().manual_seed(0)
    before = [torch.randn(3, n, RANK, WIDTH, generator=generator) for n in (HEADS, KV_HEADS)]
    order = [1, 2, 0]
    after = [weights[order] + 0.01 * torch.randn(weights.shape, generator=generator) for weights in before]
    sides = side(tmp_path, "before", circuit, *before), side(tmp_path, "after", circuit, *after)
    found = []
    for size in (2**30, 4 * RANK * WIDTH * 3):
        monkeypatch.setitem(BLOCK_BYTES, "cpu", size)
        tables = measure((circuit, "self"), *sides, True, "cpu")
        found.append({name: table.to_pandas() for name, table in tables.items()})
    for other in found[1:]:
        for name, table in other.items():
            pd.testing.assert_frame_equal(table, found[0][name], rtol=1e-6, atol=1e-6)

    x, y = (
        np.stack([heads.form(i).numpy() for i in range(len(heads))])
        for heads in (CIRCUITS[circuit].heads(*(each.double() for each in weights)) for weights in (before, after))
    )
    norms = [np.linalg.norm(forms, axis=(1, 2)) for forms in (x, y)]
    cosines = np.einsum("aij,bij->ab", y, x) / norms[1][:, None] / norms[0]
    drift, matches = found[0]["drift"], found[0]["matches"]
    assert list(drift["layer"]) == list(np.repeat(LAYERS, HEADS))
    assert list(drift["head"]) == list(range(HEADS)) * 3
    np.testing.assert_allclose(drift["cosine"], np.diag(cosines), atol=1e-9)
    np.testing.assert_allclose(drift["change"], np.linalg.norm(y - x, axis=(1, 2)) / norms[0], rtol=1e-6)
    for i in range(len(x)):
        spaces = [np.linalg.svd(forms[i])[2][:2] for forms in (x, y)]
        assert drift["right"][i] == pytest.approx(np.linalg.norm(spaces[0] @ spaces[1].T) ** 2 / 2, abs=1e-5)
    assert (drift["expected"] == 2 / WIDTH).all()

    over = matches[matches["among"] == "stack"]
    came_from = np.array(LAYERS)[order]
    assert list(over["other_layer"]) == list(np.repeat(came_from, HEADS))
    assert list(over["other_head"]) == list(range(HEADS)) * 3
    place = [order[i // HEADS] * HEADS + i % HEADS for i in range(len(x))]
    np.testing.assert_allclose(over["cosine"], cosines[range(len(x)), place], atol=2e-6)
    others = np.abs(cosines)
    others[range(len(x)), place] = 0
    np.testing.assert_allclose(over["margin"], np.abs(over["cosine"]) - others.max(1), atol=4e-6)
    alone = {name: table.to_pandas() for name, table in measure((circuit, "self"), *sides, False, "cpu").items()}["matches"]
    pd.testing.assert_frame_equal(alone, matches[matches["among"] == "layer"].reset_index(drop=True), rtol=1e-5, atol=1e-5)
