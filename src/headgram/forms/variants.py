"""Names of forms: `qk`, `ov`; with norms folded in, `qk-folded`; at an offset of so many tokens, `qk@8`, `qk-folded@-1`.

Nothing here imports torch: the plan reads this module at parse time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

#: What a name looks like, as a regular expression without groups.
NAME = r"[a-z]+(?:-folded)?(?:@-?[0-9]+)?"
RAW, FOLDED = "raw", "folded"


@dataclass(frozen=True)
class Variant:
    """A form of a circuit: of factors as they are stored or with norms folded in, at an offset of query and key in tokens.

    Examples
    --------
    >>> Variant.of("qk-folded@8")
    Variant(circuit='qk', norm='folded', offset=8)
    >>> Variant("ov", "folded").name
    'ov-folded'
    """

    circuit: str
    norm: str = RAW
    offset: int = 0

    @property
    def name(self) -> str:
        """As tables and files call it."""
        folded = "-folded" if self.norm == FOLDED else ""
        return f"{self.circuit}{folded}{f'@{self.offset}' if self.offset else ''}"

    @property
    def raw(self) -> Variant:
        """The form that is extracted, of which this one is made."""
        return replace(self, norm=RAW, offset=0)

    @classmethod
    def of(cls, name: str) -> Variant:
        """The form of a name."""
        circuit, _, offset = name.partition("@")
        return cls(circuit.removesuffix("-folded"), FOLDED if circuit.endswith("-folded") else RAW, int(offset or 0))


def is_made(name: str) -> bool:
    """Whether a text is the name of a form that is made of an extracted one."""
    return re.fullmatch(NAME, name) is not None and name != Variant.of(name).circuit


def needs(variant: Variant) -> tuple[str, ...]:
    """The roles around a layer's projections that a form follows from."""
    norms = ("norm", "source_norm", *(("query_norm", "key_norm") if variant.circuit == "qk" else ("output_norm",)))
    return (norms if variant.norm == FOLDED else ()) + (("rotary",) if variant.offset else ())
