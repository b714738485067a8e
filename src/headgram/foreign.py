"""What strangers wrote, in files and in answers of servers: read within bounds, and printed harmlessly."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

#: Characters that are printed of one text.
_MOST_SHOWN = 2000
#: A cell that begins with one of these is a formula to a spreadsheet.
_FORMULA = ("=", "+", "-", "@")
_LONGEST_EXPRESSION = 1000
#: Ways to divide a text among the repetitions of an expression, of which Python tries some millions in a second.
_MOST_STEPS = 10_000_000
#: Values in one JSON file: a record of a thousand models, or the index of a checkpoint, holds a tenth of them.
_MOST_VALUES = 2**21


def plain(text: object, most: int = _MOST_SHOWN) -> str:
    """A text as it may be printed: in one line, nothing in it that a terminal acts on, the middle of a long one left out.

    Examples
    --------
    >>> plain("a\\x1b[2Jb\\u202ec")
    'a\\\\x1b[2Jb\\\\u202ec'
    >>> plain("x" * 9 + "end", most=8)
    'xxxxx…nd'
    """
    shown = str(text)
    if len(shown) > most:
        tail = most // 4
        shown = f"{shown[: most - tail - 1]}…{shown[-tail:]}"
    if shown.isprintable():
        return shown
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in shown)


def plain_cell(text: object) -> str:
    """A text as it may stand in a CSV file: as `plain`, and none that a spreadsheet would compute.

    Examples
    --------
    >>> plain_cell("=1+1"), plain_cell("gpt2")
    ("'=1+1", 'gpt2')
    """
    shown = plain(text)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown


def is_costly(expression: str, text: str) -> bool:
    """Whether a stranger's regular expression might take long to be held against a text.

    Examples
    --------
    >>> is_costly(r".*layers\\.\\d+\\.(q|k)_proj$", "model.layers.0.q_proj"), is_costly("(a*)*b", "model.layers.0.q_proj")
    (False, True)
    """
    repeated = len(re.findall(r"[*+{]|(?<![(*+?}])\?", expression))  # no `(?:`, no `*?`
    nested = re.search(r"\)[*+{]", expression)
    return len(expression) > _LONGEST_EXPRESSION or bool(nested) or math.comb(len(text) + repeated, repeated) > _MOST_STEPS


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a regular file; never waits for a pipe or a device, and reads no more than `most`.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is no regular file, or larger.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most:,} bytes, which no real one is")
    return content


def stands_twice(keys: Iterable[str]) -> str:
    """What is said of a table that has a key twice."""
    [(key, _)] = Counter(keys).most_common(1)
    return f"the key {key!r:.200} stands there twice"


def parse_json(content: bytes, most: int = _MOST_VALUES) -> Any:
    """JSON in which no object has a key twice: a reader would have to choose between the two values.

    With more than `most` values it is not parsed: `{}` and its comma take 3 bytes in a file, and 70 in memory.

    Raises
    ------
    ValueError
        If it is no JSON, has a key twice, or holds more values.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(stands_twice(key for key, _ in pairs))
        return found

    if sum(map(content.count, (b",", b"{", b"["))) > most:
        raise ValueError(f"it holds more than {most:,} values, which no real one does")
    return json.loads(content, object_pairs_hook=unique)


class _Loader(yaml.SafeLoader):
    """Plain data, in which no table has a key twice: a reader would have to choose between the two values."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise yaml.MarkedYAMLError(problem=stands_twice(keys), problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(content: bytes) -> Any:
    """Plain data, without tags, in which no table has a key twice.

    Raises
    ------
    yaml.YAMLError, ValueError, RecursionError
        If it is anything else.
    """
    loader = _Loader(content)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def first_problem(error: Exception) -> str:
    """What an error says; if it is of a schema, where the first thing is that the schema refuses, and what is wrong with it."""
    from pydantic import ValidationError  # costs time where nothing is refused

    if not isinstance(error, ValidationError):
        return str(error)
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {problem['msg']}" if place else problem["msg"]
