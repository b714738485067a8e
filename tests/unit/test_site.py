"""The site of the documentation: builds strictly, loads nothing from elsewhere, links to nothing that is not there."""

import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.main import get_command

import headgram
from browser import LOCAL, browser
from headgram.cli import app

ROOT = Path(__file__).parents[2]
LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src", "object": "data"}


class Page(HTMLParser):
    """What a page loads, and where it links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids |= {value for key, value in attributes if key in ("id", "name") and value}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get(LOADS.get(tag, "")):
            self.loads.append(given[LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    runpy.run_path(str(ROOT / "docs" / "gather.py"))["gather"](ROOT, folder / "build" / "pages")
    shutil.copy(ROOT / "zensical.toml", folder)
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr
    return folder / "build" / "site"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_page_can_be_found(site, pages):
    written = {path.relative_to(site / ".." / "pages") for path in (site / ".." / "pages").rglob("*.md")}
    in_menu = set(re.findall(r'"([^"]+\.md)"', json.dumps(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])))
    assert {str(path) for path in written} == in_menu
    assert len(pages) == len(in_menu)
    searched = {item["location"].split("#")[0] for item in json.loads((site / "search.json").read_text())["items"]}
    assert searched == {str(path.relative_to(site)) for path in pages}


def test_the_reference_holds_all_that_is_public(site):
    page = (site / ".." / "pages" / "docs" / "reference.md").read_text()
    sections = dict(re.findall(r"^#{3,4} `([\w. ]+)`\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL))
    assert {f"headgram.{name}" for name in headgram.__all__ if name != "SNAKEFILE"} <= set(sections)
    assert {f"Atlas.{name}" for name in dir(headgram.Atlas) if not name.startswith("_")} <= set(sections)
    assert {f"headgram {name}" for name in get_command(app).commands} <= set(sections)
    assert {"headgram.plot.heads", "headgram.plot.composition", "Checkpoint.factors", "Stack.nbytes"} <= set(sections)
    for name, text in sections.items():
        words = re.sub(r"```.*?```", "", text, flags=re.DOTALL).strip()
        assert len(words) > 15, name
    assert "earlier model and the later one" in sections["headgram.compare"]
    assert "'" not in re.search(r"-> .*", sections["Atlas.table"])[0]


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for path, page in pages.items():
        assert page.loads
        for address in page.loads:
            assert not re.match(r"\w+:|//", address), f"{path} loads {address}"
            assert (path.parent / address).is_file(), f"{path} loads {address}"
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//[^)]*", path.read_text()), path


def test_search_works_from_disk(site):
    with browser() as running:
        page = running.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith(LOCAL) or complaints.append(request.url))
        page.goto((site / "docs" / "concepts.html").as_uri())
        page.get_by_role("button", name="Search").first.click()
        page.keyboard.type("positive_energy")
        page.get_by_role("status").filter(has_text=re.compile(r"\d+ results")).wait_for()
        found = page.locator("a:visible", has_text="positive_energy")
        found.nth(3).wait_for()  # the list is drawn bit by bit
        found.first.click()
        page.wait_for_url(re.compile(r"h=positive_energy"))
        assert "concepts" not in page.url
        assert "positive_energy" in page.inner_text("article")
        assert not complaints


def test_links_lead_somewhere(pages):
    """The strict build checks links between pages; this checks all, files and headings included, as a browser sees them."""
    followed = 0
    for path, page in pages.items():
        for address in page.links:
            place, _, heading = address.partition("#")
            if re.match(r"https?://", place):
                continue
            target = (path.parent / place).resolve() if place else path
            assert target.is_file(), f"{path} links to {address}"
            if heading and target in pages:
                assert heading in pages[target].ids, f"{path} links to {address}"
            followed += 1
    assert followed > 300


def test_links_lead_somewhere_on_github():
    """Relative links of the pages as they lie in the repository; headings are checked by the strict build."""
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("config/*.md")]:
        for address in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            assert re.match(r"https?://", address) or (page.parent / address).exists(), f"{page.name} links to {address}"


def test_a_dead_link_ends_the_build(tmp_path):
    pages = tmp_path / "build" / "pages"
    pages.mkdir(parents=True)
    (pages / "README.md").write_text("# Title\n\n[gone](docs/gone.md)\n")
    (tmp_path / "zensical.toml").write_text('[project]\nsite_name = "x"\ndocs_dir = "build/pages"\nsite_dir = "build/site"\n')
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    assert subprocess.run(build, cwd=tmp_path, capture_output=True).returncode != 0
