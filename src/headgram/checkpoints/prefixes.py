"""What stands before a model's names in a checkpoint: of a wrapper, a training checkpoint's key, or a whole of several models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from headgram.checkpoints.dimensions import Section, find_layers, find_rules, first_key
from headgram.checkpoints.stores import TensorStore
from headgram.checkpoints.views import Renamed
from headgram.errors import HeadgramError
from headgram.families.registry import Family


def unwrapped(
    store: TensorStore, family: Family, config: Section, given: Mapping[str, Any]
) -> tuple[TensorStore, tuple[str, ...]]:
    """The store under its family's names; and a sentence if these stand behind a prefix that no family has.

    The family's own prefixes are tried first, then a prefix under which the model is whole. If it is whole under several, the
    manifest must choose.

    Raises
    ------
    HeadgramError
        If several prefixes would do, or the one that the manifest names holds nothing.
    """
    if prefix := given.get("prefix"):
        prefix = f"{prefix.removesuffix('.')}."
        inner = _under(store, prefix)
        if not inner.names():
            raise HeadgramError(f"no tensor's name begins with '{prefix:.200}', which the manifest gives as `prefix`")
        return inner, (f"the model's names begin with {prefix!r}, as the manifest says",)
    found = _prefixes(store.names(), family, config)
    try:
        find_rules(store, family, config)
    except HeadgramError:
        others = [prefix for prefix in found if prefix]
        whole = [prefix for prefix in others if _is_whole(_under(store, prefix), family, config, given)]
        if len(whole) > 1 or (not whole and len(others) > 1):
            raise HeadgramError(
                f"the checkpoint holds several models of this type, under {' and '.join(map(repr, (whole or others)[:4]))}: set "
                "`prefix` in the manifest to the one that is meant"
            ) from None
        if not others:
            raise
        prefix = (whole or others)[0]
        return _under(store, prefix), (f"the model's names begin with {prefix!r}, under which alone they are whole",)
    if others := [prefix for prefix in found if prefix]:
        return store, (f"not read, since the model is there without a prefix too: {', '.join(others)}",)
    return store, ()


def _is_whole(store: TensorStore, family: Family, config: Section, given: Mapping[str, Any]) -> bool:
    """Whether every stack that the configuration declares is there, in all its layers."""
    try:
        for rule, prefix in find_rules(store, family, config):
            find_layers(store, rule, prefix, config, given)
    except HeadgramError:
        return False
    return True


def _under(store: TensorStore, prefix: str) -> TensorStore:
    return Renamed(store, {name.removeprefix(prefix): name for name in store.names() if name.startswith(prefix)})


def _prefixes(names: Collection[str], family: Family, config: Section) -> list[str]:
    """What stands before the family's own names, of which the longest prefix counts as the family's."""
    own = sorted(family.prefixes, key=len, reverse=True)
    ends = {first_key(rule, config) for rule in family.stacks}
    before = {name.removesuffix(end) for end in ends for name in names if name.endswith(end)}
    split = [(prefix, next((known for known in own if f".{prefix}".endswith(f".{known}")), "")) for prefix in before]
    wrapped = {prefix.removesuffix(known) for prefix, known in split if known} or {prefix for prefix, _ in split}
    return sorted(prefix for prefix in wrapped if not prefix or prefix.endswith("."))
