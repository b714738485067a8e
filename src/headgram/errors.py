"""The one exception that headgram raises on purpose, what such sentences have in common, and doors that refuse wrong types."""

import inspect
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from numbers import Integral
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from headgram.foreign import plain

#: Where the table of models is unless something else is said.
MANIFEST = Path("config/models.tsv")
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound=type)
#: By the beginning of an annotation: what is taken, and what it is called.
_KINDS: dict[str, tuple[Any, str]] = {
    "str": (str, "a text"),
    "Literal": (str, "a text"),
    "int": (Integral, "a whole number"),
    "str | os.PathLike": ((str, os.PathLike), "a text or a path"),
    "str | Sequence": ((str, Sequence), "a text or a list of texts"),
    "Iterable": (Iterable, "a list"),
    "Mapping": (Mapping, "a mapping of names to values"),
}


class HeadgramError(Exception):
    """What is wrong, where (model, layer, tensor), and what to do, in one sentence; details follow it, a line each.

    Names in it may come from files of strangers: as a text, all of it is harmless to print.
    """

    def __init__(self, sentence: str, *details: str) -> None:
        super().__init__(sentence, *details)

    def __str__(self) -> str:
        return "\n  ".join(map(plain, self.args))


class UnknownTypeError(HeadgramError):
    """A `model_type` that no family owns."""

    def __init__(self, model_type: str, sentence: str) -> None:
        super().__init__(sentence)
        self.model_type = model_type


def require(value: object, kind: type | tuple[type, ...], what: str) -> None:
    """Refuse an argument of another type; a truth value is no number.

    Raises
    ------
    HeadgramError
        `what` says what is taken.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        raise HeadgramError(f"{what}, not {type(value).__name__}")


def door(function: Callable[P, R]) -> Callable[P, R]:
    """A public function that refuses an argument of another type than its signature names: texts, whole numbers, lists, mappings.

    Examples
    --------
    >>> @door
    ... def twice(layer: "int") -> int:
    ...     return 2 * layer
    >>> twice("3")
    Traceback (most recent call last):
    headgram.errors.HeadgramError: `layer` is a whole number, not str
    """
    signature = inspect.signature(function)
    kinds = {each.name: kind for each in signature.parameters.values() if (kind := _kind(str(each.annotation)))}

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in kinds and not (value is None and signature.parameters[name].default is None):
                kind, what = kinds[name]
                require(value, kind, f"`{name}` is {what}")
        return function(*args, **kwargs)

    return checked


def doors(owner: T) -> T:
    """A class all of whose public methods are doors."""
    for name, function in list(vars(owner).items()):
        if inspect.isfunction(function) and not name.startswith("_"):
            setattr(owner, name, door(function))
    return owner


def _kind(annotation: str) -> tuple[Any, str] | None:
    """What an annotation asks for, as it is written: texts of certain values are called Literal, Kind or …Column."""
    plainly = annotation.removesuffix(" | None")
    if plainly in ("Kind", "Precision") or plainly.endswith("Column"):
        plainly = "Literal"
    return next((kind for beginning, kind in _KINDS.items() if plainly.partition("[")[0] == beginning), None)


def upgrade_command(model: str, manifest: Path) -> str:
    """The command that locks a model of a manifest anew."""
    where = [] if manifest == MANIFEST else ["--manifest", str(manifest)]
    return shlex.join(["headgram", "lock", *where, "--upgrade", model])


def upgrading(model: str, manifest: Path) -> str:
    """How to go on if a checkpoint is not what was locked."""
    return f"if that is meant, run `{upgrade_command(model, manifest)}` and measure it anew, else restore it"
