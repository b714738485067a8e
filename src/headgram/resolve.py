"""`python -m headgram.resolve MANIFEST`: the process in which a run resolves the rows that its lock lacks.

Prints one JSON object, `{"models": entries by name, "problems": sentences}`, and writes nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from headgram.lock import lock_path, missing_rows, read_lock, resolve_all
from headgram.manifest import read_manifest


def main(manifest: Path) -> None:
    """Resolve the missing rows of a manifest."""
    rows = missing_rows(read_manifest(manifest).rows, read_lock(lock_path(manifest)))
    models, problems = resolve_all(rows, progress=lambda line: print(line, file=sys.stderr))
    print(json.dumps({"models": {name: entry.model_dump(mode="json") for name, entry in models.items()}, "problems": problems}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
