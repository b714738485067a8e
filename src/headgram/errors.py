"""The one exception that headgram raises on purpose."""

from headgram.foreign import plain


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
