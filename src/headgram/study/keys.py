"""The digest of a stage's own code.

Snakemake re-runs a job whose script is newer, but not one whose imported modules changed. The digest covers the stage's
script, its module and all of headgram that it imports, directly or not; it is found by reading the sources, so nothing
is imported. What cannot change a result does not count: comments, docstrings, layout, and imports for type checkers only.
"""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: The folder of this package. Found without importing what is in it.
_PACKAGE = Path(__file__).parent.parent


@cache
def code_digest(stage: str, script: Path) -> str:
    """BLAKE2b of the code of a stage's script, of `headgram.stages.<stage>`, and of every headgram module that it imports."""
    state = hashlib.blake2b(_code(script).text.encode(), digest_size=16)
    for path in sorted(modules_of(f"headgram.stages.{stage}")):
        state.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + _code(path).text.encode() + b"\0")
    return state.hexdigest()


@cache
def page_digest() -> str:
    """BLAKE2b of what the page is made of besides Python: its template, its styles and its script."""
    state = hashlib.blake2b(digest_size=16)
    for path in sorted((_PACKAGE / "report").glob("*.*")):
        if path.suffix in (".html", ".css", ".js"):
            state.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()


def modules_of(module: str) -> set[Path]:
    """Source files of a headgram module and of all headgram modules that it imports."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        path = _source(waiting.pop())
        if path is not None and path not in found:
            found.add(path)
            waiting += _code(path).imports
    return found


@cache
def _source(module: str) -> Path | None:
    parts = module.split(".")
    if parts[0] != "headgram":
        return None
    path = _PACKAGE.joinpath(*parts[1:])
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        # The package's own `__init__` names every module, lazily: following it would make all stages one.
        if candidate.is_file() and candidate != _PACKAGE / "__init__.py":
            return candidate
    return None


@dataclass(frozen=True)
class _Code:
    """A module without what cannot change a result."""

    text: str
    imports: tuple[str, ...]


@cache
def _code(path: Path) -> _Code:
    """One walk through the syntax tree, since every start of a run waits for it.

    Empty fields are left out: those that a later version of Python adds are empty for the code of today.
    """
    parts: list[str] = []
    imports: list[str] = []

    def describe(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            imports.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # `from headgram.geometry import heads` names a module, `from headgram.geometry.heads import spectra` does not.
            imports.extend([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        parts.append(type(node).__name__)
        for name in node._fields:
            if name == "ctx":  # whether a name is read or written follows from its place
                continue
            value = getattr(node, name, None)
            if isinstance(value, ast.AST):
                parts.append(name)
                describe(value)
            elif isinstance(value, list):
                parts.append(name)
                for item in value:
                    if not isinstance(item, ast.AST):
                        parts.append(repr(item))
                    elif not _is_idle(item):
                        describe(item)
            elif value is not None:
                parts.append(f"{name}={value!r}")
        parts.append("end")

    describe(ast.parse(path.read_bytes()))
    return _Code("\n".join(parts), tuple(imports))


def _is_idle(node: ast.AST) -> bool:
    """Whether a statement is a text that nobody uses, such as a docstring, or for type checkers only."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
