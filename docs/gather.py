"""Gather the pages of the site in build/pages: python docs/gather.py

Every page keeps the place that it has in the repository, so that one relative link works on GitHub and in the site, and the
strict build of the site checks it for both. Notebooks become pages.
"""

import shutil
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

PATTERNS = ("*.md", "config/*.md", "docs/*.md", "docs/*.png", "docs/pictures/*", "docs/theme/*", "LICENSE")
NOTEBOOKS = "docs/*.ipynb"


def gather(root: Path, target: Path) -> None:
    """Fill `target` with the pages, pictures and notebooks below `root`."""
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(path for pattern in PATTERNS for path in root.glob(pattern)):
        place = target / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            place.write_text(link_to_pages(path.read_text()))
        else:
            shutil.copyfile(path, place)
    for path in root.glob(NOTEBOOKS):
        write_notebook(path, target / path.relative_to(root))


def link_to_pages(text: str) -> str:
    """The same text, with links to notebooks turned to the pages that they become."""
    return text.replace(".ipynb)", ".md)").replace(".ipynb#", ".md#")


def write_notebook(path: Path, place: Path) -> None:
    """The executed notebook as a page, its pictures beside it."""
    body, resources = MarkdownExporter().from_notebook_node(nbformat.read(path, as_version=4), {"unique_key": path.stem})
    place.with_suffix(".md").write_text(link_to_pages(body))
    for name, data in resources["outputs"].items():
        (place.parent / name).write_bytes(data)


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    gather(root, root / "build" / "pages")
