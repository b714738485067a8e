"""The manifest: a table of models. Every bad row is reported at once."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

from headgram.errors import HeadgramError
from headgram.foreign import read_bounded

COLUMNS = ("name", "source", "revision")
#: Columns that a manifest may add for a checkpoint that does not state these itself.
OVERRIDE_COLUMNS = ("model_type", "heads", "kv_heads", "head_dim")
_HEADER = f"with the columns {', '.join(COLUMNS)} in its first line (where needed also {', '.join(OVERRIDE_COLUMNS)})"
_FORM = f"{_HEADER}, separated by tabs"
#: A manifest of a million models is smaller.
_LARGEST = 64 * 2**20
#: What a model may be called: its name is part of file names.
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Row:
    """One model of the manifest."""

    line: int
    name: str
    source: str
    revision: str | None
    overrides: dict[str, str | int]


@dataclass(frozen=True)
class Manifest:
    """The good rows of a manifest, and a sentence about every bad one."""

    path: Path
    rows: tuple[Row, ...]
    problems: tuple[str, ...]

    def check(self, *more: str) -> None:
        """Report every problem of the table, and more that were found elsewhere, at once.

        Raises
        ------
        HeadgramError
            If there is any problem.
        """
        if problems := (*self.problems, *more):
            count = f"{len(problems)} bad {'entry' if len(problems) == 1 else 'entries'}"
            raise HeadgramError(f"The manifest {self.path} has {count}:", *problems)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; what is wrong with single rows is collected, see `Manifest.check`.

    Raises
    ------
    HeadgramError
        If the table as a whole cannot be read.
    """
    try:
        text = read_bounded(path, _LARGEST).decode("utf-8-sig")
        lines = list(enumerate(csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE), start=1))
    except FileNotFoundError:
        raise HeadgramError(f"There is no manifest {path}: create it, {_FORM}.") from None
    except (OSError, ValueError, csv.Error) as error:
        raise HeadgramError(f"The manifest {path} cannot be read ({error}).") from None
    lines = [(number, cells) for number, cells in lines if any(cell.strip() for cell in cells) and not cells[0].startswith("#")]
    if not lines:
        raise HeadgramError(f"The manifest {path} is empty: fill it, {_FORM}.")
    (_, header), *body = lines
    _check_header(path, header)
    rows: list[Row] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    for number, cells in body:
        values = {key: cell.strip() for key, cell in zip(header, cells, strict=False)}
        found = _problems_of(values, len(cells), len(header))
        name = values.get("name", "")
        if name.lower() in seen:
            found.append(f"the name '{name}' is taken by line {seen[name.lower()]} (case does not count)")
        seen.setdefault(name.lower(), number)
        problems += [f"line {number} ({name or 'no name'}): {problem}" for problem in found]
        if not found:
            rows.append(_row(number, values))
    if not rows and not problems:
        raise HeadgramError(f"The manifest {path} lists no model.")
    return Manifest(path, tuple(rows), tuple(problems))


def _check_header(path: Path, header: list[str]) -> None:
    missing = [column for column in ("name", "source") if column not in header]
    unknown = [column for column in header if column not in COLUMNS + OVERRIDE_COLUMNS]
    if missing or unknown or len(set(header)) < len(header):
        what = "repeats a column"
        if missing:
            what = f"lacks the column '{missing[0]}'"
        elif unknown:
            what = f"has the unknown column '{unknown[0]}'"
        raise HeadgramError(f"The manifest {path} {what}: write it {_FORM}.")


def _problems_of(values: dict[str, str], cells: int, columns: int) -> list[str]:
    problems = []
    if cells == 1 and columns > 1:
        return ["the line has no tab: columns are separated by tabs, not by spaces"]
    if cells > columns:
        problems.append(f"{cells} cells, but only {columns} columns")
    name = values.get("name", "")
    if not MODEL_NAME.fullmatch(name) or _is_number(name):
        problems.append(
            f"the name '{name}' must be made of letters, digits, '.', '_' and '-', begin with a letter or digit, "
            "and not be a number"
        )
    if not values.get("source"):
        problems.append("the source is missing")
    for key in ("heads", "kv_heads", "head_dim"):
        if values.get(key) and not re.fullmatch(r"[1-9]\d{0,5}", values[key]):
            problems.append(f"{key} is '{values[key]}', not a positive whole number")
    return problems


def _is_number(name: str) -> bool:
    """Names that readers of partitioned tables would take for a number or a date."""
    if re.fullmatch(r"0[xX][0-9a-fA-F]+", name):
        return True
    try:
        float(name)
    except ValueError:
        return not any(letter.isalpha() for letter in name)
    return True


def _row(line: int, values: dict[str, str]) -> Row:
    overrides: dict[str, str | int] = {}
    for key in OVERRIDE_COLUMNS:
        if values.get(key):
            overrides[key] = values[key] if key == "model_type" else int(values[key])
    return Row(line, values["name"], values["source"], values.get("revision") or None, overrides)
