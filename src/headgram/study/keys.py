"""The digest of a stage's own code.

Snakemake re-runs a job whose script is newer, but not one whose imported modules changed. The digest covers the stage's
script, its module and all of headgram that it imports, directly or not; it is found by reading the sources, so nothing
is imported. What cannot change a result does not count: comments, docstrings, layout, and imports for type checkers only.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

#: The folder of this package. Found without importing what is in it.
_PACKAGE = Path(__file__).parent.parent


@cache
def code_digest(stage: str, script: Path) -> str:
    """BLAKE2b of the code of a stage's script, of `headgram.stages.<stage>`, and of every headgram module that it imports."""
    state = hashlib.blake2b(_code(script).encode(), digest_size=16)
    for path in sorted(modules_of(f"headgram.stages.{stage}")):
        state.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + _code(path).encode() + b"\0")
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
            waiting += _imports(path)
    return found


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


class _Stripped(ast.NodeTransformer):
    """Removes texts that nobody uses, docstrings among them, and what only type checkers see."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == [] and not isinstance(node, ast.Module):
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node

    def visit_If(self, node: ast.If) -> ast.AST | None:
        is_for_checkers = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if is_for_checkers else self.generic_visit(node)


@cache
def _tree(path: Path) -> ast.Module:
    tree: ast.Module = _Stripped().visit(ast.parse(path.read_bytes()))
    return tree


@cache
def _code(path: Path) -> str:
    """A module's code in one layout. As text: the tree itself looks different in every version of Python."""
    return ast.unparse(_tree(path))


@cache
def _imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # `from headgram.geometry import heads` names a module, `from headgram.geometry.heads import spectrum` does not.
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
