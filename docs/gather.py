"""Gather the pages of the site in build/pages: python docs/gather.py

Every page keeps the place that it has in the repository, so that one relative link works on GitHub and in the site, and the
strict build of the site checks it for both. The reference is made of the docstrings of what is public.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from reference import reference

PATTERNS = ("*.md", "config/*.md", "docs/**/*.md", "docs/*.png", "docs/gallery/*", "docs/theme/*", "LICENSE")


def gather(root: Path, target: Path) -> None:
    """Fill `target` with the pages and pictures below `root`, and the reference."""
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(path for pattern in PATTERNS for path in root.glob(pattern)):
        place = target / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    (target / "docs" / "reference.md").write_text(reference())


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    gather(root, root / "build" / "pages")
