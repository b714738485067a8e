"""Photograph the page of the default models, `results/report/index.html`, for docs/report.md: python docs/screenshot.py

Needs a Chromium, as the tests of the page do.
"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

PAGE = Path("results/report/index.html")
CHOICE = "model=smollm2-135m-instruct&layer=9&head=2&column=symmetry"


def main() -> None:
    """Write `docs/page.png`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.goto(f"{PAGE.resolve().as_uri()}#{CHOICE}")
        page.evaluate("headgram.started")
        page.screenshot(path="docs/page.png", full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
