"""Every door that reads tables, in many processes at once: none may end otherwise than well.

    python tests/stress.py results [TIMES]

Reading an open file with `pyarrow.parquet.read_table` aborts the process at its exit, about one time in twenty under load
("terminate called without an active exception", pyarrow 26).
"""

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_COMMAND = "import sys; from headgram.cli import main; sys.argv[1:] = {arguments}; main()"
_ATLAS = "import headgram; atlas = headgram.open_atlas({results!r}); model = atlas.models[0]; "
#: Python that a process runs and ends with.
DOORS = {
    "heads": _ATLAS + "atlas.heads()",
    "pairs": _ATLAS + "atlas.pairs(model)",
    "every table": _ATLAS + "[atlas.table(name) for name in ('spectra', 'gram', 'overlap', 'layers', 'models', 'neighbours')]",
    "compare": _ATLAS + "headgram.compare(model, model, {results!r})",
    "show": _COMMAND.replace("{arguments}", "['show', '--results', {results!r}]"),
    "export": _COMMAND.replace("{arguments}", "['export', '--results', {results!r}, '--to', {folder!r}]"),
}


def failures(results: Path, times: int, at_once: int = 8) -> list[str]:
    """What went wrong: a line for every process that did not end well."""

    def run(number: int) -> str | None:
        name = list(DOORS)[number % len(DOORS)]
        with tempfile.TemporaryDirectory() as folder:
            code = DOORS[name].format(results=str(results), folder=folder)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        return f"{name}: exit code {done.returncode}, {done.stderr.strip()[-300:]}" if done.returncode or done.stderr else None

    with ThreadPoolExecutor(at_once) as pool:
        return [line for line in pool.map(run, range(times * len(DOORS))) if line]


if __name__ == "__main__":
    times = int(sys.argv[2]) if len(sys.argv) > 2 else 30
    found = failures(Path(sys.argv[1]), times)
    print("\n".join([*found, f"{times * len(DOORS)} processes, {len(found)} ended badly"]))
    raise SystemExit(bool(found))
