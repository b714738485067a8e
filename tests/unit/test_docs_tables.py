"""docs/artifacts.md describes every column of every table, with its type; and every table of the docs is one."""

import re
from pathlib import Path

import pytest

from headgram.results.tables import AT_TIMES, LAYER_SCORES, QUARTILES, SUMMARISED, TABLES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "config" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_TYPES = {"string": "string", "int32": "int32", "float64": "double", "float32": "float", "bool": "bool"}
#: What a name in the docs stands for.
_MANY = {
    "{c}_q25": [f"{name}_q25" for name in SUMMARISED],
    "{c}_median": [f"{name}_median" for name in SUMMARISED],
    "{c}_q75": [f"{name}_q75" for name in SUMMARISED],
    "rotary_…_expected": [name for name in AT_TIMES if name.endswith("_expected")],
}


def blocks(text: str) -> list[list[str]]:
    """Lines that begin with a bar and follow each other."""
    found = re.findall(r"(?:^\|.*\n?)+", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return [block.splitlines() for block in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_table_has_a_head(page):
    for first, *rest in blocks(page.read_text()):
        assert rest, first
        assert re.fullmatch(r"[|: -]+", rest[0]), first
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in (first, *rest)}
        assert len(widths) == 1, first


@pytest.mark.parametrize("name", TABLES)
def test_every_column_is_described(name):
    page = (ROOT / "docs" / "artifacts.md").read_text()
    section = page.split(f"\n### {name}\n")[1].split("\n### ")[0].split("\n## ")[0]
    (rows,) = blocks(section)
    schema, found = TABLES[name], []
    for row in rows[2:]:
        _, columns, types, meaning, _ = row.split("|")
        names = [each for column in re.findall(r"`([^`]+)`", columns) for each in _MANY.get(column, [column])]
        found += names
        assert len(meaning.split()) > 1, row
        kinds = re.findall(r"(string|int32|float64|float32|bool)(?: × (\d))?", types)
        stated = [kind for kind, count in kinds for _ in range(int(count or 1))]
        if len(stated) in (1, len(names)):
            for column, kind in zip(names, stated * len(names) if len(stated) == 1 else stated, strict=True):
                assert str(schema.field(column).type) == _TYPES[kind], (name, column)
    layer_scores = {f"{score}_median" for score in LAYER_SCORES} if name == "models" else set()
    assert set(found) | layer_scores == set(schema.names)
    assert len(found) == len(set(found))
    assert {"q25", "median", "q75"} == set(QUARTILES)
