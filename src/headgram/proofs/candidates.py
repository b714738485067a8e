"""Layouts that a type may have, by its live models or by its names, and the first of them that is proven."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from headgram.errors import HeadgramError
from headgram.families.registry import Family, Remark, StackRule, adopting, families
from headgram.proofs.derive_family import derive_family
from headgram.proofs.listed import saved
from headgram.proofs.prove import fits, prove
from headgram.proofs.shrink import classes_to_build, quiet, switched, tiny_model


def proven_family(model_type: str, config: Mapping[str, Any] | None = None) -> Family:
    """The family that a type is derived to be, proven on tiny models with the switches of a configuration.

    Raises
    ------
    HeadgramError
        Says what stands in the way.
    """
    with switched(model_type, config or {}), quiet():
        reasons: list[str] = []
        for family in _candidates(model_type, reasons):
            with adopting(model_type, family):
                proof = prove(model_type)
            if proof.ok:
                return family
            reasons.append(f"not proven: {proof.problem}")
    raise HeadgramError(reasons[0])


def _candidates(model_type: str, reasons: list[str]) -> Iterator[Family]:
    """What is read off the live models. If that does not explain all of them, known layouts whose names and shapes fit."""
    try:
        family, problems = derive_family(model_type)
    except Exception as error:  # whatever transformers raises
        reasons.append(f"cannot be built small: {type(error).__name__}: {error!s:.200}".splitlines()[0])
        return
    if family and not problems:
        yield family
        return
    reasons.append(problems[0] if problems else "no attention module was found")
    with saved(tiny_model(model_type, classes_to_build(model_type)[0], 0)) as folder:
        for known in (known for known in families() if not known.walked and known.stacks):
            own = {"name": re.sub(r"\W", "_", model_type), "model_types": (model_type,), "walked": True, "gguf": None}
            stacks = [rule.model_copy(update={"around": (), "defaults": {}, "remarks": _unbound(rule)}) for rule in known.stacks]
            family = known.model_copy(update={**own, "stacks": tuple(stacks), "embedding": ()})
            if fits(model_type, family, folder):
                yield family


def _unbound(rule: StackRule) -> tuple[Remark, ...]:
    """The remarks of a rule that are about all types."""
    return tuple(remark for remark in rule.remarks if not remark.types)
