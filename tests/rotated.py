"""Forms at an offset, made whole: what the arithmetic of positions is held against."""

from headgram.forms.heads import Heads
from headgram.forms.reading import Rotary


def rotated(heads: Heads, rotary: Rotary, offset: float) -> Heads:
    """The forms `g(offset) = W_K^T R(offset) W_Q` of `qk`, in float64: scores of a query so many tokens after the key."""
    return heads.with_factors(heads.a.double(), rotary.scaled(rotary.turned(heads.b, offset)))
