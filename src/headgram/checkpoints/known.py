"""Checkpoints of known types: from a source to the stacks that it holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from headgram.checkpoints.checkpoint import Checkpoint
from headgram.checkpoints.declared import LONGEST_NAME, checked, declared_family
from headgram.checkpoints.dimensions import Section, find_layers, find_rules, gguf_rule, undeclared
from headgram.checkpoints.gguf_store import GgufStore
from headgram.checkpoints.opening import locate, open_store
from headgram.checkpoints.prefixes import unwrapped
from headgram.checkpoints.stack import Stack, stack_of
from headgram.checkpoints.stores import TensorStore
from headgram.checkpoints.token_tables import TokenTables, token_tables
from headgram.checkpoints.twins import as_turned
from headgram.errors import HeadgramError, door
from headgram.families.registry import Family, StackRule, family_of, family_of_gguf, final_norm

#: The two are not compared, because they may be large.
_TWO_TABLES = "embedding and unembedding are read as they are stored, though the configuration says that they are one table"


@door
def open_checkpoint(
    source: str | os.PathLike[str],
    revision: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    family: Family | None = None,
) -> Checkpoint:
    """Open a checkpoint of a known type without reading its weights.

    Parameters
    ----------
    source, revision, overrides
        As of `headgram.open_checkpoint`, which also derives layouts of unknown types.
    family
        The layout of its type, where that is not the registry's.

    Raises
    ------
    HeadgramError
        If the source cannot be found or read, its architecture is unknown, or its tensors disagree with its configuration.
    """
    given = checked(overrides or {})
    location = locate(os.fspath(source), revision, given.get("base"))
    store = open_store(location)
    remarks: tuple[str, ...] = ()
    if isinstance(store, GgufStore):
        architecture, family, stacks = _read_gguf(store, given)
        final = final_norm(family.gguf.final, architecture) if family.gguf else None
        tables = token_tables(store, ["token_embd"], ["output"], "", None, final)
    else:
        architecture, family, stated = declared_family(location, location.config(), given, family)
        config = Section(stated, architecture)
        store, remarks = unwrapped(store, family, config, given)
        rules = find_rules(store, family, config)
        if not rules:
            raise HeadgramError(
                f"a checkpoint of the family '{family.name}' should hold attention weights, but this one has none: by its "
                "configuration no layer is of a kind that has them"
            )
        found = [find_layers(store, rule, prefix, config, {} if rule.tower else given) for rule, prefix in rules]
        stacks = tuple(
            stack_of(store, rule, *each, prefix, config.of(rule)) for (rule, prefix), each in zip(rules, found, strict=True)
        )
        more = (sentence for rule, prefix in rules for sentence in undeclared(store, rule, prefix, config))
        remarks = (*remarks, *dict.fromkeys(more))
        tables = _token_tables(store, family, *rules[0], config)
        if tables.contradict:
            remarks = (*remarks, _TWO_TABLES)
    if location.base:
        remarks = (f"a LoRA adapter, merged into {location.base}", *remarks)
    if (twin := given.get("twin")) is not None:
        stacks = tuple(map(as_turned, stacks))
        remarks = (*remarks, f"random twin {twin}: every head is turned at random, and keeps its spectrum")
    return Checkpoint(location, store, architecture, stacks, tables, remarks, twin)


def _token_tables(store: TensorStore, family: Family, rule: StackRule, prefix: str, config: Section) -> TokenTables:
    stated = [tied for where in (config, config.of(rule)) if isinstance(tied := where.get("tie_word_embeddings"), bool)]
    final = final_norm(family.final, config.architecture)
    return token_tables(store, family.embedding, family.unembedding, prefix, next(iter(stated), None), final)


def _read_gguf(store: GgufStore, given: dict[str, Any]) -> tuple[str, Family, tuple[Stack, ...]]:
    architecture = str(store.metadata.get("general.architecture"))[:LONGEST_NAME]
    family = family_of(given["model_type"]) if "model_type" in given else family_of_gguf(architecture)
    rule, permuted = gguf_rule(family, architecture)
    meta = {key.removeprefix(f"{architecture}."): value for key, value in store.metadata.items()}
    found = find_layers(store, rule, "", Section(meta, architecture), given)
    section = Section(meta | _rotary_scaling(store, meta), architecture)
    stack = stack_of(store, rule, *found, "", section, permuted=permuted)
    return given.get("model_type") or architecture, family, (stack,)


def _rotary_scaling(store: GgufStore, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What scales the rotary encoding of a GGUF file, as transformers would state it: if anything, by an unknown name."""
    kind = meta.get("rope.scaling.type") or ("linear" if meta.get("rope.scale_linear") else "none")
    factors = [name for name in ("rope_freqs.weight", "rope_factors_short.weight") if name in store]
    scaled = f"the tensor {factors[0]}" if factors else f"{kind}, of a GGUF file" if kind != "none" else "default"
    return {"rope_scaling": {"rope_type": scaled}}
