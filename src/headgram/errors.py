"""The one exception that headgram raises on purpose, and what such sentences have in common."""

import shlex
from pathlib import Path

from headgram.foreign import plain

#: Where the table of models is unless something else is said.
MANIFEST = Path("config/models.tsv")


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


def upgrade_command(model: str, manifest: Path) -> str:
    """The command that locks a model of a manifest anew."""
    where = [] if manifest == MANIFEST else ["--manifest", str(manifest)]
    return shlex.join(["headgram", "lock", *where, "--upgrade", model])


def upgrading(model: str, manifest: Path) -> str:
    """How to go on if a checkpoint is not what was locked."""
    return f"if that is meant, run `{upgrade_command(model, manifest)}` and measure it anew, else restore it"
