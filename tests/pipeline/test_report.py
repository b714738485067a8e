"""The page in a real browser: every control changes every picture to the values in Parquet."""

import json
import shutil

import pytest

from browser import LOCAL, SCREENSHOTS, opened
from headgram.proofs.listed import listed_models
from headgram.report.names import PROFILE_FIGURES, STACK_FIGURES
from headgram.results.record import read_record
from pipeline.conftest import edit, new_project
from pipeline.page_checks import check_everything, check_profile, check_strip, table
from tiny import write_bert, write_llama, write_manifest


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A llama, a bert, and a T5 with its three stacks, with their report."""
    project = new_project(tmp_path_factory.mktemp("report") / "project")
    write_llama(project.folder / "models" / "llama", layers=6)
    write_bert(project.folder / "models" / "bert")
    model, _ = next(listed_models("t5"))
    model.save_pretrained(project.folder / "models" / "t5")
    write_manifest(project.folder / "config" / "models.tsv", {name: f"models/{name}" for name in ("llama", "bert", "t5")})
    project.run()
    return project


@pytest.fixture
def page(chrome, reported):
    with opened(chrome, reported.folder / "results" / "report" / "index.html") as found:
        yield found
        assert found.complaints == []


def test_it_opens_from_disk(page, reported):
    file = reported.folder / "results" / "report" / "index.html"
    assert file.stat().st_size < 15 * 2**20
    assert page.first_picture() < 3
    assert page.state()["model"] == "llama"
    check_everything(page, reported)


def test_every_control_changes_every_picture_to_the_values_in_parquet(page, reported):
    columns = page.page.evaluate("[...document.querySelector('#column').options].map(o => o.value)")
    numbers = table(reported, "heads", "llama", "qk/self").select_dtypes("float64").dropna(axis=1, how="all")
    assert sorted(columns) == sorted(
        name for name in numbers if not name.endswith("_expected")
    )  # which stand beside their columns
    for column in columns:
        page.select("column", column)
        check_strip(page, reported, **page.state())
        check_profile(page, reported, compared={"llama", "bert", "t5"}, **page.state())
    for control, values in {
        "layer": [5, 2],
        "head": [3, 1],
        "form": ["transposed", "symmetric", "antisymmetric", "cosine"],
        "side": ["left", "signed", "right"],
        "measure": ["right", "left", "signed", "transposed", "cosine"],
        "depth": ["relative", "layer"],
        "scale": ["symlog", "linear"],
        "turning": ["norm", "transposed", "symmetry", "trace", "cosine"],
        "model": ["t5"],
        "stack": ["qk/decoder", "qk/cross"],
        "circuit": ["ov", "qk"],
    }.items():
        for value in values:
            page.select(control, value)
            assert str(page.state()[control]) == str(value)
            check_everything(page, reported)
    page.page.click("#compare summary")
    page.page.uncheck("#with input[value=bert]")
    page.settle()
    check_everything(page, reported)
    assert sorted(page.state()["with"]) == ["llama", "t5"]


def test_the_address_holds_the_choice(chrome, reported):
    path = reported.folder / "results" / "report" / "index.html"
    with opened(chrome, path) as first:
        first.set(model="t5", stack="qk/cross", layer=1, head=1, column="trace", side="left", theme="dark")
        fragment = first.page.evaluate("location.hash")
        state = first.state()
    with opened(chrome, path, fragment) as second:
        assert second.state() == state
        second.page.evaluate("location.hash = '#model=bert&layer=2&head=99&column=none&side=x'")
        second.page.wait_for_function("headgram.state.model === 'bert'")
        second.settle()
        state = second.state()
        chosen = [state[name] for name in ("stack", "layer", "head", "column", "side")]
        assert chosen == ["qk/self", 2, 2, "symmetry", "right"]
        check_everything(second, reported)
        assert second.complaints == []


def centre(page, picture: str, **row) -> tuple[float, float]:
    """Where in the window a row of a picture is drawn."""
    found = page.page.evaluate(
        """([id, row]) => {
            const marks = [], view = headgram.view(id), box = document.getElementById(id).getBoundingClientRect();
            const visit = item => { if (item.items) item.items.forEach(visit); else if (item.datum) marks.push(item); };
            visit(view.scenegraph().root);
            const fits = ({ datum }) => Object.entries(row).every(([name, value]) => datum[name] === value);
            const { bounds } = marks.find(item => ["rect", "symbol"].includes(item.mark.marktype) && fits(item));
            const [x, y] = view.origin().map((start, i) => start + [view.padding().left, view.padding().top][i]);
            return [box.left + x + (bounds.x1 + bounds.x2) / 2, box.top + y + (bounds.y1 + bounds.y2) / 2];
        }""",
        [picture, row],
    )
    return tuple(found)


def test_clicks_choose_and_link(page, reported):
    page.page.mouse.click(*centre(page, "strip", layer=3, head=2))
    page.settle()
    assert (page.state()["layer"], page.state()["head"]) == (3, 2)
    check_everything(page, reported)
    page.page.mouse.click(*centre(page, "form-mean", layer_a=1, layer_b=4))
    page.settle()
    assert page.state()["layer"] == 1
    page.page.mouse.move(*centre(page, "strip", layer=2, head=0))
    value = table(reported, "heads", "llama", "qk/self").query("layer == 2 and head == 0")["symmetry"].item()
    tip = page.page.inner_text("#tip")
    assert tip.startswith("Layer 2, head 0")
    assert float(tip.splitlines()[1].split()[-1]) == pytest.approx(value, rel=1e-3)
    assert tip.endswith("deviations from chance")
    line = page.table("neighbours")[0]
    page.page.click("#neighbours tbody button")
    page.settle()
    assert f"L{page.state()['layer']} H{page.state()['head']}" == line[0]
    page.page.click("#values tbody tr:nth-child(4) button")
    page.settle()
    assert page.state()["column"] == page.page.input_value("#column")
    check_everything(page, reported)
    page.page.locator("#profile").scroll_into_view_if_needed()
    page.page.mouse.click(*centre(page, "profile", model="bert", layer=2))
    page.settle()
    assert (page.state()["model"], page.state()["layer"]) == ("bert", 2)
    check_everything(page, reported)


def test_a_keyboard_is_enough(page, reported):
    keyboard = page.page.keyboard
    reached = []
    for _ in range(90):
        keyboard.press("Tab")
        reached.append(page.page.evaluate("document.activeElement.id"))
    controls = ["model", "circuit", "stack", "layer", "head", "column", "theme", "form", "side", "measure", "scale", "depth"]
    assert {*controls, "strip", "form-head", "form-mean", "side-head", "side-mean", "singular", "profile"} <= set(reached)
    page.page.focus("#strip")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowLeft"):
        keyboard.press(key)
    page.settle()
    assert (page.state()["layer"], page.state()["head"]) == (1, 0)
    page.page.focus("#profile")
    keyboard.press("ArrowRight")
    page.page.focus("#neighbours tbody button")
    keyboard.press("Enter")
    page.settle()
    assert page.page.evaluate("document.activeElement.closest('#neighbours') !== null")
    check_everything(page, reported)
    assert str(page.state()["layer"]) in page.page.inner_text("#status")


@pytest.mark.parametrize("size", [(1280, 900), (1920, 1080)])
def test_light_and_dark(chrome, reported, size):
    path = reported.folder / "results" / "report" / "index.html"
    seen = {}
    colours = "[getComputedStyle(document.body).backgroundColor, headgram.view('strip').signal('ink')]"
    for theme in ("light", "dark"):
        with opened(chrome, path, size=size, theme=theme) as page:
            seen[theme] = page.page.evaluate(colours)
            page.screenshot(f"tiny-{size[0]}-{theme}")
            assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            page.page.click("#theme")
            page.settle()
            seen[f"{theme}, then the other"] = page.page.evaluate(colours)
            check_everything(page, reported)
            assert page.complaints == []
    assert seen["light"] != seen["dark"]
    assert seen["light, then the other"] == seen["dark"]
    assert seen["dark, then the other"] == seen["light"]


def test_the_same_tables_give_the_same_bytes(reported, tmp_path):
    project = reported.copy(tmp_path / "project")
    folder = project.folder / "results" / "report"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"}
    named = {path.parent / name for path in folder.rglob("*.json") for name in read_record(path).files}
    assert {path.resolve() for path in named if path.suffix != ".json"} == {path.resolve() for path in before}
    (folder / "index.json").unlink()
    assert project.planned() == {"Reporting on all models"}
    shutil.rmtree(folder)
    rendered = {"Rendering llama", "Rendering bert", "Rendering t5"}
    assert project.planned() == {"Making the page without models", "Reporting on all models"} | rendered
    project.run()
    assert {path: path.read_bytes() for path in before} == before


def test_one_more_model_draws_none_of_the_others_again(reported, tmp_path):
    project = reported.copy(tmp_path / "project")
    write_bert(project.folder / "models" / "more")
    names = ("llama", "bert", "t5", "more")
    write_manifest(project.folder / "config" / "models.tsv", {name: f"models/{name}" for name in names})
    planned = project.planned()
    assert {message for message in planned if message.startswith(("Render", "Report", "Making"))} == {
        "Rendering more",
        "Reporting on all models",
    }


def test_what_makes_the_report_stale(reported, tmp_path):
    project = reported.copy(tmp_path / "project")
    shutil.rmtree(project.folder / ".snakemake")
    assert project.planned() == set()
    alone = {"Reporting on all models"}
    page = {"Making the page without models"} | alone
    drawn = {f"Rendering {model}" for model in ("llama", "bert", "t5")} | page
    for name, stale in (("pictures.js", page), ("style.css", page), ("page.py", page), ("columns.py", drawn)):
        path = project.folder / "src" / "headgram" / "report" / name
        text = path.read_text()
        path.write_text(text + ("_CHANGED = 1\n" if path.suffix == ".py" else "\n"))
        assert project.planned() == stale, name
        assert project.planned("--config", "report={enabled: false}") == set()
        path.write_text(text)
    config = project.folder / "config" / "config.yaml"
    edit(config, "topk: 8", "topk: 2")
    assert alone < project.planned()
    edit(config, "topk: 2", "topk: 8")
    assert project.planned() == set()
    manifest = project.folder / "config" / "models.tsv"
    head, *rows = manifest.read_text().splitlines(keepends=True)
    manifest.write_text(head + "".join(reversed(rows)))
    assert project.planned() == alone
    manifest.write_text(head + "".join(rows[:2]))
    assert project.planned() == alone
    project.run()
    folder = project.folder / "results" / "report"
    assert sorted(path.stem for path in (folder / "data").glob("*.js")) == ["bert", "llama"]
    assert {path.parents[1].name for path in (folder / "figures").glob("*/*/*/*.svg")} == {"bert", "llama"}
    assert project.headgram("verify").stderr.count("report") == 0
    (folder / "data" / "bert.js").write_bytes(b"")
    assert project.planned() == {"Rendering bert"} | alone


def test_what_snakemake_remembers_grows_with_the_models_not_with_their_square(reported):
    """With every output it remembers all inputs: of outputs there must not be more where there are more models."""
    texts = [path.read_text() for path in (reported.folder / ".snakemake" / "metadata").rglob("*") if path.is_file()]
    remembered = [record for record in map(json.loads, texts) if record.get("rule") == "report"]
    assert 0 < len(remembered) == 2 + len(PROFILE_FIGURES)


def test_a_failed_model_does_not_hold_up_the_others(reported, tmp_path):
    project = reported.copy(tmp_path / "project")
    shutil.rmtree(project.folder / "results")
    shutil.rmtree(project.folder / ".snakemake")
    weights = project.folder / "models" / "bert" / "model.safetensors"
    weights.rename(weights.with_suffix(".gone"))
    done = project.snakemake("--cores", "2")
    assert done.returncode != 0
    results = project.folder / "results"
    assert sorted(path.stem for path in (results / "provenance").glob("*.json")) == ["llama", "t5"]
    assert sorted(path.stem for path in (results / "report" / "data").glob("*.js")) == ["llama", "t5"]
    assert not (results / "report" / "index.html").exists()
    weights.with_suffix(".gone").rename(weights)
    project.run()
    assert (results / "report" / "index.html").exists()


def test_snakemake_report(chrome, reported):
    done = reported.snakemake("--report", "report.html")
    assert done.returncode == 0, done.stderr
    path = reported.folder / "report.html"
    page = chrome.new_page(viewport={"width": 1280, "height": 900})
    complaints = []
    page.on("request", lambda request: request.url.startswith(LOCAL) or complaints.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.get_by_text("Along the depth").click()
    for label in PROFILE_FIGURES.values():
        page.get_by_text(label, exact=True).wait_for()
    page.goto(path.as_uri())
    page.get_by_text("Models", exact=True).click()
    page.get_by_text("t5", exact=True).click()
    page.get_by_text(STACK_FIGURES["cosine"]).first.wait_for()
    page.screenshot(path=SCREENSHOTS / "snakemake-report.png")
    assert complaints == []
    page.close()
