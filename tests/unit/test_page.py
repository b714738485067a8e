"""The page under a finger, from the keyboard, on paper and at three sizes, with models of noise alone."""

import csv
import dataclasses
import io
import math
import struct

import numpy as np
import pytest
from made_pages import place_of, stack

from browser import SCREENSHOTS, assert_legible, opened
from headgram.report.chance import nulls
from headgram.report.columns import columns
from headgram.report.matrix import Feeding, PairMatrix
from headgram.report.pack import model_pack
from headgram.report.page import index_pack, page, page_shell
from headgram.report.positions import Positions
from headgram.version import __version__

NAMES = [
    "a-rather-long-name-of-a-model-from-somewhere-1",
    "a-rather-long-name-of-a-model-from-somewhere-2",
    *map("m{}".format, range(9)),
]


ORIGIN = {
    "source": "org/model",
    "revision": "main",
    "commit": "0123456789abcdef",
    "twin": "7",
    "measured": "2026-11-26",
    "version": "0.9.9",
}


def noise(layers: int, heads: int, seed: int):
    """A stack whose numbers are what chance gives."""
    random = np.random.default_rng(seed)
    made = stack(layers, heads, 8, seed)
    null = nulls(made.summary.facts)
    size = (layers * (layers + 1) // 2, heads)
    pairs = {name: null[name].mean + null[name].deviation * random.standard_normal(size) for name in made.pairs}
    values = made.heads.copy()
    values[0] = null["symmetry"].mean + null["symmetry"].deviation * random.standard_normal(values[0].shape)
    square = random.standard_normal((layers * heads,) * 2).astype(np.float32)
    cosine = (square + square.T) / math.sqrt(2) * null["cosine"].deviation
    matrix = PairMatrix(dict.fromkeys(("cosine", "transposed"), cosine), np.arange(layers * heads), heads)
    earlier = np.arange(layers * heads)[:, None] // heads < np.arange(layers * heads) // heads
    feeding = Feeding({kind: np.where(earlier, 1 + square / 20, 0).astype(np.float32) for kind in "qkv"}, heads)
    summary = dataclasses.replace(made.summary, quartiles=np.quantile(values, [0.25, 0.5, 0.75], axis=-1))
    expected = made.expected.copy()
    expected[[column.name for column in columns()].index("rotary_speed")] = 0.24
    return dataclasses.replace(
        made,
        summary=summary,
        pairs=pairs,
        heads=values,
        singular=made.singular * 3e-4,
        matrix=matrix,
        expected=expected,
        feeding=feeding,
        positions={norm: waves(layers, heads, random) for norm in ("raw", "folded")},
    )


def waves(layers: int, heads: int, random: np.random.Generator) -> Positions:
    """Forms of random energies in eight planes, and in rows that no rotation touches; the last layer does not turn."""
    offsets = np.array([-3, -2, -1, 0, 1, 2, 3, *(2**power for power in range(2, 14))])
    lengths = 2 * np.pi * 10_000 ** (np.arange(8) / 8)
    share = random.dirichlet(np.ones(9), (layers, heads))
    cosine = np.einsum("lhp,op->lho", share[..., :8], np.cos(2 * np.pi * offsets[:, None] / lengths)) + share[..., 8:]
    at = np.stack([cosine, 3 + cosine, cosine / 2, (1 + cosine) / 2, 10 * cosine])
    expected = np.broadcast_to(np.cos(2 * np.pi * offsets[:, None] / lengths).mean(1), (layers, len(offsets))).copy()
    planes = np.broadcast_to(np.append(lengths, np.nan), (layers, 9)).copy()
    for values in (at[:, -1], expected[-1], planes[-1], share[-1]):
        values[...] = np.nan
    return Positions(offsets, at, expected, planes, share, np.full((layers, 9), 1 / 9))


#: What the matrix of all heads is drawn as.
_PIXELS = """() => {
    const canvas = document.querySelector("#matrix canvas");
    return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
}"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    models = {name: {"qk/self": noise(12, 8, seed)} for seed, name in enumerate(NAMES)}
    index = index_pack({name: {"qk/self": each["qk/self"].summary} for name, each in models.items()}, {NAMES[0]: ORIGIN})
    found = tmp_path_factory.mktemp("page") / "index.html"
    found.write_text(page(page_shell(), index, {name: model_pack(each) for name, each in models.items()}))
    return found


@pytest.mark.parametrize("size", [(390, 844), (1280, 900), (1920, 1080)], ids=lambda size: size[0])
def test_three_sizes(chrome, path, size):
    with opened(chrome, path, "#scale=symlog", size=size) as found:
        assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for picture in (
            "strip",
            "form-head",
            "form-mean",
            "side-head",
            "side-mean",
            "singular",
            "eigenvalues",
            "turns",
            "waves",
            "profile",
        ):
            assert_legible(found, picture)
        assert all(button.is_visible() for button in found.page.locator(".card:not([hidden]) .saves button").all())
        found.screenshot(f"noise-{size[0]}")
        assert found.complaints == []


def test_a_tap_selects(chrome, path):
    with opened(chrome, path, size=(390, 844), touch=True) as found:
        for layer, head in ((3, 2), (7, 5), (1, 0)):
            found.page.touchscreen.tap(*place_of(found, "strip", layer=layer, head=head))
            found.settle()
            assert (found.state()["layer"], found.state()["head"]) == (layer, head)
            assert found.page.inner_text("#tip").startswith(f"Layer {layer}, head {head}")
        found.page.touchscreen.tap(*place_of(found, "form-mean", layer_a=4, layer_b=9))
        found.settle()
        assert found.state()["layer"] == 4
        lowest = min(found.rows("profile", "profile"), key=lambda row: row["median"])
        found.page.touchscreen.tap(*place_of(found, "profile", model=lowest["model"], layer=lowest["layer"]))
        found.settle()
        assert (found.state()["model"], found.state()["layer"]) == (lowest["model"], lowest["layer"])
        assert found.complaints == []


def test_a_line_is_hit_from_beside_it(chrome, path):
    with opened(chrome, path) as found:
        (chosen,) = (row for row in found.rows("singular", "chosen") if row["index"] == 0)
        rows = [row for row in found.rows("singular", "others") if row["index"] == 0]
        # Where the chosen line is not beside it.
        side = max if max(row["value"] for row in rows) > chosen["value"] * 1.05 else min
        outermost = side(rows, key=lambda row: row["value"])
        x, y = place_of(found, "singular", index=0, head=outermost["head"])
        found.page.mouse.click(x + 1, y - 6 if side is max else y + 6)
        found.settle()
        assert found.state()["head"] == outermost["head"]
        _, top = place_of(found, "singular", index=0, head=max(rows, key=lambda row: row["value"])["head"])
        found.page.mouse.click(x + 200, top)  # nothing is near
        found.settle()
        assert found.state()["head"] == outermost["head"]


def test_back_undoes_and_the_keyboard_is_enough(chrome, path):
    with opened(chrome, path) as found:
        start = found.state()
        found.page.focus("#strip")
        for key in ("ArrowDown", "ArrowRight"):
            found.page.keyboard.press(key)
            found.settle()
        assert (found.state()["layer"], found.state()["head"]) == (1, 1)
        found.select("column", "trace")
        for layer, head, column in ((1, 1, start["column"]), (1, 0, start["column"]), (0, 0, start["column"])):
            found.page.go_back()
            found.page.wait_for_function(f"headgram.state.layer === {layer} && headgram.state.head === {head}")
            found.settle()
            assert found.state()["column"] == column
        assert found.state() == start
        found.page.go_forward()
        found.page.wait_for_function("headgram.state.layer === 1")
        assert found.complaints == []


@pytest.mark.parametrize("picture", ["strip", "form-mean", "singular", "profile"])
def test_pictures_are_saved_with_what_they_show(chrome, path, picture):
    with opened(chrome, path) as found:
        saved = {}
        for format in ("SVG", "PNG", "CSV"):
            with found.page.expect_download() as download:
                found.page.click(f"#{picture} + .saves button:text-is('{format}')")
            assert download.value.suggested_filename == f"{NAMES[0]}-qk-self-{picture}.{format.lower()}"
            saved[format] = download.value.path().read_bytes()
        title = found.page.get_attribute(f"#{picture}", "aria-label")
        text = saved["SVG"].decode()
        assert (
            found.page.evaluate(
                "text => new DOMParser().parseFromString(text, 'image/svg+xml').querySelector('parsererror')", text
            )
            is None
        )
        assert f"<title>{title}</title>" in text
        assert NAMES[0] in text
        assert "org/model" in text
        assert "headgram 0.9.9" in text
        assert saved["PNG"].startswith(b"\x89PNG")
        width, height = struct.unpack(">II", saved["PNG"][16:24])
        assert width > 400
        assert height > 300
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        (SCREENSHOTS / f"saved-{picture}.png").write_bytes(saved["PNG"])
        rows = list(csv.DictReader(io.StringIO(saved["CSV"].decode())))
        assert {row["picture"] for row in rows} == {title}
        assert "headgram 0.9.9" in rows[0]["origin"]
        drawn = [
            row
            for part in {
                "strip": ["cells"],
                "form-mean": ["cells"],
                "singular": ["others", "chosen"],
                "profile": ["profile"],
            }[picture]
            for row in found.rows(picture, part)
        ]
        value = "median" if picture == "profile" else "value"
        np.testing.assert_allclose([float(row[value]) for row in rows], [row[value] for row in drawn], rtol=1e-5)
        assert found.complaints == []


def test_noise_looks_like_noise(chrome, path):
    """Of what chance gives, nearly all is drawn in the middle half of the colours, and the bar says where chance ends."""
    with opened(chrome, path) as found:
        for picture in ("strip", "form-head", "form-mean"):
            low, high = found.page.evaluate("id => headgram.view(id).scale('color').domain()", picture)
            values = np.array([row["value"] for row in found.rows(picture, "cells")])
            assert (np.abs(values - (low + high) / 2) < (high - low) / 4).mean() > 0.99
        for picture in ("side-head", "side-mean"):
            low, high = found.page.evaluate("id => headgram.view(id).scale('color').domain()", picture)
            values = [row["value"] for row in found.rows(picture, "cells")]
            assert low == 0
            assert max(values) < high / 2
        low, high = found.page.evaluate("headgram.view('profile').scale('y').domain()")
        medians = [row["median"] for row in found.rows("profile", "profile")]
        assert max(medians) - min(medians) < (high - low) / 4
        (chance,) = found.page.evaluate("headgram.view('profile').data('chance')")
        assert chance["low"] < min(medians) < max(medians) < chance["high"]
        assert (chance["high"] - chance["low"]) * 2 < high - low
        for kind in ("cosine", "k"):
            found.set(pairs=kind)
            colours = np.array(found.page.evaluate(_PIXELS)).reshape(-1, 4)[:, :3]
            middle, ends = colours[np.argmin(np.abs(colours - 244).sum(1))], np.array([[31, 78, 156], [143, 74, 6]])
            vivid = np.linalg.norm(colours[:, None] - ends, axis=-1).min(1) < np.linalg.norm(ends - middle, axis=-1).min() / 2
            assert vivid.mean() < (0.02 if kind == "cosine" else 0.01)  # the diagonal is no noise


def test_a_models_colour_is_its_own(chrome, path):
    def colours(found):
        return found.page.evaluate(
            """() => {
                const view = headgram.view("profile");
                const look = name => [view.scale("color")(name), view.scale("strokeDash")(name).join()];
                return Object.fromEntries(view.scale("color").domain().map(name => [name, look(name)]));
            }"""
        )

    with opened(chrome, path, f"#model={NAMES[0]}&with=") as found:
        alone = colours(found)
        found.set(model="m5", **{"with": ["m8", "m0", NAMES[0]]})
        many = colours(found)
        assert set(many) == {"m5", "m8", "m0", NAMES[0]}
        assert many[NAMES[0]] == alone[NAMES[0]]
        assert len(set(map(tuple, many.values()))) == 4
        found.set(model="m8", **{"with": ["m5"]})
        assert colours(found) == {name: many[name] for name in ("m5", "m8")}


def test_a_slider_moves_through_offsets(chrome, path):
    with opened(chrome, path, "#layer=3&head=2&column=rotary_speed") as found:
        assert found.state()["offset"] == 1
        assert "In layer 3 by chance 0.24." in found.page.inner_text("#strip-note")
        (speed,) = (line for line in found.table("values") if line[0] == "Speed")
        assert speed[3] == "0.24"
        found.page.focus("#offset")
        for key, offset in (("ArrowRight", 2), ("End", 8192), ("ArrowLeft", 4096), ("Home", -3)):
            found.page.keyboard.press(key)
            found.settle()
            assert found.state()["offset"] == offset
            assert [row["x"] for row in found.rows("turns", "now")] == [offset]
            (row,) = (row for row in found.rows("turns", "chosen") if row["x"] == offset)
            number = found.page.inner_text("#offset-values").replace("−", "-").split("offset 0 is ")[1].split()[0]
            assert float(number) == pytest.approx(row["value"], rel=1e-3)
            assert found.page.inner_text("#offset-value").replace("−", "-") == str(offset)
        found.page.mouse.click(*place_of(found, "turns", head=2, x=16))
        found.settle()
        assert found.state()["offset"] == 16
        raw = found.rows("waves", "chosen")
        found.select("norms", "folded")
        assert [row["x"] for row in raw] == [row["x"] for row in found.rows("waves", "chosen")]
        assert [row["value"] for row in raw] != [row["value"] for row in found.rows("waves", "chosen")]
        found.screenshot("offsets")
        found.set(layer=11)
        assert found.page.inner_text("#offset-values") == "Positions do not turn the queries and keys of layer 11."
        assert found.rows("turns", "chosen") == found.rows("waves", "chosen") == found.rows("turns", "now") == []
        assert found.complaints == []


def test_names_can_be_filtered(chrome, path):
    with opened(chrome, path) as found:
        found.page.fill("#filter", "LONG 2")
        assert (
            found.page.evaluate("[...document.querySelector('#model').options].map(o => o.value)") == NAMES[:2]
        )  # and the chosen one
        found.page.click("#compare summary")
        shown = [box.get_attribute("value") for box in found.page.locator("#with input").all() if box.is_visible()]
        assert NAMES[1] in shown
        assert "m8" not in shown


def test_paper_is_white_and_has_no_buttons(chrome, path):
    with opened(chrome, path, theme="dark") as found:
        found.page.emulate_media(media="print", color_scheme="dark")
        found.settle()
        assert found.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert found.page.evaluate("headgram.view('strip').signal('ink')") == "#14181c"
        assert not any(button.is_visible() for button in found.page.locator("button:not(.link)").all())
        shown = "[...document.querySelectorAll('.card:not([hidden]) .picture canvas')]"
        heights = f"{shown}.map(each => each.getBoundingClientRect().height)"
        assert min(found.page.evaluate(heights)) > 150
        found.screenshot("paper")
        assert found.page.pdf().startswith(b"%PDF")
        found.page.emulate_media(media="screen", color_scheme="dark")
        found.settle()
        assert found.page.evaluate("headgram.view('strip').signal('ink')") == "#ffffff"


def test_what_is_read_aloud_is_right_at_once(chrome, path):
    def spoken(found):
        pictures = "[...document.querySelectorAll('.card:not([hidden]) .picture')]"
        return found.page.evaluate(
            f"{pictures}.map(each => [each.id, each.getAttribute('role'), each.getAttribute('aria-label')])"
        )

    with opened(chrome, path) as found:
        first = spoken(found)
        found.set(head=1)
        found.set(head=0)
        assert spoken(found) == first
        assert {role for _, role, _ in first} == {"application"}
        assert ["form-head", "application", "g (cosine) between layers, head 0"] in first
        assert found.page.inner_text("#origin") == (
            f"{NAMES[0]} · random twin 7: heads turned at random, spectra kept · "
            "source org/model · revision main · commit 0123456789ab · measured 2026-11-26 by headgram 0.9.9"
        )
        found.set(model=NAMES[1])
        assert found.page.inner_text("#origin") == f"{NAMES[1]} · headgram {__version__}"
