"""Checkpoints of types that the registry does not know: opened only if a known layout is proven for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headgram.checkpoints.checkpoint import Checkpoint, open_checkpoint
from headgram.checkpoints.opening import locate
from headgram.errors import HeadgramError, UnknownTypeError
from headgram.families.registry import Family, families


def open_or_derive(
    source: str, revision: str | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[Checkpoint, str | None]:
    """Open a checkpoint; if its type is unknown, as the known type whose layout is proven for it.

    Returns
    -------
    (Checkpoint, str or None)
        The second is the known type, or None if the checkpoint's own is known.

    Raises
    ------
    HeadgramError
        As `open_checkpoint`, or if no layout is proven.
    """
    try:
        return open_checkpoint(source, revision, overrides), None
    except UnknownTypeError as error:
        known = derive(error.model_type, locate(source, revision, (overrides or {}).get("base")).config() or {})
        return open_checkpoint(source, revision, {**(overrides or {}), "model_type": known}), known


def derive(model_type: str, config: Mapping[str, Any]) -> str:
    """The known type whose layout an unknown one is proven to have, on tiny random models with the switches of `config`.

    Raises
    ------
    HeadgramError
        If transformers does not know the type, or no layout, or more than one, is proven.
    """
    from headgram.proofs.prove import adopt  # imports transformers

    flags = {key: value for key, value in config.items() if isinstance(value, bool)}
    tried = adopt(model_type, flags)
    proofs = [proof for proof in tried if proof.ok]
    if len({(proof.layouts, proof.stacks) for proof in proofs}) != 1:
        count = "more than one known layout is" if proofs else "no known layout is"
        reasons = "; ".join(f"as {proof.family}: {proof.problem:.200}" for proof in tried if proof.problem)
        raise HeadgramError(
            f"the model type '{model_type}' is not known, and {count} proven for it ({reasons or 'none has its tensors'}): set "
            "`model_type` in the manifest to a known type with the same layout if you know one, or describe its own in "
            "src/headgram/families/"
        )
    fullest = max(proofs, key=lambda proof: len(proof.roles))
    return representative(next(family for family in families() if family.name == fullest.family))


def representative(family: Family) -> str:
    """A type that stands for its family: one that lends no counts of heads to what a configuration leaves out."""
    lending = {name for rule in family.stacks for name, lent in rule.defaults.items() if "num_attention_heads" in lent}
    return next((name for name in family.model_types if name not in lending), family.model_types[0])
