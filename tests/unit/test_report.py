"""Packs, figures, and the page with what no pipeline run can give it: many models, large models, hostile names."""

import dataclasses
import itertools
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from made_pages import matrix_of, stack

from browser import opened
from headgram.report import pictures
from headgram.report.arrays import StackArrays
from headgram.report.columns import columns
from headgram.report.figures import profile_figures, stack_figures
from headgram.report.matrix import Feeding, read_across
from headgram.report.names import PROFILE_FIGURES, STACK_FIGURES
from headgram.report.pack import beside, layer_packs, model_pack, pack
from headgram.report.page import index_pack, page, page_shell
from headgram.report.tokens import read_tokens
from headgram.results.record import Provenance, Recipe
from headgram.results.tables import TOKENS, labelled, write_table
from packs import unpack

_NUMBERS = st.floats(-1e30, 1e30, allow_subnormal=False)


@given(st.lists(arrays.arrays(np.float64, arrays.array_shapes(max_dims=3), elements=_NUMBERS), max_size=4))
def test_a_pack_keeps_four_digits(values):
    packed = {f"array {i}": value for i, value in enumerate(values)}
    meta, found = unpack(pack({"Ü": [1, None]}, packed))
    assert meta == {"Ü": [1, None]}
    assert list(found) == list(packed)
    for name, value in packed.items():
        np.testing.assert_allclose(found[name], value, rtol=2.0**-14, atol=1e-37)


def test_whole_numbers_and_zeros_are_exact_and_huge_ones_stay_finite():
    _, found = unpack(pack(None, {"x": np.array([0.0, -1.0, 4095.0, 16384.0, 1e300, -np.inf])}))
    assert found["x"][:4].tolist() == [0, -1, 4095, 16384]
    assert np.isfinite(found["x"]).all()


def test_fifty_models_of_which_some_lie_beside_the_page(chrome, tmp_path):
    """Thirty as large as 7B models, of which the page holds as many as fit."""
    small, large = stack(12, 12, 64), stack(32, 32, 128)
    packs = {12: model_pack({"self": small}), 32: model_pack({"self": large})}
    models = {f"model-{i:02d}": large if i % 5 < 3 else small for i in range(50)}
    index = index_pack({name: {"self": each.summary} for name, each in models.items()})
    embedded = {name: packs[len(each.heads[0])] for name, each in list(models.items())[:20]}
    path = tmp_path / "index.html"
    path.write_text(page(page_shell(), index, embedded))
    assert path.stat().st_size < 30 * 2**20
    (tmp_path / "data").mkdir()
    for name, each in list(models.items())[20:49]:
        (tmp_path / "data" / f"{name}.js").write_text(beside(name, packs[len(each.heads[0])]))
    with opened(chrome, path, "#model=model-30", size=(1920, 1080)) as found:
        assert found.first_picture() < 3
        assert found.state()["model"] == "model-30"
        cells = found.rows("strip", "cells")
        np.testing.assert_allclose([cell["value"] for cell in cells], large.heads[0].ravel(), rtol=1e-4, atol=1e-7)
        found.page.click("#compare summary")
        for i in range(50):
            box = found.page.locator(f"#with input[value=model-{i:02d}]")
            if box.is_enabled() and not box.is_checked():
                box.check()
                found.settle()
        assert len({row["series"] for row in found.rows("profile", "profile")}) == 8
        found.select("model", "model-03")
        assert len(found.rows("strip", "cells")) == 144
        found.screenshot("fifty-models")
        assert found.complaints == []
        found.select("model", "model-49")
        assert "data/model-49.js" in found.page.inner_text("#status")
        found.select("model", "model-00")
        assert "error" not in found.page.get_attribute("#status", "class")
        assert len(found.rows("strip", "cells")) == 1024


@pytest.mark.parametrize(("layers", "heads"), [(4, 5), (9, 64)])
def test_the_matrix_of_all_heads(chrome, tmp_path, layers, heads):
    """Whole or, of many heads, the largest of neighbours; two layers alone are exact; a click chooses the pair."""
    matrix = matrix_of(layers, heads)
    each = dataclasses.replace(stack(layers, heads, 4), matrix=matrix)
    path = tmp_path / "index.html"
    path.write_text(page(page_shell(), index_pack({"m": {"qk/self": each.summary}}), {"m": model_pack({"qk/self": each})}))
    (tmp_path / "data" / "m").mkdir(parents=True)
    for name, text in layer_packs({"qk/self": each}).items():
        (tmp_path / "data" / "m" / f"{name}.js").write_text(beside(f"m/{name}", text))
    step = -(-layers * heads // 512)
    with opened(chrome, path) as found:
        for value, order in itertools.product(("cosine", "transposed"), ("layer", "cluster")):
            found.select("pairs", value)
            found.select("order", order)
            drawn = found.page.evaluate("headgram.matrix()")
            places = np.arange(layers * heads) if order == "layer" else matrix.order
            assert list(itertools.chain(*drawn["rows"])) == places.tolist()
            for i, j in [(0, 1), (3 // step, 17 // step), (len(drawn["rows"]) - 1, 0)]:
                block = matrix.values[value][np.ix_(drawn["rows"][i], drawn["columns"][j])].ravel()
                assert drawn["values"][i][j] == pytest.approx(block[np.abs(block).argmax()], rel=1e-3)
        found.set(pairs="cosine", order="layer", layer=0, head=3, other=f"{17 // heads}.{17 % heads}")
        assert "cosine −0.8" in found.page.inner_text("#pair")
        found.page.click("#zoom")
        found.settle()
        assert found.state()["zoom"] == f"0-{17 // heads}"
        np.testing.assert_allclose(
            found.page.evaluate("headgram.matrix().values"),
            matrix.layer(0)["cosine"][:, 17 // heads * heads :][:, :heads],
            rtol=1e-3,
            atol=1e-6,
        )
        box = found.page.locator("#matrix canvas").bounding_box()
        found.page.mouse.click(box["x"] + box["width"] * 1.5 / heads, box["y"] + box["height"] * 2.5 / heads)
        found.settle()
        assert (found.state()["head"], found.state()["other"]) == (2, f"{17 // heads}.1")
        found.page.click("#zoom")
        found.settle()
        assert found.state()["zoom"] == ""
        found.screenshot(f"matrix-{layers * heads}")
        assert found.complaints == []


@pytest.mark.parametrize(("layers", "heads"), [(4, 5), (9, 64)])
def test_which_heads_feed_which(chrome, tmp_path, layers, heads):
    """The matrix of compositions, and the strongest feeders and readers, as the numbers say; the same beside either circuit."""
    random, count = np.random.default_rng(0), layers * heads
    earlier = np.arange(count)[:, None] // heads < np.arange(count) // heads
    kinds = {kind: np.where(earlier, random.random((count, count)) + 0.5, 0).astype(np.float32) for kind in "qk"}
    kinds["k"][3, 2 * heads + 1] = 9
    each = dataclasses.replace(stack(layers, heads, 4), matrix=matrix_of(layers, heads), feeding=Feeding(kinds, heads))
    stacks = {"qk/self": each, "ov/self": dataclasses.replace(each, feeding=None)}
    index = index_pack({"m": {name: one.summary for name, one in stacks.items()}})
    path = tmp_path / "index.html"
    path.write_text(page(page_shell(), index, {"m": model_pack(stacks)}))
    (tmp_path / "data" / "m").mkdir(parents=True)
    for name, text in layer_packs(stacks).items():
        (tmp_path / "data" / "m" / f"{name}.js").write_text(beside(f"m/{name}", text))
    with opened(chrome, path) as found:
        for circuit, kind in itertools.product(("qk", "ov"), "qk"):
            found.set(stack=f"{circuit}/self", pairs=kind, kind=kind, layer=2, head=1, other="", zoom="")
            drawn = found.page.evaluate("headgram.matrix()")
            for i, j in itertools.product((0, len(drawn["rows"]) // 3), (len(drawn["rows"]) // 2, len(drawn["rows"]) - 1)):
                block = kinds[kind][np.ix_(drawn["rows"][i], drawn["columns"][j])]
                assert drawn["values"][i][j] == pytest.approx(block.max(), rel=1e-3)
            feeders = np.argsort(-kinds[kind][:, 2 * heads + 1], kind="stable")[:8]
            assert [line[0] for line in found.table("feeders")] == [f"L{place // heads} H{place % heads}" for place in feeders]
            readers = np.argsort(-kinds[kind][2 * heads + 1], kind="stable")[:8]
            assert [line[0] for line in found.table("readers")] == [
                f"L{place // heads} H{place % heads}" for place in readers if kinds[kind][2 * heads + 1, place]
            ]
            found.set(layer=0, head=3, other="2.1", zoom="0-2")
            np.testing.assert_allclose(
                found.page.evaluate("headgram.matrix().values"), kinds[kind][:heads, 2 * heads : 3 * heads], rtol=1e-3
            )
        assert "through keys 9 × chance" in found.page.inner_text("#pair")
        assert found.page.is_disabled("#pairs option[value=v]")
        found.screenshot(f"feeding-{count}")
        assert found.complaints == []


def numbered(stack: StackArrays, layers: np.ndarray) -> StackArrays:
    """The same with other numbers of its layers."""
    return dataclasses.replace(stack, summary=dataclasses.replace(stack.summary, layers=layers))


def test_heads_of_an_encoder_feed_cross_attention(chrome, tmp_path):
    """Both stacks list the other's heads, among their own; a choice of one leads to its stack."""
    random = np.random.default_rng(0)
    encoder, cross = (np.array([0, 2, 5]), 3), (np.array([1, 4]), 2)
    rows = [
        {"stack": "cross", "kind": kind, "writer": "encoder", "layer_a": a, "head_a": i, "layer_b": b, "head_b": j}
        for kind, a, i, b, j in itertools.product("kv", encoder[0], range(encoder[1]), cross[0], range(cross[1]))
    ]
    table = pd.DataFrame(rows).assign(times_chance=random.random(len(rows)).astype(np.float32) + 0.5)
    pq.write_table(pa.Table.from_pandas(table), tmp_path / "composition.parquet")
    shapes = {"encoder": encoder, "cross": cross}
    across = {name: read_across(tmp_path / "composition.parquet", name, shapes) for name in shapes}
    assert read_across(tmp_path / "composition.parquet", "decoder", shapes) is None
    own = {"k": np.triu(random.random((9, 9)), 3).astype(np.float32)}
    stacks = {
        "qk/encoder": dataclasses.replace(
            numbered(stack(3, 3, 4), encoder[0]), feeding=Feeding(own, 3), across=across["encoder"]
        ),
        "qk/cross": dataclasses.replace(numbered(stack(2, 2, 4), cross[0]), across=across["cross"]),
    }
    path = tmp_path / "index.html"
    index = index_pack({"m": {name: one.summary for name, one in stacks.items()}})
    path.write_text(page(page_shell(), index, {"m": model_pack(stacks)}))
    with opened(chrome, path) as found:
        for kind in "kv":
            found.set(stack="qk/cross", kind=kind, layer=4, head=1)
            feeders = table.query("kind == @kind and layer_b == 4 and head_b == 1").sort_values("times_chance", ascending=False)
            expected = [f"encoder, L{row.layer_a} H{row.head_a}" for row in feeders.head(8).itertuples()]
            assert [line[0] for line in found.table("feeders")] == expected
            assert [line[0] for line in found.table("readers")] == ["None."]
            found.set(stack="qk/encoder", layer=2, head=1)
            readers = table.query("kind == @kind and layer_a == 2 and head_a == 1")
            expected = {f"cross, L{row.layer_b} H{row.head_b}": row.times_chance for row in readers.itertuples()}
            if kind == "k":
                expected |= {f"L5 H{head}": own["k"][4, 6 + head] for head in range(3) if own["k"][4, 6 + head]}
            assert [line[0] for line in found.table("readers")] == sorted(expected, key=lambda name: -expected[name])[:8]
        found.set(kind="k", stack="qk/cross", layer=1, head=0)
        found.page.click("#feeders button")
        found.settle()
        assert found.state()["stack"] == "qk/encoder"
        found.screenshot("across")
        assert found.complaints == []


def test_the_tokens_of_the_chosen_head(chrome, tmp_path):
    """As the table has them, in either circuit; a text of a stranger neither hides nor turns round what follows."""
    layers, heads, count = np.array([0, 2, 5]), 2, 4
    rows = list(itertools.product(layers, range(heads), ("left", "right"), range(4), (1, -1), range(count)))
    table = pd.DataFrame(rows, columns=["layer", "head", "side", "direction", "sign", "place"])
    table["token"] = np.arange(len(table)) * 11  # more than a page's numbers hold digits of
    table["text"] = [f"t{token}" if token % 3 else "" for token in table["token"]]
    table.loc[0, "text"] = " a\u202eb\n<b>"
    random = np.random.default_rng(0)
    for name in ("value", "deviations", "share"):
        table[name] = random.random(len(table))
    table = table.assign(chance=4.25, folded=True)
    both = pa.concat_tables(
        labelled(
            pa.Table.from_pandas(table[table["side"] != left_out], preserve_index=False), TOKENS, circuit=circuit, stack="self"
        )
        for circuit, left_out in (("qk", ""), ("ov", "left"))
    )
    write_table(tmp_path / "tokens.parquet", [both], Provenance(Recipe("tokens", "{}", "f", "c"), "m", None))
    each = stack(len(layers), heads, 4)
    each = dataclasses.replace(each, summary=dataclasses.replace(each.summary, layers=layers))
    found = {name: read_tokens(tmp_path / "tokens.parquet", (name, "self"), layers, heads) for name in ("qk", "ov", "qk-folded")}
    assert found["qk-folded"] is None
    stacks = {f"{name}/self": dataclasses.replace(each, tokens=tokens) for name, tokens in found.items()}
    path = tmp_path / "index.html"
    index = index_pack({"m": {name: one.summary for name, one in stacks.items()}})
    path.write_text(page(page_shell(), index, {"m": model_pack(stacks)}))
    named = table.assign(text=table["text"].where(table["text"] != "", "#" + table["token"].astype(str)))
    with opened(chrome, path) as shown:
        for circuit, layer, head in itertools.product(("qk", "ov"), layers, range(heads)):
            shown.set(stack=f"{circuit}/self", layer=int(layer), head=head)
            sides = {"qk": {"right": "Looks with", "left": "Looks for"}, "ov": {"right": "Reads"}}[circuit]
            lines = shown.table("tokens")
            assert [line[0] for line in lines] == [f"{side} {i + 1}" for side in sides.values() for i in range(3)]
            of_head = named[(named["layer"] == layer) & (named["head"] == head)].set_index(["side", "direction", "sign"])
            for line, (side, direction) in zip(lines, itertools.product(sides, range(3)), strict=True):
                for cell, sign in ((1, 1), (3, -1)):
                    expected = of_head.loc[(side, direction, sign)]
                    if " a" not in expected["text"].iloc[0]:
                        assert line[cell].split() == list(expected["text"])
                    assert float(line[cell + 1]) == pytest.approx(expected["deviations"].iloc[0], rel=1e-3)
        shown.set(stack="qk/self", layer=0, head=0)
        assert "␣a\\u202eb\\u000a<b>" in shown.page.inner_text("#tokens")
        assert "± 4.25 by chance" in shown.page.inner_text("#tokens-note")
        shown.screenshot("tokens")
        shown.set(stack="qk-folded/self")
        assert shown.page.is_hidden("#tokens")
        assert shown.complaints == []


def test_what_a_checkpoint_says_is_text_and_nothing_else(chrome, tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>{{app}}"
    each = stack(3, 2, 4, facts={"architecture": hostile})
    path = tmp_path / "index.html"
    path.write_text(page(page_shell(), index_pack({"a.b-c_d": {"self": each.summary}}), {"a.b-c_d": model_pack({"self": each})}))
    with opened(chrome, path) as found:
        assert hostile in found.page.inner_text("#facts")
        assert found.page.locator("img").count() == 0
        assert found.complaints == []
    assert "</script>" not in beside(hostile, "text")


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (1, 16), (2, 1)])
def test_the_smallest_stacks_have_a_page_and_figures(chrome, tmp_path, layers, heads):
    each = dataclasses.replace(stack(layers, heads, 1), neighbours={})
    each = dataclasses.replace(each, heads=np.zeros_like(each.heads), singular=np.zeros_like(each.singular))
    path = tmp_path / "index.html"
    path.write_text(page(page_shell(), index_pack({"m": {"self": each.summary}}), {"m": model_pack({"self": each})}))
    with opened(chrome, path) as found:
        for name in (column.name for column in columns()):
            found.select("column", name)
        found.select("scale", "symlog")
        found.select("depth", "relative")
        assert len(found.rows("form-head", "cells")) == layers**2
        assert found.complaints == []
    assert list(stack_figures("m", "qk/self", each)) == list(STACK_FIGURES)


def test_figures_are_pictures_of_their_own():
    models = {f"m{i}": stack(4, 3, 8, seed=i) for i in range(9)}
    drawn = stack_figures("m0", "qk/cross", models["m0"]) | profile_figures({name: each.summary for name, each in models.items()})
    assert list(drawn) == [*STACK_FIGURES, *PROFILE_FIGURES]
    for text in drawn.values():
        assert text.startswith("<svg")
        assert "http://" not in text.replace("http://www.w3.org/", "")
    assert all(">chance<" in drawn[name] for name in [*STACK_FIGURES, "symmetry_score"])
    assert "Cosine of layer pairs, mean over heads: m0, cross" in drawn["cosine"]
    assert "m7" in drawn["stable_rank"]
    assert "m8" not in drawn["stable_rank"]
    assert drawn == stack_figures("m0", "qk/cross", models["m0"]) | profile_figures(
        {name: each.summary for name, each in models.items()}
    )


def test_a_picture_is_compiled_once_and_figures_leave_it_as_it_is(monkeypatch):
    drawn = stack_figures("m", "qk/self", stack(2, 3, 4))
    monkeypatch.delattr(pictures.vl_convert, "vegalite_to_vega")
    other = stack_figures("another", "ov/self", stack(5, 1, 4, seed=1))
    assert all(drawn[name] != other[name] for name in STACK_FIGURES)
    assert drawn == stack_figures("m", "qk/self", stack(2, 3, 4))


def test_the_data_of_a_page_are_inert():
    text = page(page_shell(), index_pack({}), {})
    specs = text.split('<script type="application/json" id="pictures">')[1].split("</script>")[0]
    assert set(json.loads(specs)) == {"cells", "square", "spectrum", "profile", "steps"}
