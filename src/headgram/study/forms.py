"""Which forms of a circuit the options ask for, and which of them a stack has."""

from __future__ import annotations

from headgram.forms.variants import Variant, needs
from headgram.study.lock import LockedStack
from headgram.study.options import Config


def asked_forms(config: Config) -> list[Variant]:
    """The forms that the options ask for; offsets are those of queries and keys."""
    return [
        Variant(circuit, norm, offset)
        for circuit in config.circuits
        for norm in config.weights.norm
        for offset in (config.rotary.offsets if circuit == "qk" else (0,))
    ]


def forms(stack: LockedStack, circuit: str, config: Config) -> tuple[list[Variant], list[str]]:
    """The forms of a circuit that are measured of a stack, and sentences about those that are asked for and cannot be.

    Where none can be, the form of the weights as stored is measured.
    """
    wanted = [form for form in asked_forms(config) if form.circuit == circuit]
    reasons = {form: reason for form in wanted if (reason := why_not(stack, form))}
    found = [form for form in wanted if form not in reasons] or [Variant(circuit)]
    instead = f"; {found[0].name} is measured instead" if found[0] not in wanted else ""
    of_reason = {reason: [form.name for form in reasons if reasons[form] == reason] for reason in reasons.values()}
    return found, [f"without {', '.join(names)}: {reason}{instead}" for reason, names in of_reason.items()]


def why_not(stack: LockedStack, form: Variant) -> str | None:
    """Why a form of a stack cannot be made, or None."""
    if not needs(form):
        return None
    if stack.around is None:
        return "its lock does not pin what that follows from"
    if missing := [stack.around.missing[role] for role in needs(form) if role in stack.around.missing]:
        return missing[0]
    return "no rotary encoding turns its queries and keys" if form.offset and not stack.around.turns else None
