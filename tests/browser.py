"""A headless Chromium, the distribution's own."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_INSTALL = "apt-get install -y --no-install-recommends chromium fonts-dejavu-core"
_ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")
#: Where a page may get things from.
LOCAL = ("file:", "data:", "blob:")
#: Where screenshots are kept; git ignores it.
SCREENSHOTS = Path(__file__).parents[1] / "build" / "screenshots"


def chromium():
    """The path of Chromium; where it is missing, tests are skipped, but not in CI."""
    if path := shutil.which("chromium"):
        return path
    if os.environ.get("CI"):
        pytest.fail(f"Chromium is missing: {_INSTALL}")
    return pytest.skip(f"Chromium is missing: {_INSTALL}")


@contextmanager
def browser() -> Iterator:
    """A running Chromium."""
    from playwright.sync_api import sync_playwright

    path = chromium()
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(_ARGUMENTS))
        yield running
        running.close()


@dataclass
class Opened:
    """A page of headgram, and whatever it should not have done."""

    page: object
    complaints: list[str] = field(default_factory=list)

    def set(self, **wish) -> None:
        """Choose by the page's own door, and wait until everything is drawn."""
        self.page.evaluate("wish => headgram.set(wish)", wish)
        self.settle()

    def select(self, control: str, value: object) -> None:
        self.page.select_option(f"#{control}", str(value))
        self.settle()

    def settle(self) -> None:
        """Wait until everything is drawn. Chromium tells a page of another medium or theme at its next frame: that first."""
        self.page.evaluate("new Promise(requestAnimationFrame).then(headgram.settled)")

    def state(self) -> dict:
        return self.page.evaluate("({...headgram.state})")

    def rows(self, picture: str, dataset: str) -> list[dict]:
        """What a picture draws."""
        return self.page.evaluate("([id, set]) => headgram.rows(id, set)", [picture, dataset])

    def labels(self, picture: str) -> list[list[dict]]:
        """What each axis and legend of a picture names: texts, and the corners of their boxes."""
        return self.page.evaluate(
            """id => {
            const view = headgram.view(id), axes = [];
            const visit = item => {
                if (["axis-label", "legend-label"].includes(item.role)) axes.push(item.items.filter(seen).map(described));
                (item.items ?? []).forEach(visit);
            };
            const seen = ({ opacity, text }) => opacity !== 0 && text !== "";
            const described = ({ text, bounds: { x1, x2, y1, y2 } }) => ({ text: String(text), x1, x2, y1, y2 });
            visit(view.scenegraph().root);
            return axes;
        }""",
            picture,
        )

    def table(self, name: str) -> list[list[str]]:
        """The texts of a table's rows."""
        rows = "id => [...document.querySelectorAll(`#${id} tbody tr`)].map(row => [...row.cells].map(cell => cell.innerText))"
        return self.page.evaluate(rows, name)

    def first_picture(self) -> float:
        """Seconds from the start of the navigation to the first picture."""
        return self.page.evaluate("performance.getEntriesByName('first-picture')[0].startTime") / 1000

    def screenshot(self, name: str) -> Path:
        path = SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=path, full_page=True)
        return path


@contextmanager
def opened(running, path: Path, fragment="", size=(1280, 900), theme="light", touch=False) -> Iterator[Opened]:
    """The page at a path, drawn; complaints are console messages, errors, and requests beyond the disk."""
    viewport = {"width": size[0], "height": size[1]}
    page = running.new_page(viewport=viewport, color_scheme=theme, has_touch=touch, is_mobile=touch)
    found = Opened(page)
    page.on("console", lambda message: found.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: found.complaints.append(f"error: {error}"))
    page.on("request", lambda request: request.url.startswith(LOCAL) or found.complaints.append(request.url))
    page.goto(path.resolve().as_uri() + fragment)
    page.wait_for_function("window.headgram?.started")
    page.evaluate("headgram.started")
    found.settle()
    yield found
    page.close()


def assert_legible(found: Opened, picture: str) -> None:
    """No two labels of an axis or a legend are equal, and none lies over another; chance may be marked on both sides."""
    texts = found.labels(picture)
    assert texts
    for labels in texts:
        named = [label["text"] for label in labels if label["text"] != "chance"]
        assert len(set(named)) == len(named), (picture, named)
        for i, a in enumerate(labels):
            for b in labels[i + 1 :]:
                beside = a["x2"] <= b["x1"] or b["x2"] <= a["x1"]
                assert beside or a["y2"] <= b["y1"] + 1 or b["y2"] <= a["y1"] + 1, (picture, a, b)
