"""The page with models at the edges: one layer or head, zeros, gaps, numbers of all sizes, names that differ at the end only."""

import dataclasses

import numpy as np
import pytest
from made_pages import stack, table_of

from browser import assert_legible, opened
from headgram.report.columns import columns
from headgram.report.pack import beside, model_pack
from headgram.report.page import index_pack, page, page_shell
from headgram.report.steps import steps_pack
from headgram.results.tables import HEADS, LAYERS

_PLACES = {column.name: i for i, column in enumerate(columns())}
_LONG = "a" * 190


def changed(each, **values):
    """Other values of some columns of `heads`, also in the summary."""
    heads, quartiles = each.heads.copy(), each.summary.quartiles.copy()
    for name, value in values.items():
        heads[_PLACES[name]] = value
        quartiles[:, _PLACES[name]] = np.quantile(heads[_PLACES[name]], [0.25, 0.5, 0.75], axis=-1)
    return dataclasses.replace(each, heads=heads, summary=dataclasses.replace(each.summary, quartiles=quartiles))


def zeros(each):
    found = changed(each, **dict.fromkeys(_PLACES, 0.0))
    pairs = {name: np.zeros_like(values) for name, values in each.pairs.items()}
    spectra = {"singular": np.zeros_like(each.singular), "eigenvalues": np.zeros_like(each.eigenvalues)}
    return dataclasses.replace(found, pairs=pairs, **spectra)


def speeds(each, expected):
    """With a mean by chance of the column `rotary_speed`, by layer."""
    found = each.expected.copy()
    found[_PLACES["rotary_speed"]] = expected
    return dataclasses.replace(each, expected=found)


MODELS = {
    "one": stack(1, 1, 1),
    "wide": stack(1, 200, 2),
    "tall": stack(200, 1, 2),
    "zeros": zeros(stack(4, 3, 8)),
    "gaps": changed(stack(3, 3, 8), rotary_speed=[[np.nan] * 3, [0.1, 0.2, 0.3], [np.nan] * 3], rotary_norm=np.nan),
    "sizes": changed(stack(2, 2, 2), fro_sq=[[1e-3, 1e9], [1e3, 1e5]], spectral_norm=[[1e-9, 2e-9], [3e-9, 1e-9]]),
    "expected": speeds(changed(stack(2, 3, 2), rotary_speed=[[0.1, 0.2, 0.3]] * 2), 2.0),
    "far": speeds(changed(stack(2, 3, 2), rotary_speed=[[1e-3, 1.0, 1e3]] * 2), 0.5),
    f"{_LONG}-1": stack(2, 2, 2, seed=1),
    f"{_LONG}-2": stack(2, 2, 2, seed=2),
}
PICTURES = ("strip", "form-head", "form-mean", "side-head", "side-mean", "singular", "eigenvalues", "profile")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("edges") / "index.html"
    index = index_pack({name: {"qk/self": each.summary} for name, each in MODELS.items()})
    found.write_text(page(page_shell(), index, {name: model_pack({"qk/self": each}) for name, each in MODELS.items()}))
    return found


@pytest.mark.parametrize("model", MODELS, ids=lambda name: name[-9:])
def test_labels_are_true_and_apart(chrome, path, model):
    with opened(chrome, path, f"#model={model}&with=&scale=symlog") as found:
        for column in ("symmetry", "fro_sq", "spectral_norm", "rotary_speed", "rotary_norm"):
            found.set(column=column)
            for picture in PICTURES if column == "symmetry" else ("strip", "profile"):
                assert_legible(found, picture)
        for picture in ("singular", "profile"):
            whole = next(labels for labels in found.labels(picture) if labels)  # of the axis below
            assert all(label["text"].isdigit() for label in whole)
        assert found.page.inner_text("#origin").startswith(model)
        assert found.complaints == []


def test_names_that_differ_at_their_ends_stay_apart(chrome, path):
    both = [f"{_LONG}-1", f"{_LONG}-2"]
    for size in ((390, 844), (1280, 900)):
        with opened(chrome, path, f"#model={both[0]}&with={both[1]}", size=size) as found:
            legend = {label["text"] for labels in found.labels("profile") for label in labels} - set("012")
            assert {name[-2:] for name in legend if name.startswith("aaa")} == {"-1", "-2"}
            assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(("model", "value"), [("expected", 2.0), ("far", 0.5)])
def test_a_mean_by_chance_is_marked_even_beyond_the_values(chrome, path, model, value):
    with opened(chrome, path, f"#model={model}&with=&column=rotary_speed") as found:
        assert "chance" in {label["text"] for labels in found.labels("strip") for label in labels}
        low, high = found.page.evaluate("headgram.view('strip').scale('color').domain()")
        assert low <= value <= high
        (chance,) = found.page.evaluate("headgram.view('profile').data('chance')")
        assert (chance["low"], chance["high"]) == (value, value)
        assert found.complaints == []


def test_bars_are_printed(chrome, path):
    with opened(chrome, path, "#model=zeros") as found:
        found.page.emulate_media(media="print")
        found.settle()
        style = "each => getComputedStyle(document.querySelector(each)).printColorAdjust"
        assert [found.page.evaluate(style, each) for each in (".bar", ".bar > span", "#matrix-scale")] == ["exact"] * 3


#: By name, in the order of the plan, the steps of lineages. JavaScript puts keys that look like numbers into an order of its own.
LINEAGES = {"410": [0.2, 0.5, 0.9], "70": [-300.0, -20.0, -1.0], "constructor": [5.0]}


@pytest.fixture(scope="module")
def lineages(tmp_path_factory):
    """A page of lineages with fractions and negative numbers as steps; in each, all heads have one symmetry of their own."""
    folder = tmp_path_factory.mktemp("lineages")
    (folder / "lineages").mkdir()
    drawn, models = {}, {}
    for i, (lineage, steps) in enumerate(LINEAGES.items()):
        names = [f"m{lineage}-{k}" for k in range(len(steps))]
        for name, step in zip(names, steps, strict=True):
            models[name] = {"qk/self": stack(2, 2, 8, facts={"lineage": lineage, "step": step, "labels": "[]"})}
        if len(names) > 1:
            drawn[lineage] = names
            place = {"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1]}
            heads = table_of(HEADS, {**place, "symmetry": np.full(4, (i + 1) / 4)}, folder / "heads.parquet")
            tables = {"heads": heads, "layers": table_of(LAYERS, {"layer": [0, 1]}, folder / "layers.parquet")}
            text = steps_pack(names, ["qk/self"], dict.fromkeys(names, tables), {})
            (folder / "lineages" / f"{i}.js").write_text(beside(f"lineages/{i}", text))
    index = index_pack({name: {"qk/self": each["qk/self"].summary} for name, each in models.items()}, {}, drawn)
    (folder / "index.html").write_text(page(page_shell(), index, {name: model_pack(each) for name, each in models.items()}))
    return folder / "index.html"


@pytest.mark.parametrize("along", ["step", "log", "order"])
@pytest.mark.parametrize(("lineage", "symmetry"), [("410", 0.25), ("70", 0.5)])
def test_every_lineage_is_drawn_at_its_steps(chrome, lineages, lineage, symmetry, along):
    with opened(chrome, lineages, f"#model=m{lineage}-0&column=symmetry&steps=heads&along={along}") as found:
        rows = found.rows("course", "chosen")
        assert [(row["step"], row["value"]) for row in rows] == [(step, symmetry) for step in LINEAGES[lineage]]
        texts = [label["text"] for label in found.labels("course")[0]]
        assert len(texts) > 1
        assert not any(text.endswith(("m", "µ")) for text in texts)  # `200m` is 0.2 to some and many millions to others
        places = found.page.evaluate("steps => steps.map(step => headgram.view('course').scale('x')(step))", LINEAGES[lineage])
        assert np.isfinite(places).all()
        if along != "order":
            assert places == sorted(places)
            assert places[0] < places[-1]
        assert_legible(found, "course")
        found.set(model="mconstructor-0")
        assert found.page.is_hidden("#card-steps")
        assert found.complaints == []
