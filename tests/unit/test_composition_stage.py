"""The tables of composition, written from extracted weights, against the definition."""

from pathlib import Path

import numpy as np
import pytest
import torch

from headgram.forms.circuits import ov, qk
from headgram.geometry.composition import KINDS
from headgram.results.factors import write_factors
from headgram.results.record import Identity, Provenance, read_record, record_of, seal
from headgram.results.tables import read_table
from headgram.stages.composition import Composed, compose
from headgram.study.options import Config

LAYERS, HEADS, WIDTH = (0, 2, 3), 4, 16
CONFIG = Config.model_validate({"composition": {"strongest": 5}})


@pytest.fixture
def extracted(tmp_path):
    """Two stacks of three layers, with grouped keys and values, each circuit in two files; and the weights themselves."""
    generator = torch.Generator().manual_seed(0)
    weights, files, keys = {}, {}, {}
    for stack in ("decoder", "cross"):
        for circuit, (own, shared), rank in (("qk", ("query", "key"), 5), ("ov", ("output", "value"), 3)):
            extract = Identity("extract", "{}", f"of {circuit}", "c")
            keys[circuit] = extract.key
            found = {
                role: torch.randn(len(LAYERS), n, rank, WIDTH, generator=generator) for role, n in ((own, HEADS), (shared, 2))
            }
            weights[stack] = weights.get(stack, {}) | found
            for name, rows in (("layers-000-000", [0]), ("layers-002-003", [1, 2])):
                path = tmp_path / stack / circuit / f"{name}.pt"
                write_factors(path, [LAYERS[i] for i in rows], {role: each[rows] for role, each in found.items()})
                seal(record_of(path), Provenance(extract, "m", stack, circuit), [path])
                files.setdefault(stack, {}).setdefault(circuit, []).append(path)
    return files, weights, Provenance(Identity("composition", "{}", "f", "c", (keys["qk"], keys["ov"])), "m", None)


def measured(folder: Path, extracted):
    files, _, provenance = extracted
    names = (folder / name for name in ("composition.parquet", "channels.parquet", "directions.pt", "record.json"))
    composed = Composed(*names)
    compose(files, composed, CONFIG, provenance)
    return composed


@pytest.mark.parametrize("block", [2**30, 4 * 5 * WIDTH * 4, 4 * 5 * WIDTH * 3])
def test_every_pair_of_an_earlier_and_a_later_layer(tmp_path, extracted, block, monkeypatch):
    """Whether a block holds all layers, one, or a part of one."""
    monkeypatch.setattr("headgram.geometry.costs.BLOCK_BYTES", block)
    composed = measured(tmp_path / "results", extracted)
    table = read_table(composed.composition).to_pandas()
    assert list(table.groupby(["stack", "kind"], sort=False).groups) == [*(("decoder", kind) for kind in KINDS), ("cross", "q")]
    for (stack, kind), rows in table.groupby(["stack", "kind"]):
        w = extracted[1][stack]
        o = torch.stack([ov(w["value"], w["output"]).to(torch.float64).form(i) for i in range(12)])
        g = o if kind == "v" else torch.stack([qk(w["query"], w["key"]).to(torch.float64).form(i) for i in range(12)])
        score = np.zeros((12, 12))
        for b in range(12):
            for a in range(12):
                product = o[a].T @ g[b] if kind == "k" else g[b] @ o[a]
                score[b, a] = product.norm() / g[b].norm() / o[a].norm()
        layer = np.repeat(LAYERS, HEADS)
        assert len(rows) == 3 * HEADS * HEADS == rows[["layer_a", "head_a", "layer_b", "head_b"]].drop_duplicates().shape[0]
        for row in rows.itertuples():
            a, b = (LAYERS.index(x) * HEADS + y for x, y in ((row.layer_a, row.head_a), (row.layer_b, row.head_b)))
            assert row.layer_a < row.layer_b
            assert row.score == pytest.approx(score[b, a], rel=1e-5)
            assert row.times_chance == pytest.approx(score[b, a] * 4, rel=1e-5)
            later = score[b, layer > row.layer_b]
            assert row.later == len(later)
            assert row.acausal == pytest.approx((later < score[b, a]).mean() if len(later) else 0)


def test_the_strongest_pairs_are_looked_at_closely(tmp_path, extracted):
    composed = measured(tmp_path / "results", extracted)
    table, channels = (read_table(path).to_pandas() for path in (composed.composition, composed.channels))
    directions = torch.load(composed.directions, weights_only=True)
    pair = ["layer_a", "head_a", "layer_b", "head_b"]
    assert {stack: list(kinds) for stack, kinds in directions.items()} == {"decoder": list(KINDS), "cross": ["q"]}
    for (stack, kind), rows in channels.groupby(["stack", "kind"]):
        all_rows = table[(table["stack"] == stack) & (table["kind"] == kind)]
        assert rows["score"].tolist() == all_rows["score"].nlargest(5).tolist()
        assert rows["place"].tolist() == [0, 1, 2, 3, 4]
        found = directions[stack][kind]
        assert found["pairs"].tolist() == rows[pair].to_numpy().tolist()
        s = found["singular_values"]
        np.testing.assert_allclose(rows["first"], s[:, 0] ** 2 / (s**2).sum(1))
        assert found["carried"].shape == found["right"].shape == (5, 3 if kind == "v" else 4 if kind == "q" else 3, WIDTH)
    assert read_record(composed.record).stage == "composition"


def test_a_single_layer_has_no_pairs(tmp_path, extracted):
    files, weights, provenance = extracted
    first = {circuit: paths[:1] for circuit, paths in files["decoder"].items()}
    composed = measured(tmp_path / "results", ({"decoder": first}, weights, provenance))
    assert [len(read_table(path)) for path in (composed.composition, composed.channels)] == [0, 0]
