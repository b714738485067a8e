"""The reference of everything public, made of its docstrings, and of the commands, made of their help."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import typer.main

import headgram
from headgram.cli import app

_SECTIONS = ("Parameters", "Attributes", "Returns", "Raises", "Examples")


def functions() -> dict[str, Callable[..., Any]]:
    """Every public function and method, by what the page calls it."""
    found = {f"headgram.{name}": getattr(headgram, name) for name in headgram.__all__}
    charts = {f"headgram.plot.{name}": value for name, value in vars(headgram.plot).items() if _is_chart(name, value)}
    methods = {
        f"{kind.__name__}.{name}": value for kind in found.values() if inspect.isclass(kind) for name, value in _members(kind)
    }
    return {name: value for name, value in (found | charts | methods).items() if inspect.isfunction(value)}


def reference() -> str:
    """The page, in Markdown."""
    classes = [name for name in headgram.__all__ if inspect.isclass(getattr(headgram, name))]
    lines = [
        "# All functions",
        "",
        "Made of the docstrings; [Python](python.md) shows them at work. `headgram.SNAKEFILE` is a path.",
        "",
    ]
    for title, home in (("Functions", "headgram"), ("Charts", "headgram.plot")):
        lines += [f"## {title}", ""]
        for name, function in sorted(functions().items()):
            if name.rpartition(".")[0] == home:
                lines += [f"### `{name}`", "", *_callable(name.rpartition(".")[2], function)]
    lines += ["## Classes", ""]
    for name in classes:
        lines += _class(name, getattr(headgram, name))
    lines += ["## Commands", "", *_commands()]
    return "\n".join(lines)


def _is_chart(name: str, value: Any) -> bool:
    return inspect.isfunction(value) and not name.startswith("_") and value.__module__ == "headgram.plot"


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """What a class and its bases here have, but for the fields of a dataclass."""
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    found = {
        name: value
        for base in reversed(kind.__mro__)
        if base.__module__.startswith("headgram")
        for name, value in vars(base).items()
    }
    yield from ((name, value) for name, value in found.items() if not name.startswith("_") and name not in fields)


def _class(name: str, kind: type) -> Iterator[str]:
    yield from (f"### `headgram.{name}`", "", *markdown(inspect.getdoc(kind) or ""), "")
    for each, value in _members(kind):
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
        lines += ["```pycon", body.strip(), "```"] if title == "Examples" else _terms(body)
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
