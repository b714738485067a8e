"""The page of a training: a number over its steps, and the filter of hundreds of models."""

import numpy as np
import pytest
from made_pages import place_of, stack, table_of

from browser import opened
from headgram.report.columns import columns
from headgram.report.pack import beside, model_pack
from headgram.report.page import index_pack, page, page_shell
from headgram.report.steps import steps_pack
from headgram.results.tables import DRIFT, HEADS, LAYERS
from packs import unpack

STEPS = [0, *(2**i for i in range(9)), *(1000 * i for i in range(1, 146))]


ROTATING = (1, 2)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """The page of a training of 155 checkpoints, of which one head of two layers of four turns by degrees; and an alien."""
    folder = tmp_path_factory.mktemp("training")
    names = [f"step{step}" for step in STEPS]
    layer, head = np.repeat(np.arange(2), 4), np.tile(np.arange(4), 2)
    turns = (layer == ROTATING[0]) & (head == ROTATING[1])
    tables, drift = {}, {}
    for i, name in enumerate(names):
        place = {"layer": layer, "head": head}
        heads = table_of(HEADS, place | {"symmetry": np.where(turns, i / 200, 0.5)}, folder / name / "heads.parquet")
        layers = table_of(LAYERS, {"layer": np.arange(2), "cosine_next": np.full(2, i / 300)}, folder / name / "layers.parquet")
        tables[name] = {"heads": heads, "layers": layers}
        if i:
            moved = np.where(turns, np.cos(i / 100), 0.99)
            drift[name, names[0]] = table_of(DRIFT, place | {"cosine": moved}, folder / name / "drift.parquet")
    text = steps_pack(names, ["qk/self"], tables, drift)
    arrays = unpack(text)[1]
    assert arrays["qk/self/heads"].shape == (155, len(columns()), 2, 4)
    assert np.isnan(arrays["qk/self/previous"][2:]).all()
    assert np.isnan(arrays["qk/self/first"][0]).all()
    facts = {
        name: {"lineage": "training", "step": float(step), "labels": '[["data", "pile"]]'}
        for name, step in zip(names, STEPS, strict=True)
    }
    facts["alien"] = {"lineage": "", "labels": "[]"}
    mixed = [*np.random.default_rng(0).permutation(names).tolist(), "alien"]
    models = {name: {"qk/self": stack(2, 4, 8, seed, facts[name])} for seed, name in enumerate(mixed)}
    index = index_pack({name: {"qk/self": each["qk/self"].summary} for name, each in models.items()}, {}, {"training": names})
    path = folder / "index.html"
    path.write_text(page(page_shell(), index, {name: model_pack(each) for name, each in models.items()}))
    (folder / "lineages").mkdir()
    (folder / "lineages" / "0.js").write_text(beside("lineages/0", text))
    return path


@pytest.mark.parametrize("size", [(390, 844), (1280, 900)], ids=lambda size: size[0])
def test_a_training_is_drawn_over_its_steps(chrome, training, size):
    with opened(chrome, training, "#model=step64&layer=1&head=2&column=symmetry&along=log", size=size) as found:
        assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        rows = found.rows("course", "chosen")
        assert [row["step"] for row in rows] == STEPS
        np.testing.assert_allclose([row["value"] for row in rows], np.arange(155) / 200, rtol=2e-4, atol=1e-6)
        assert {(row["head"], row["value"]) for row in found.rows("course", "others")} == {(head, 0.5) for head in (0, 1, 3)}
        found.screenshot(f"steps-{size[0]}")
        (chance,) = found.page.evaluate("headgram.view('course').data('chance')")
        assert chance["low"] < 0.5 + 1 / 64 < chance["high"]  # the width is 32
        found.select("steps", "first")
        assert found.page.evaluate("headgram.view('course').data('chance')") == []
        rows = found.rows("course", "chosen")
        assert [row["step"] for row in rows] == STEPS[1:]
        np.testing.assert_allclose([row["value"] for row in rows], np.cos(np.arange(1, 155) / 100), rtol=2e-4, atol=2e-4)
        found.select("steps", "cosine_next")
        np.testing.assert_allclose(
            [row["value"] for row in found.rows("course", "chosen")], np.arange(155) / 300, rtol=2e-4, atol=1e-6
        )
        found.select("steps", "median")
        assert {row["layer"] for row in found.rows("course", "others")} == {0}
        found.select("steps", "previous")
        assert [row["step"] for row in found.rows("course", "chosen")] == [1]  # whose predecessor is the first
        assert found.page.inner_text("#steps-note").startswith("1 of 154 models were compared so: the option lineage.pairs")
        found.select("steps", "heads")
        found.select("along", "order")
        assert [row["x"] for row in found.rows("course", "chosen")] == list(range(155))
        found.page.mouse.click(*place_of(found, "course", line=2, x=60))
        found.settle()
        assert (found.state()["model"], found.state()["head"]) == (f"step{STEPS[60]}", 2)
        assert found.rows("course", "now") == [{"x": 60}]
        found.set(model="alien")
        assert found.page.is_hidden("#card-steps")
        assert found.complaints == []


def test_hundreds_of_models_are_filtered_in_natural_order(chrome, training):
    with opened(chrome, training, "#model=step0") as found:
        shown = "[...document.querySelectorAll('#model option')].map(option => option.value)"
        assert found.page.evaluate(shown) == ["alien", *(f"step{step}" for step in STEPS)]
        found.page.fill("#filter", "pile step14")
        assert found.page.evaluate(shown) == ["step0", *(f"step{step}" for step in STEPS if str(step).startswith("14"))]
        found.page.click("#compare summary")
        drawn = found.state()["with"]
        boxes = "[...document.querySelectorAll('#with label:not([hidden]) input:not(:checked)')].map(box => box.value)"
        others = [f"step{step}" for step in STEPS if str(step).startswith("14") and f"step{step}" not in drawn]
        assert found.page.evaluate(boxes) == others
