"""The tables of scores by offset and frequency, and of what biases add, against running models and forms held whole."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from extracted import Extracted, extracted, locked, tiny
from torch.nn.functional import normalize

from headgram.forms.transforms import constant
from headgram.proofs.around import without_epsilon
from headgram.proofs.prove import _calls, quiet
from headgram.results.record import Provenance, Recipe
from headgram.results.tables import AT_TIMES, LINEAR, TURNS, read_table
from headgram.stages.rotary import Turned, measure_rotary
from headgram.study.options import Config


def measured(found: Extracted) -> dict[str, pd.DataFrame]:
    """The three tables of a model's stacks."""
    stacks = [stack.name for stack in found.entry.stacks]
    key = found.weights("qk", stacks[0])[1]
    provenance = Provenance(Recipe("rotary", "{}", "f", "c", (key, found.around_key)), "m", None)
    names = ("rotary.parquet", "frequencies.parquet", "turning.parquet", "rotary.json")
    written = Turned(*(found.folder / "out" / name for name in names))
    measure_rotary(found.around, {stack: [found.weights("qk", stack)[0]] for stack in stacks}, written, Config(), provenance)
    return {path.stem: read_table(path).to_pandas() for path in (written.rotary, written.frequencies, written.turning)}


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "starcoder2", "gpt_neox", "cohere", "bert", "opt"])
def test_folded_forms_and_constants_are_the_models_queries_and_keys(tmp_path: Path, model_type: str) -> None:
    """With all biases, of projections and of norms, all tokens at one position."""
    model, entry = tiny(model_type, {}, biased=True)
    found = extracted(tmp_path, locked(model, tmp_path))
    model.double()
    without_epsilon(model)
    with quiet():
        calls = [call for call in _calls(model, entry) if call.block in call.outer]
    stored, made = found.form("qk"), found.form("qk-folded")
    for call in calls:
        frame = found.frames["self"].layers[call.layer]
        stream = call.outer[call.block].double().reshape(-1, call.x.shape[-1])
        if frame.norm is not None:
            stream = stream - stream.mean(-1, keepdim=True) if frame.norm.centred else stream
            stream = stream / stream.square().mean(-1, keepdim=True).sqrt()
        raw, heads = (source.read([call.layer]).to(torch.float64) for source in (stored, made))
        query, key = (heads.b @ stream.T).mT, (heads.a @ stream.T).mT
        for role, side, factors, bias in (("query", query, raw.b, frame.query_bias), ("key", key, raw.a, frame.key_bias)):
            if (added := constant(role, factors, bias, frame)) is not None:
                side.add_(added[:, None])
        ours = normalize(query, dim=-1) @ normalize(key[heads.reads_a], dim=-1).mT
        theirs = normalize(call.query, dim=-1) @ normalize(call.key, dim=-1).mT
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    assert calls


def test_numbers_of_a_model_that_positions_turn(tmp_path: Path) -> None:
    model, _ = tiny("qwen2", {"max_position_embeddings": 20}, biased=True)
    found = extracted(tmp_path, locked(model, tmp_path))
    tables = measured(found)
    frames = found.frames["self"]
    assert frames.context == 20
    assert sorted(set(tables["rotary"]["offset"])) == [-3, -2, -1, 0, 1, 2, 3, 4, 8, 16]
    for form in ("qk", "qk-folded"):
        turning = tables["turning"].query("circuit == @form").set_index(["layer", "head"])
        rows = tables["rotary"].query("circuit == @form").set_index(["layer", "head", "offset"])
        planes = tables["frequencies"].query("circuit == @form")
        assert not turning.isna().any().any()
        assert planes.groupby(["layer", "head"])["share"].sum().to_numpy() == pytest.approx(1)
        for offset in (-3, 1, 16):
            heads = found.form(f"{form}@{offset}").read([1]).to(torch.float64)
            home = found.form(form).read([1]).to(torch.float64)
            for head in range(len(heads)):
                x, y = heads.form(head), home.form(head)
                assert rows.loc[(1, head, offset), "norm"] == pytest.approx(float(x.norm()), rel=1e-5)
                assert rows.loc[(1, head, offset), "cosine"] == pytest.approx(
                    float((x * y).sum() / x.norm() / y.norm()), abs=1e-5
                )
        # What biases add, averaged over more offsets than the slowest plane takes for a turn.
        frame, raw = frames.layers[1], found.form("qk").read([1]).to(torch.float64)
        home = found.form(form).read([1]).to(torch.float64)
        assert frame.rotary is not None
        query, key = frame.query_bias, frame.key_bias
        if form == "qk-folded":
            query, key = constant("query", raw.b, query, frame), constant("key", raw.a, key, frame)
        offsets = range(0, 40_000, 7)
        turned = torch.stack([frame.rotary.turned(home.right(), offset) for offset in offsets])
        size = turning.loc[1]["rotary_norm"].to_numpy()
        of_queries = (key[home.reads_a][:, None] @ turned).square().sum((-1, -2)).mean(0).sqrt()
        turned = torch.stack([frame.rotary.turned(query[..., None], offset) for offset in offsets])
        of_keys = (home.left().mT @ turned).square().sum((-1, -2)).mean(0).sqrt()
        for name, truth in zip(LINEAR, (of_queries, of_keys), strict=True):
            assert turning.loc[1][name].to_numpy() == pytest.approx(truth.numpy() / size, rel=0.02)


def test_without_rotary_encoding_rows_are_absent_and_columns_empty(tmp_path: Path) -> None:
    model, _ = tiny("gpt2", {}, biased=True)
    tables = measured(extracted(tmp_path, locked(model, tmp_path)))
    assert tables["rotary"].empty
    assert tables["frequencies"].empty
    assert tables["turning"][[name for name in AT_TIMES if name not in LINEAR]].isna().all().all()
    assert (tables["turning"][list(LINEAR)] > 0).all().all()


def test_without_biases_and_where_folding_is_not_proven(tmp_path: Path) -> None:
    model, _ = tiny("bart", {}, biased=True)
    tables = measured(extracted(tmp_path, locked(model, tmp_path)))
    places = set(tables["turning"][["circuit", "stack"]].itertuples(index=False, name=None))
    assert places == {(form, stack) for form in ("qk", "qk-folded") for stack in ("encoder", "decoder", "cross")}
    (tmp_path / "zamba2").mkdir()
    model, _ = tiny("zamba2", {})
    tables = measured(extracted(tmp_path / "zamba2", locked(model, tmp_path / "zamba2")))
    assert set(tables["turning"]["circuit"]) == {"qk"}
    (tmp_path / "phi").mkdir()
    model, _ = tiny("phi", {"qk_layernorm": True}, biased=True)  # biases of norms of queries and keys, after a division
    tables = measured(extracted(tmp_path / "phi", locked(model, tmp_path / "phi")))
    assert tables["turning"][list(LINEAR)].isna().all().all()
    (tmp_path / "llama").mkdir()
    model, _ = tiny("llama", {})
    tables = measured(extracted(tmp_path / "llama", locked(model, tmp_path / "llama")))
    assert tables["turning"][list(LINEAR)].isna().all().all()
    assert not tables["turning"][list(TURNS)].isna().any().any()


def test_layers_that_do_not_turn_have_no_rows(tmp_path: Path) -> None:
    model, _ = tiny("cohere2", {})
    found = extracted(tmp_path, locked(model, tmp_path))
    tables = measured(found)
    turned = {layer for layer, frame in found.frames["self"].layers.items() if frame.rotary is not None}
    assert turned < set(tables["turning"]["layer"])
    assert set(tables["rotary"]["layer"]) == set(tables["frequencies"]["layer"]) == turned
    empty = tables["turning"][~tables["turning"]["layer"].isin(turned)]
    assert empty[list(AT_TIMES)].isna().all().all()


def test_rows_that_no_rotation_touches_are_a_last_row(tmp_path: Path) -> None:
    model, _ = tiny("gpt_neox", {})
    found = extracted(tmp_path, locked(model, tmp_path))
    rows = measured(found)["frequencies"]
    still = rows[rows["plane"].isna()]
    assert len(still) == rows.groupby(["circuit", "layer", "head"]).ngroups
    assert still[["wavelength", "cosine_norm", "sine_norm"]].isna().all().all()
    assert rows.groupby(["circuit", "layer", "head"])["share"].sum().to_numpy() == pytest.approx(1)
