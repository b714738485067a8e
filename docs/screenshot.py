"""Photograph the page of the default models, `results/report/index.html`, for docs and gallery: python docs/screenshot.py

Needs a Chromium, as the tests of the page do.
"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

PAGE = Path("results/report/index.html")
CHOICE = "model=smollm2-135m-instruct&layer=9&head=2&column=symmetry&with=smollm2-135m-instruct,all-minilm-l6-v2"
#: A phone, a laptop, a large screen.
SIZES = ((390, 844), (1280, 900), (1920, 1080))


def main() -> None:
    """Write `docs/page.png`, `docs/offsets.png`, and `docs/gallery/page-WIDTH-THEME.png`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        for width, height in SIZES:
            for theme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme, has_touch=width < 600)
                page.goto(f"{PAGE.resolve().as_uri()}#{CHOICE}")
                page.evaluate("headgram.started")
                page.screenshot(path=f"docs/gallery/page-{width}-{theme}.png")
                if (width, theme) == (1280, "light"):
                    page.screenshot(path="docs/page.png", full_page=True)
                    page.evaluate("headgram.set({ layer: 18, head: 8, offset: 64 })")
                    page.locator("#card-positions").screenshot(path="docs/offsets.png")
                page.close()
        browser.close()


if __name__ == "__main__":
    main()
