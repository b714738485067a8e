"""The manifest: a table of models. Every bad row is reported at once."""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from headgram.errors import HeadgramError
from headgram.foreign import read_bounded
from headgram.results.files import write_text

COLUMNS = ("name", "source", "revision")
#: Columns that a manifest may add for a checkpoint that does not state these itself, and `twin`, the number of a random twin.
OVERRIDE_COLUMNS = ("model_type", "heads", "kv_heads", "head_dim", "base", "prefix", "twin")
#: Those of them that are numbers.
COUNTS = ("heads", "kv_heads", "head_dim", "twin")
#: Columns that say which models share a residual basis, and in which order; all further columns are labels.
LINEAGE_COLUMNS = ("lineage", "step")
_KNOWN = COLUMNS + OVERRIDE_COLUMNS + LINEAGE_COLUMNS
_HEADER = f"with the columns {', '.join(COLUMNS)} in its first line (where needed also {', '.join(_KNOWN[len(COLUMNS) :])})"
_FORM = f"{_HEADER}, separated by tabs"
#: A manifest of a million models is smaller.
_LARGEST = 64 * 2**20
_MOST_LINES = 1_000_000
_MOST_COLUMNS = 1_000
#: What other systems do not hold as the name of a file.
_RESERVED = re.compile(r".*\.|(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
#: What a model may be called: its name is part of file names.
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,49}")


@dataclass(frozen=True)
class Labels:
    """What the manifest says of a model besides where it lies.

    Attributes
    ----------
    lineage
        Its models share a residual basis: checkpoints of one training, a base and its fine-tunes. Empty for a model of none.
    step
        Where in its lineage a model stands.
    others
        The cells of `twin` and of all further columns, those that are not empty.
    """

    lineage: str = ""
    step: float | None = None
    others: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One model of the manifest."""

    line: int
    name: str
    source: str
    revision: str | None
    overrides: dict[str, str | int]
    labels: Labels = Labels()


@dataclass(frozen=True)
class Manifest:
    """The good rows of a manifest, and a sentence about every bad one."""

    path: Path
    rows: tuple[Row, ...]
    problems: tuple[str, ...]

    @property
    def labels(self) -> dict[str, Labels]:
        """Lineage, step and labels of every good row, by name."""
        return {row.name: row.labels for row in self.rows}

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
        table = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
        filled = ((n, cells) for n, cells in enumerate(table, 1) if any(map(str.strip, cells)) and not cells[0].startswith("#"))
        lines = list(itertools.islice(filled, _MOST_LINES + 2))
    except FileNotFoundError:
        raise HeadgramError(
            f"There is no manifest {path}: begin a project with `headgram init DIR`, or create it, {_FORM}."
        ) from None
    except OSError as error:
        raise HeadgramError(f"The manifest {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise HeadgramError(f"The manifest {path} is not text in UTF-8: save it in that encoding, {_FORM}.") from None
    except (ValueError, csv.Error) as error:
        raise HeadgramError(f"The manifest {path} cannot be read ({error}): write it {_FORM}.") from None
    if not lines:
        raise HeadgramError(f"The manifest {path} is empty: fill it, {_FORM}.")
    (_, header), *body = lines
    for most, counted, what in ((_MOST_LINES, body, "lines"), (_MOST_COLUMNS, header, "columns")):
        if len(counted) > most:
            raise HeadgramError(f"The manifest {path} has more than {most:,} {what}, which no real one has: write it {_FORM}.")
    _check_header(path, header)
    rows: list[Row] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    steps: dict[tuple[str, float | None], int] = {}
    for number, cells in body:
        values = {key: cell.strip() for key, cell in zip(header, cells, strict=False)}
        found = _problems_of(values, len(cells), len(header))
        name = values.get("name", "")
        if name.lower() in seen:
            found.append(f"the name '{name}' is taken by line {seen[name.lower()]} (case does not count)")
        seen.setdefault(name.lower(), number)
        place = values.get("lineage", ""), _number(values.get("step", ""))
        if place[0] and place[1] is not None and place in steps:
            found.append(f"the step {values['step']} of the lineage '{place[0]}' is taken by line {steps[place]}")
        steps.setdefault(place, number)
        problems += [f"line {number} ({name or 'no name'}): {problem}" for problem in found]
        if not found:
            rows.append(_row(number, values))
    if not rows and not problems:
        raise HeadgramError(f"The manifest {path} lists no model.")
    return Manifest(path, tuple(rows), tuple(problems))


def add_twin(path: Path, model: str, seed: int = 1) -> str:
    """Add the random twin of a model to a manifest, as its last row; returns the twin's name.

    Raises
    ------
    HeadgramError
        If the manifest has no such model, or has this twin, or a row of it is wrong.
    """
    table = read_manifest(path)
    table.check()
    rows = {row.name: row for row in table.rows}
    name = f"{model}-null" if seed == 1 else f"{model}-null-{seed}"
    if model not in rows:
        raise HeadgramError(f"The manifest {path} has no model '{model}'; there are: {', '.join(rows)}.")
    if "twin" in rows[model].overrides:
        raise HeadgramError(f"'{model}' is a random twin itself: name the model that it is of.")
    if name in rows or not MODEL_NAME.fullmatch(name):
        problem = "is in it already" if name in rows else "is too long a name"
        raise HeadgramError(f"The manifest {path} cannot take a twin of '{model}': '{name}' {problem}.")
    text = io.StringIO(read_bounded(path, _LARGEST).decode("utf-8-sig"), newline=None).read()
    lines = text.removesuffix("\n").split("\n")
    first = next(number for number, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    header = lines[first].split("\t")
    if "twin" not in [column.strip() for column in header]:
        header.append("twin")
        lines[first] = "\t".join(header)
    columns = [column.strip() for column in header]
    cells = dict(zip(columns, lines[rows[model].line - 1].split("\t"), strict=False))
    cells |= dict.fromkeys(LINEAGE_COLUMNS, "") | {"name": name, "twin": str(seed)}
    write_text(path, "\n".join([*lines, "\t".join(cells.get(column, "") for column in columns)]) + "\n")
    return name


def _check_header(path: Path, header: list[str]) -> None:
    missing = [column for column in ("name", "source") if column not in header]
    if missing or len(set(header)) < len(header):
        [(most_common, _)] = Counter(header).most_common(1)
        what = f"lacks the column '{missing[0]}'" if missing else f"repeats the column '{most_common}'"
        raise HeadgramError(f"The manifest {path} {what}: write it {_FORM}.")
    for column in (column for column in header if column not in _KNOWN):
        near = difflib.get_close_matches(column.lower(), _KNOWN, n=1, cutoff=0.8)
        if near:
            what = f"is nearly '{near[0]}': write that, or give a label another name"
        elif not _LABEL.fullmatch(column):
            what = "is no label's name, which is made of letters, digits and '_', and begins with a letter"
        else:
            continue
        raise HeadgramError(f"The manifest {path} has the column '{column}', which {what}.")


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
    elif _RESERVED.fullmatch(name):
        problems.append(f"the name '{name}' ends with a dot or is a device's, so no folder is called that on some systems")
    if not values.get("source"):
        problems.append("the source is missing")
    for key in COUNTS:
        if values.get(key) and not re.fullmatch(r"[1-9]\d{0,5}", values[key]):
            problems.append(f"{key} is '{values[key]}', not a positive whole number")
    if values.get("step") and _number(values["step"]) is None:
        problems.append(f"the step is '{values['step']}', not a number")
    if values.get("lineage") and not values.get("step"):
        problems.append(f"the lineage '{values['lineage']}' needs a step, a number: of a base 0, of its fine-tunes 1, 2, …")
    return problems


def _number(text: str) -> float | None:
    """A finite decimal number."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


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
            overrides[key] = int(values[key]) if key in COUNTS else values[key]
    others = {key: value for key, value in values.items() if (key not in _KNOWN or key == "twin") and value}
    labels = Labels(values.get("lineage", ""), _number(values.get("step", "")), others)
    return Row(line, values["name"], values["source"], values.get("revision") or None, overrides, labels)
