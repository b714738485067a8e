"""The one exception that headgram raises on purpose."""


class HeadgramError(Exception):
    """What is wrong, where (model, layer, tensor), and what to do, in one sentence."""


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
