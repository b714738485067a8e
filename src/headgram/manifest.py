"""The manifest: a table of models. Every bad row is reported at once."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from headgram.errors import HeadgramError

COLUMNS = ("name", "source", "revision")
#: Columns that a manifest may add for a checkpoint that does not state these itself.
OVERRIDE_COLUMNS = ("model_type", "heads", "kv_heads", "head_dim")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Row:
    """One model of the manifest."""

    name: str
    source: str
    revision: str | None
    overrides: dict[str, str | int]


def read_manifest(path: Path) -> list[Row]:
    """Read and check a manifest.

    Raises
    ------
    HeadgramError
        One message with every bad row and its line number.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), start=1))
    except FileNotFoundError:
        raise HeadgramError(f"There is no manifest {path}: create it, with the columns {', '.join(COLUMNS)}, separated by tabs.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HeadgramError(f"The manifest {path} cannot be read ({error}).") from None
    lines = [(number, cells) for number, cells in lines if any(cell.strip() for cell in cells) and not cells[0].startswith("#")]
    if not lines:
        raise HeadgramError(f"The manifest {path} is empty: its first line names the columns {', '.join(COLUMNS)}, separated by tabs.")
    (_, header), *body = lines
    _check_header(path, header)
    rows, problems, seen = [], [], {}
    for number, cells in body:
        values = {key: cell.strip() for key, cell in zip(header, cells, strict=False)}
        found = _problems_of(values, len(cells), len(header))
        name = values.get("name", "")
        if name.lower() in seen:
            found.append(f"the name '{name}' is taken by line {seen[name.lower()]} (case does not count)")
        seen.setdefault(name.lower(), number)
        problems += [f"line {number} ({name or 'no name'}): {problem}" for problem in found]
        if not found:
            rows.append(_row(values))
    if problems:
        raise HeadgramError(f"The manifest {path} has {len(problems)} bad entr{'y' if len(problems) == 1 else 'ies'}:\n  " + "\n  ".join(problems))
    if not rows:
        raise HeadgramError(f"The manifest {path} lists no model.")
    return rows


def _check_header(path: Path, header: list[str]) -> None:
    missing = [column for column in ("name", "source") if column not in header]
    unknown = [column for column in header if column not in COLUMNS + OVERRIDE_COLUMNS]
    if missing or unknown or len(set(header)) < len(header):
        what = f"lacks the column '{missing[0]}'" if missing else f"has the unknown column '{unknown[0]}'" if unknown else "repeats a column"
        raise HeadgramError(f"The manifest {path} {what}; columns are {', '.join(COLUMNS + OVERRIDE_COLUMNS)}, separated by tabs.")


def _problems_of(values: dict[str, str], cells: int, columns: int) -> list[str]:
    problems = []
    if cells > columns:
        problems.append(f"{cells} cells, but only {columns} columns")
    name = values.get("name", "")
    if not _NAME.fullmatch(name) or _is_number(name):
        problems.append(f"the name '{name}' must be letters, digits, '.', '_' or '-', begin with a letter or digit, and not be a number")
    if not values.get("source"):
        problems.append("the source is missing")
    for key in ("heads", "kv_heads", "head_dim"):
        if values.get(key) and not re.fullmatch(r"[1-9]\d{0,5}", values[key]):
            problems.append(f"{key} is '{values[key]}', not a positive whole number")
    return problems


def _is_number(name: str) -> bool:
    """Names that readers of partitioned tables would take for a number or a date."""
    try:
        float(name)
    except ValueError:
        return not any(letter.isalpha() for letter in name)
    return True


def _row(values: dict[str, str]) -> Row:
    overrides: dict[str, str | int] = {}
    for key in OVERRIDE_COLUMNS:
        if values.get(key):
            overrides[key] = values[key] if key == "model_type" else int(values[key])
    return Row(values["name"], values["source"], values.get("revision") or None, overrides)
