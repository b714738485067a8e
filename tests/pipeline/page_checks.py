"""What each picture of the page draws, against the tables."""

import re

import numpy as np
import pandas as pd
import pytest

#: The page rounds to 13 bits of mantissa.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def table(project, name: str, model: str, stack: str) -> pd.DataFrame:
    path = project.folder / "results" / "atlas" / name / f"model={model}" / f"{name}.parquet"
    frame = pd.read_parquet(path.open("rb"))
    return frame[(frame["circuit"] + "/" + frame["stack"]) == stack]


def check_strip(page, project, model, stack, column, **_):
    heads = table(project, "heads", model, stack).set_index(["layer", "head"])[column].sort_index()
    drawn = pd.DataFrame(page.rows("strip", "cells")).set_index(["layer", "head"])["value"].sort_index()
    assert list(drawn.index) == list(heads.index)
    np.testing.assert_allclose(drawn, heads, **CLOSE)


def check_squares(page, project, picture, values, head):
    """`values` is indexed by layer_a <= layer_b and head; the pictures show both triangles, of one head and of the mean."""
    for part, expected in (("head", values.xs(head, level="head")), ("mean", values.groupby(["layer_a", "layer_b"]).mean())):
        drawn = pd.DataFrame(page.rows(f"{picture}-{part}", "cells"))
        low, high = np.sort(drawn[["layer_a", "layer_b"]].to_numpy(), axis=1).T
        np.testing.assert_allclose(drawn["value"], expected.loc[list(zip(low, high, strict=True))], **CLOSE)
        assert len(drawn) == drawn["layer_a"].nunique() ** 2


def check_forms(page, project, model, stack, head, form, **_):
    gram = table(project, "gram", model, stack).set_index(["layer_a", "layer_b", "head"])
    product = {"cosine": "gram"}.get(form, form)
    square = {"cosine": "gram", "transposed": "gram"}.get(form, form)
    diagonal = gram.loc[[(a, b, h) for a, b, h in gram.index if a == b], square].droplevel("layer_b")
    norms = np.sqrt(diagonal.clip(lower=0))
    scale = [norms[a, h] * norms[b, h] for a, b, h in gram.index]
    check_squares(page, project, "form", gram[product] / scale, head)


def check_sides(page, project, model, stack, head, side, **_):
    overlap = table(project, "overlap", model, stack).set_index(["layer_a", "layer_b", "head"])
    check_squares(page, project, "side", overlap[side], head)


def check_spectra(page, project, model, stack, layer, head, **_):
    spectra = table(project, "spectra", model, stack).query("layer == @layer")
    rank = int(table(project, "heads", model, stack)["rank"].iloc[0])
    for picture, column in (("singular", "singular_value"), ("eigenvalues", "symmetric_eigenvalue")):
        rows = page.rows(picture, "others") + page.rows(picture, "chosen")
        assert {row["head"] for row in page.rows(picture, "chosen")} == {head}
        drawn = pd.DataFrame(rows).sort_values(["head", "index"])
        kept = spectra[spectra["index"] < rank] if picture == "singular" else spectra
        expected = kept.sort_values(["head", column], ascending=[True, False])
        assert drawn["head"].tolist() == expected["head"].tolist()
        np.testing.assert_allclose(drawn["value"], expected[column], **CLOSE)


def check_profile(page, project, stack, column, depth, compared, **_):
    drawn = pd.DataFrame(page.rows("profile", "profile"))
    assert set(drawn["model"]) == set(compared)
    for model, rows in drawn.groupby("model"):
        stacks = table_stacks(project, model)
        layers = table(project, "layers", model, stack if stack in stacks else stacks[0]).sort_values("layer")
        assert rows["layer"].tolist() == layers["layer"].tolist()
        for quartile in ("q25", "median", "q75"):
            np.testing.assert_allclose(rows[quartile], layers[f"{column}_{quartile}"], **CLOSE)
        place = layers["layer"] if depth == "layer" else np.linspace(0, 1, len(layers))
        np.testing.assert_allclose(rows["x"], place)


def table_stacks(project, model: str) -> list[str]:
    path = project.folder / "results" / "atlas" / "heads" / f"model={model}" / "heads.parquet"
    frame = pd.read_parquet(path.open("rb"))
    return list(dict.fromkeys(frame["circuit"] + "/" + frame["stack"]))


def check_tables(page, project, model, stack, layer, head, measure, **_):
    heads = table(project, "heads", model, stack).query("layer == @layer and head == @head").iloc[0]
    columns = page.page.evaluate("[...document.querySelector('#column').options].map(o => o.value)")
    shown = [float(line[1].replace("−", "-")) for line in page.table("values")]
    np.testing.assert_allclose(shown, heads[columns].astype(float), rtol=6e-3, atol=1e-12)
    nearest = table(project, "neighbours", model, stack).query("layer == @layer and head == @head and measure == @measure")
    nearest = nearest.sort_values("place")
    lines = page.table("neighbours")
    if nearest.empty:
        assert lines == [["None was measured."]]
        return
    names = [f"L{a} H{b}" for a, b in zip(nearest["other_layer"], nearest["other_head"], strict=True)]
    assert [line[0] for line in lines] == names
    np.testing.assert_allclose([float(line[1].replace("−", "-")) for line in lines], nearest["value"], rtol=6e-3, atol=1e-6)


def check_positions(page, project, model, stack, layer, head, turning, norms, offset, **_):
    """The card is there of heads that positions turn, whatever norms the rest of the page is about."""
    at, waves = (
        table(project, name, model, f"{'qk-folded' if norms == 'folded' else 'qk'}/{stack.split('/')[1]}")
        for name in ("rotary", "frequencies")
    )
    at, waves = at.query("layer == @layer"), waves.query("layer == @layer")
    assert page.page.is_hidden("#card-positions") == (at.empty or not stack.startswith("qk"))
    if page.page.is_hidden("#card-positions"):
        return
    waves = waves.dropna(subset="wavelength")
    for picture, rows, x, y in (("turns", at, "offset", turning), ("waves", waves, "wavelength", "share")):
        chosen, others = (pd.DataFrame(page.rows(picture, part)) for part in ("chosen", "others"))
        assert set(chosen["head"]) == {head}
        drawn, expected = pd.concat([chosen, others]).sort_values(["head", "x"]), rows.sort_values(["head", x])
        assert drawn["head"].tolist() == expected["head"].tolist()
        np.testing.assert_allclose(drawn["x"], expected[x], **CLOSE)
        np.testing.assert_allclose(drawn["value"], expected[y], **CLOSE)
        chance = pd.DataFrame(page.rows(picture, "expected"))
        assert len(chance) == (0 if picture == "turns" and turning != "cosine" else len(chosen))
        if len(chance):
            np.testing.assert_allclose(chance.sort_values("x")["value"], expected.query("head == @head")["expected"], **CLOSE)
    row = at.query("head == @head and offset == @offset").iloc[0]
    text = page.page.inner_text("#offset-values").replace("−", "-")
    for name in ("norm", "trace"):
        assert float(re.search(rf"{name} (\S+)", text)[1].rstrip(".,")) == pytest.approx(row[name], rel=1e-3)


def check_everything(page, project):
    state = page.state()
    compared = {state["model"], *state["with"]}
    for check in (check_strip, check_forms, check_sides, check_spectra, check_tables, check_positions):
        check(page, project, **state)
    check_profile(page, project, compared=compared, **state)
    assert page.rows("strip", "chosen") == [{"layer": state["layer"], "head": state["head"]}]
    for picture in ("form-head", "form-mean", "side-head", "side-mean"):
        assert page.rows(picture, "chosen") == [{"layer_a": state["layer"]}]
