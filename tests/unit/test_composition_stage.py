"""The tables of composition, written from extracted weights, against the definition."""

from pathlib import Path

import numpy as np
import pytest
import torch

from headgram.forms.circuits import ov, qk
from headgram.forms.reading import Frame, Frames, Norm, Rotary
from headgram.geometry.composition import KINDS
from headgram.geometry.costs import BLOCK_BYTES
from headgram.results.factors import write_factors
from headgram.results.record import Provenance, Recipe, read_record, record_of, seal
from headgram.results.tables import read_table
from headgram.stages.composition import Composed, compose
from headgram.stages.extracted import ExtractedModel
from headgram.study.options import Config
from rotated import rotated

LAYERS, HEADS, WIDTH = (0, 2, 3), 4, 16
CONFIG = Config.model_validate({"composition": {"strongest": 5}})


@pytest.fixture
def extracted(tmp_path):
    """Two stacks of three layers, with grouped keys and values, each circuit in two files; and the weights themselves."""
    generator = torch.Generator().manual_seed(0)
    weights, files, keys = {}, {}, {}
    for stack in ("decoder", "encoder", "cross"):
        for circuit, (own, shared), rank in (("qk", ("query", "key"), 5), ("ov", ("output", "value"), 3)):
            extract = Recipe("extract", "{}", f"of {circuit}", "c")
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
    return files, weights, Provenance(Recipe("composition", "{}", "f", "c", (keys["qk"], keys["ov"])), "m", None)


def measured(folder: Path, extracted, frames=None):
    files, _, provenance = extracted
    tables = ("composition.parquet", "channels.parquet", "kernels.parquet")
    composed = Composed(*(folder / name for name in (*tables, "directions.pt", "record.json")))
    keys = dict(zip(("qk", "ov"), provenance.recipe.upstream, strict=True))
    compose(ExtractedModel(files, keys, frames or {}), composed, CONFIG, provenance)
    return composed


@pytest.mark.parametrize("block", [2**30, 4 * 5 * WIDTH * 4, 4 * 5 * WIDTH * 3])
def test_every_pair_of_an_earlier_and_a_later_layer(tmp_path, extracted, block, monkeypatch):
    """Whether a block holds all layers, one, or a part of one."""
    monkeypatch.setitem(BLOCK_BYTES, "cpu", block)
    composed = measured(tmp_path / "results", extracted)
    table = read_table(composed.composition).to_pandas()
    writers = [(stack, kind, stack) for stack in ("decoder", "encoder") for kind in KINDS]
    writers += [("cross", "q", "cross"), ("cross", "k", "encoder"), ("cross", "v", "encoder")]
    assert list(table.groupby(["stack", "kind", "writer"], sort=False).groups) == writers
    assert table["averaged"].isna().all()  # nothing is known of positions here, nor of norms
    assert not table["folded"].any()
    for (stack, kind, writer), rows in table.groupby(["stack", "kind", "writer"]):
        w, v = extracted[1][stack], extracted[1][writer]
        o = torch.stack([ov(v["value"], v["output"]).to(torch.float64).form(i) for i in range(12)])
        own = ov(w["value"], w["output"]) if kind == "v" else qk(w["query"], w["key"])
        g = torch.stack([own.to(torch.float64).form(i) for i in range(12)])
        score = np.zeros((12, 12))
        for b in range(12):
            for a in range(12):
                product = o[a].T @ g[b] if kind == "k" else g[b] @ o[a]
                score[b, a] = product.norm() / g[b].norm() / o[a].norm()
        layer = np.repeat(LAYERS, HEADS)
        count = (3 if stack == writer else 9) * HEADS * HEADS  # all layers of an encoder come before what reads it
        assert len(rows) == count == rows[["layer_a", "head_a", "layer_b", "head_b"]].drop_duplicates().shape[0]
        for row in rows.itertuples():
            a, b = (LAYERS.index(x) * HEADS + y for x, y in ((row.layer_a, row.head_a), (row.layer_b, row.head_b)))
            assert row.layer_a < row.layer_b or stack != writer
            assert row.score == pytest.approx(score[b, a], rel=1e-5)
            assert row.times_chance == pytest.approx(score[b, a] * 4, rel=1e-5)
            later = score[b, layer > row.layer_b] if stack == writer else []
            assert row.later == len(later)
            assert row.acausal == pytest.approx((later < score[b, a]).mean() if len(later) else 0)


def test_the_strongest_pairs_are_looked_at_closely(tmp_path, extracted):
    composed = measured(tmp_path / "results", extracted)
    table, channels = (read_table(path).to_pandas() for path in (composed.composition, composed.channels))
    directions = torch.load(composed.directions, weights_only=True)
    pair = ["layer_a", "head_a", "layer_b", "head_b"]
    assert {stack: list(kinds) for stack, kinds in directions.items()} == {stack: list(KINDS) for stack in directions}
    assert list(directions) == ["decoder", "encoder", "cross"]
    for (stack, kind), rows in channels.groupby(["stack", "kind"]):
        all_rows = table[(table["stack"] == stack) & (table["kind"] == kind)]
        assert rows["score"].tolist() == all_rows["score"].nlargest(5).tolist()
        assert rows["place"].tolist() == [0, 1, 2, 3, 4]
        found = directions[stack][kind]
        within = (rows["writer"] == stack).all()  # else the form leads from one stream to another, and has no eigenvalues
        assert (rows[["copying", "positive", "departure"]].notna() == within).all(axis=None)
        assert ("eigenvalues" in found) == within
        assert found["pairs"].tolist() == rows[pair].to_numpy().tolist()
        s = found["singular_values"]
        np.testing.assert_allclose(rows["first"], s[:, 0] ** 2 / (s**2).sum(1))
        assert found["carried"].shape == found["right"].shape == (5, 3 if kind == "v" else 4 if kind == "q" else 3, WIDTH)
    assert read_record(composed.record).stage == "composition"


def test_norms_are_folded_in_and_positions_averaged_over_where_they_are_known(tmp_path, extracted):
    """Gains before every layer, positions that turn the first and the last."""
    generator = torch.Generator().manual_seed(1)
    gains = {layer: torch.rand(WIDTH, generator=generator, dtype=torch.float64) + 0.5 for layer in LAYERS}
    waves = Rotary(torch.tensor([1.0, 2.0], dtype=torch.float64) * 2 * torch.pi / 8, interleaved=False, start=1)
    frames = {
        layer: Frame(norm=norm, source_norm=norm, rotary=None if layer == 2 else waves)
        for layer, norm in ((layer, Norm(centred=layer == 2, gain=gains[layer])) for layer in LAYERS)
    }
    known = {"decoder": Frames(frames), "encoder": Frames({layer: Frame() for layer in LAYERS}, {"norm": "unproven"})}
    composed = measured(tmp_path / "results", extracted, known)
    table = read_table(composed.composition).to_pandas().query("stack == 'decoder'")
    assert table["folded"].all()
    w = {role: each.double() for role, each in extracted[1]["decoder"].items()}
    for i, layer in enumerate(LAYERS):
        for role in ("query", "key", "value"):
            w[role][i] *= gains[layer]
            w[role][i] -= w[role][i].mean(-1, keepdim=True) if layer == 2 else 0
    o = ov(w["value"], w["output"])
    for kind, rows in table.groupby("kind"):
        assert rows["averaged"].isna().all() == (kind == "v")
        for row in rows.sample(20, random_state=0).itertuples():
            a, b = (LAYERS.index(x) * HEADS + y for x, y in ((row.layer_a, row.head_a), (row.layer_b, row.head_b)))
            one, own = o.form(a), (o if kind == "v" else qk(w["query"], w["key"])).take([b])
            turns = [rotated(own, waves, offset).form(0) for offset in range(8 if kind != "v" and row.layer_b != 2 else 0)]
            for column, forms in (("score", [own.form(0)]), ("averaged", turns or [own.form(0)])):
                energy = np.mean([float((one.T @ g if kind == "k" else g @ one).square().sum()) for g in forms])
                norms = np.mean([float(g.square().sum()) for g in forms]) * float(one.square().sum())
                if column == "score" or kind != "v":
                    assert getattr(row, column) == pytest.approx(np.sqrt(energy / norms), rel=1e-5)
    others = read_table(composed.composition).to_pandas().query("stack != 'decoder'")
    assert not others["folded"].any()


def test_heads_may_have_more_rows_than_the_stream_has_channels(tmp_path):
    """Also where positions turn them: the mean over offsets then has a form of another rank."""
    generator, files, keys, weights = torch.Generator().manual_seed(2), {}, {}, {}
    for circuit, roles in (("qk", ("query", "key")), ("ov", ("output", "value"))):
        path, extract = tmp_path / f"{circuit}.pt", Recipe("extract", "{}", circuit, "c")
        weights |= {role: torch.randn(2, 2, 10, 6, generator=generator) for role in roles}
        write_factors(path, [0, 1], {role: weights[role] for role in roles})
        seal(record_of(path), Provenance(extract, "m", "self", circuit), [path])
        files[circuit], keys[circuit] = [path], extract.key
    waves = Rotary(torch.tensor([1.0, 2.0], dtype=torch.float64) * 2 * torch.pi / 8, interleaved=False)
    known = {"self": Frames({layer: Frame(rotary=waves) for layer in range(2)})}
    provenance = Provenance(Recipe("composition", "{}", "f", "c", tuple(keys.values())), "m", None)
    composed = measured(tmp_path, ({"self": files}, weights, provenance), known)
    table = read_table(composed.composition).to_pandas().query("kind == 'k'")
    for row in table.itertuples():
        one = ov(weights["value"], weights["output"]).to(torch.float64).form(row.head_a)
        own = qk(weights["query"], weights["key"]).to(torch.float64).take([2 + row.head_b])
        turns = [rotated(own, waves, offset).form(0) for offset in range(8)]
        energy = np.mean([float((one.T @ g).square().sum()) for g in turns])
        norms = np.mean([float(g.square().sum()) for g in turns]) * float(one.square().sum())
        assert row.averaged == pytest.approx(np.sqrt(energy / norms), rel=1e-5)


def test_spans_of_all_roles_are_held_against_each_other(tmp_path, extracted, monkeypatch):
    for block in (2**30, 1):  # all layers at once, and one by one
        monkeypatch.setitem(BLOCK_BYTES, "cpu", block)
        composed = measured(tmp_path / str(block), extracted)
        table = read_table(composed.kernels).to_pandas()
        pairs = {stack: set(zip(rows["role_a"], rows["role_b"], strict=True)) for stack, rows in table.groupby("stack")}
        assert pairs["cross"] == {(role, role) for role in ("query", "key", "value", "output")} | {
            ("query", "output"),
            ("key", "value"),
        }
        assert len(pairs["decoder"]) == 10
        place = [f"{name}_{side}" for side in "ab" for name in ("role", "layer", "head")]
        assert not table.duplicated(["stack", *place]).any()
        spans = 3 * (HEADS + 2 + 2 + HEADS)
        assert len(table.query("stack == 'decoder'")) == spans * (spans - 1) // 2
        for row in table.query("stack == 'decoder'").sample(50, random_state=0).itertuples():
            bases = []
            for side in "ab":
                role, layer, head = (getattr(row, f"{name}_{side}") for name in ("role", "layer", "head"))
                factor = extracted[1]["decoder"][role][LAYERS.index(layer), head].double()
                bases.append(torch.linalg.qr(factor.T)[0])
            k_a, k_b = (base.shape[1] for base in bases)
            assert row.kernel == pytest.approx(float((bases[0].T @ bases[1]).square().sum()), rel=1e-5)
            assert row.expected == pytest.approx(k_a * k_b / WIDTH)


def test_a_single_layer_has_no_pairs(tmp_path, extracted):
    files, weights, provenance = extracted
    first = {circuit: paths[:1] for circuit, paths in files["decoder"].items()}
    composed = measured(tmp_path / "results", ({"decoder": first}, weights, provenance))
    assert [len(read_table(path)) for path in (composed.composition, composed.channels)] == [0, 0]
    assert len(read_table(composed.kernels)) == 12 * 11 // 2
