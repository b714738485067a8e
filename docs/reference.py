"""The reference of everything public, made of its docstrings, and of the commands, made of their help."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import typer.main

import headgram
from headgram.cli import app

_SECTIONS = ("Parameters", "Attributes", "Returns", "Raises", "Examples")


def reference() -> str:
    """The page, in Markdown."""
    functions = [name for name in headgram.__all__ if inspect.isfunction(getattr(headgram, name))]
    classes = [name for name in headgram.__all__ if inspect.isclass(getattr(headgram, name))]
    charts = [name for name, value in vars(headgram.plot).items() if _is_public(name, value, "headgram.plot")]
    lines = [
        "# All functions",
        "",
        "Made of the docstrings; [Python](python.md) shows them at work. `headgram.SNAKEFILE` is a path.",
        "",
    ]
    for title, prefix, home, names in (
        ("Functions", "headgram.", headgram, functions),
        ("Charts", "headgram.plot.", headgram.plot, sorted(charts)),
    ):
        lines += [f"## {title}", ""]
        for name in names:
            lines += [f"### `{prefix}{name}`", "", *_callable(name, getattr(home, name))]
    lines += ["## Classes", ""]
    for name in classes:
        lines += _class(name, getattr(headgram, name))
    lines += ["## Commands", "", *_commands()]
    return "\n".join(lines)


def _is_public(name: str, value: Any, module: str) -> bool:
    return inspect.isfunction(value) and not name.startswith("_") and value.__module__ == module


def _class(name: str, kind: type) -> Iterator[str]:
    yield from (f"### `headgram.{name}`", "", *markdown(inspect.getdoc(kind) or ""), "")
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    members = {
        each: value
        for base in reversed(kind.__mro__)
        if base.__module__.startswith("headgram")
        for each, value in vars(base).items()
    }
    for each, value in members.items():
        if each.startswith("_") or each in fields:
            continue
        if isinstance(value, property):
            yield from (f"#### `{name}.{each}`", "", *markdown(inspect.getdoc(value) or ""), "")
        elif callable(value):
            yield from (f"#### `{name}.{each}`", "", *_callable(each, value))


def _callable(name: str, function: Any) -> Iterator[str]:
    signature = re.sub(
        r"\bself, |\bself\)", lambda match: ")" if match[0].endswith(")") else "", str(inspect.signature(function))
    )
    signature = re.sub(r"(: |-> )(['\"])(.*?)\2", r"\1\3", signature)  # annotations are texts
    signature = re.sub(r"\b(?:headgram|jaxtyping|torch|pandas|xarray)\.[\w.]*\b(\w+)", r"\1", signature)
    yield from ("```python", f"{name}{signature}", "```", "", *markdown(inspect.getdoc(function) or ""), "")


def markdown(docstring: str) -> list[str]:
    """A NumPy docstring in Markdown: sections in bold, terms as a list, examples as sessions."""
    parts = re.split(rf"^({'|'.join(_SECTIONS)})\n-+\n", docstring, flags=re.MULTILINE)
    lines = [parts[0].strip()]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        lines += ["", f"**{title}**", ""]
        lines += ["```pycon", re.sub(r"  # doctest: \+SKIP", "", body.strip()), "```"] if title == "Examples" else _terms(body)
    return lines


def _terms(body: str) -> list[str]:
    """Each term with what is said of it, as an item of a list."""
    lines: list[str] = []
    for line in body.strip("\n").splitlines():
        if line and not line.startswith(" "):
            lines.append(f"- `{line}`:")
        elif line.strip():
            lines[-1] += f" {line.strip()}"
    return lines


def _commands() -> Iterator[str]:
    for name, command in typer.main.get_command(app).commands.items():
        yield from (f"### `headgram {name}`", "", command.help or "", "")
        options = [option for option in command.params if option.name != "help"]
        if options:
            yield from ("| option | meaning |", "|---|---|")
            for option in options:
                spelled = ", ".join(option.opts) if option.param_type_name == "option" else option.name.upper()
                yield f"| `{spelled}` | {(getattr(option, 'help', None) or '').replace('|', '∣')} |"
            yield ""
