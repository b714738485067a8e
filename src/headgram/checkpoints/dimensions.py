"""Which of a family's rules a checkpoint follows, and how many layers, heads and channels it has by its own configuration."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Self

from headgram.checkpoints.stores import TensorStore
from headgram.errors import HeadgramError
from headgram.families.around import unproven_rule
from headgram.families.layouts import LAYOUTS, QK, Dimensions, Part
from headgram.families.registry import Family, Names, StackRule

#: What configurations call the same count: two of them may not state different ones.
_SAME = (("n_head", "num_attention_heads"), ("n_layer", "num_hidden_layers"), ("n_embd", "n_embed", "hidden_size"))
#: Far more than any model has; a configuration that declares more is damaged or hostile.
_MOST_LAYERS = 10_000


class Section:
    """A checkpoint's configuration, or the section of it that a rule reads, with what it leaves unsaid.

    Parameters
    ----------
    values
        What it states.
    architecture
        The checkpoint's type.
    defaults
        What it leaves unsaid.
    """

    def __init__(self, values: Mapping[str, Any], architecture: str, defaults: Mapping[str, Any] | None = None) -> None:
        self._stated = values
        if defaults and values.get("rope_parameters", {}) is None:
            values = {name: value for name, value in values.items() if name != "rope_parameters"}
        self._values = {**(defaults or {}), **values}
        self.architecture = architecture

    def of(self, rule: StackRule) -> Self:
        """What a rule reads of the whole: its section, or all if there is none; without a configuration, no defaults either."""
        defaults = rule.defaults.get(self.architecture, {}) if self._stated else {}
        inner: Any = self._stated
        for name in rule.config.split(".") if rule.config else ():
            inner = inner.get(name) if isinstance(inner, Mapping) else None
        # What a section leaves unsaid, no other tower's count says.
        return type(self)(inner if isinstance(inner, Mapping) else self._stated, self.architecture, defaults)

    def get(self, name: str) -> Any:
        """What the configuration states, or None. `name.N` is entry `N` of a list, `a.b` is an entry of a section."""
        if name in self._values:  # names of GGUF have dots of their own
            return self._values[name]
        stated, _, place = name.rpartition(".")
        value = self._values.get(stated)
        if isinstance(value, list) and place.isdecimal():
            return value[int(place)] if int(place) < len(value) else None
        return value.get(place) if isinstance(value, Mapping) else None

    def find(self, names: Names, least: int = 1) -> int | None:
        """A whole number that the configuration states under one of the names; None if under none of them.

        Raises
        ------
        HeadgramError
            If what it states is not a whole number of at least `least`.
        """
        for name in [names] if isinstance(names, str) else names:
            value = self.get(name)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
                    raise HeadgramError(
                        f"{self.whose} has {name} = {value!r:.60}, which should be a whole number of at least {least}"
                    )
                self._check_other_names(name, value)
                return value
        return None

    def _check_other_names(self, name: str, value: int) -> None:
        """Refuse a count that is stated under two names, and differently."""
        others = next((group for group in _SAME if name in group), ())
        for other in others if name in self._stated else ():
            if self._stated.get(other) not in (None, value):
                raise HeadgramError(
                    f"{self.whose} has {name} = {value} and {other} = {self._stated[other]!r:.60}, two names of one count: "
                    "correct config.json"
                )

    def listed(self, names: Names | int) -> str | None:
        """The first of the names under which the configuration states anything, if that is a list."""
        known = (names,) if isinstance(names, str) else () if isinstance(names, int) else names
        first = next((name for name in known if self.get(name) is not None), None)
        return first if first and isinstance(self.get(first), list) else None

    def count_layers(self, names: Names) -> int | None:
        """How many layers the configuration states, as a number or as a list with an entry for each; None if it does not."""
        lists = (value for name in ([names] if isinstance(names, str) else names) if isinstance(value := self.get(name), list))
        stated = next(lists, None)
        count = self.find(names) if stated is None else len(stated)
        if count == 0:
            raise HeadgramError(f"{self.whose} declares no layers: correct config.json")
        if count is not None and count > _MOST_LAYERS:
            raise HeadgramError(f"{self.whose} declares {count:,} layers, which no real model has")
        return count

    def need(self, names: Names) -> int:
        """As `find`, but the configuration must state it.

        Raises
        ------
        HeadgramError
            If it does not.
        """
        value = self.find(names)
        if value is None:
            known = names if isinstance(names, str) else " or ".join(names)
            raise HeadgramError(
                f"{self.whose} does not state {known}: add it there, or set `heads`, `kv_heads` and `head_dim` in the manifest"
            )
        return value

    def at(self, layers: tuple[int, ...]) -> Self:
        """The configuration as it is for some layers, which must agree in what `per_layer_config` changes.

        Raises
        ------
        HeadgramError
            If they do not.
        """
        changes = self.get("per_layer_config")
        if not isinstance(changes, Mapping):
            return self
        stated = {int(key): change for key, change in changes.items() if re.fullmatch("[0-9]{1,9}", str(key))}  # also "05"
        own = [change if isinstance(change := stated.get(layer), Mapping) else {} for layer in layers]
        if any(change != own[0] for change in own):
            raise HeadgramError(
                f"{self.whose} changes layers {layers[0]} to {layers[-1]} differently, which one stack cannot hold"
            )
        return type(self)({**self._values, **own[0]}, self.architecture)

    @property
    def whose(self) -> str:
        """How an error names this configuration."""
        return f"the configuration of this '{self.architecture}' checkpoint"


def find_rules(store: TensorStore, family: Family, config: Section) -> list[tuple[StackRule, str]]:
    """Every stack that the checkpoint holds: its rule, and the prefix under which its tensors are.

    Raises
    ------
    HeadgramError
        If a stack that must be there is not, or the configuration fits none of its rules.
    """
    found: list[tuple[StackRule, str]] = []
    missing = []
    for name in dict.fromkeys(rule.name for rule in family.stacks):
        rules = [rule for rule in family.stacks if rule.name == name]
        fitting = [rule for rule in rules if all(config.of(rule).get(key) == value for key, value in rule.when.items())]
        if not fitting:
            stated = ", ".join(f"{key} = {config.of(rules[0]).get(key)!r}" for key in rules[0].when)
            raise HeadgramError(f"this '{config.architecture}' checkpoint has {stated}, a variant whose layout is not known")
        section = config.of(fitting[0])
        places = [(rule, prefix) for rule in fitting for prefix in family.prefixes if _holds_any(store, rule, prefix, section)]
        keys = {prefix + next(iter(rule.tensors(QK).values())) for rule, prefix in places}
        if len(keys) > 1:
            raise HeadgramError(
                f"the checkpoint holds the stack '{name}' more than once, as {' and '.join(sorted(keys)[:4])}: save one without "
                "the others, or set `prefix` in the manifest to what stands before the one that is meant"
            )
        if places:
            found.append(places[0])
        elif not fitting[0].layer_types or _candidates(fitting[0], section):
            missing.append(fitting[0])
    required = [rule for rule in missing if not rule.optional or not found]
    if required:
        key = first_key(required[0], config)
        stems = tuple(prefix + key.removesuffix("weight") for prefix in family.prefixes)
        instead = next((name for name in store.names() if name.startswith(stems) and not name.endswith(".bias")), None)
        raise HeadgramError(
            f"the checkpoint lacks tensor {family.prefixes[0]}{key}"
            + (
                f", and holds {instead:.200} instead: if it is quantised, `quantization_config` must name a method that is read"
                if instead
                else ", under any known prefix: if its names begin otherwise, set `prefix` in the manifest"
            )
        )
    return [(one, prefix) for rule, prefix in found for one in _by_counts(rule, config.of(rule))]


def _by_counts(rule: StackRule, section: Section) -> list[StackRule]:
    """The rule itself; if the configuration states counts of heads layer by layer, a rule for all layers of equal counts each."""
    stated = {what: section.listed(names) for what in ("heads", "kv_heads") if (names := getattr(rule, what)) is not None}
    lists = {what: name for what, name in stated.items() if name}
    if not rule.by_layer or not lists:
        return [rule]
    layers: dict[tuple[int, ...], list[int]] = {}
    for layer in range(section.count_layers(rule.layers) or 0):
        layers.setdefault(tuple(section.need(f"{name}.{layer}") for name in lists.values()), []).append(layer)
    return [
        rule.model_copy(
            update={
                "name": f"{rule.name}_{'_'.join(map(str, counts))}" if len(layers) > 1 else rule.name,
                "among": tuple(among),
                **{what: f"{name}.{among[0]}" for what, name in lists.items()},
            }
        )
        for counts, among in layers.items()
    ]


def gguf_rule(family: Family, architecture: str) -> tuple[StackRule, bool]:
    """The rule of a family in llama.cpp's naming, and whether that permutes rows.

    Raises
    ------
    HeadgramError
        If the family has none.
    """
    if family.gguf is None:
        raise HeadgramError(f"the family '{family.name}' has no known names of tensors in GGUF: use the safetensors of the model")
    rule = StackRule(
        name=family.stacks[0].name,
        layout=family.gguf.layout,
        block="blk.{layer}.",
        modules=family.gguf.modules,
        layers="block_count",
        heads="attention.head_count",
        kv_heads="attention.head_count_kv",
        hidden="embedding_length",
        head_dim="attention.key_length",
        remarks=family.stacks[0].remarks,
        around=tuple(rule for rule in family.gguf.around if architecture in rule.types or not rule.types)
        or (unproven_rule(f"it is not read from GGUF files of '{architecture}'"),),
    )
    return rule, family.gguf.permuted


def first_key(rule: StackRule, config: Section) -> str:
    """The name, below the prefix, of a tensor that a checkpoint with this stack has."""
    layer = (_candidates(rule, config.of(rule)) or [0])[0]
    return next(iter(rule.tensors(QK).values())).format(layer=layer)


def find_layers(
    store: TensorStore, rule: StackRule, prefix: str, config: Section, given: Mapping[str, Any]
) -> tuple[dict[str, str], tuple[int, ...], Dimensions]:
    """The names of a stack's tensors by what the layout calls them, the true indices of its layers, and its dimensions.

    Raises
    ------
    HeadgramError
        If the configuration does not state a count, or the checkpoint lacks a tensor of queries or keys that it should have.
    """
    section = config.of(rule)
    tensors = {role: prefix + key for role, key in rule.tensors().items()}
    needed = {role: tensors[role] for role in rule.tensors(QK)}
    layers = _layers(store, rule, needed, section)
    section = section.at(layers)
    sizes = {role: section.need(names) for role, names in rule.sizes.items()}
    share = section.need(rule.heads_over) if rule.heads_over else 1
    heads = given.get("heads") or max(section.need(rule.heads) // share, 1)
    whole = config.find(rule.heads) if rule.config == "text_config" else None
    if whole not in (None, heads) and "heads" not in given:
        raise HeadgramError(
            f"{section.whose} states {whole} heads, and {heads} in its text_config: set `heads` in the manifest to what is meant"
        )
    stated = rule.kv_heads if isinstance(rule.kv_heads, int) else rule.kv_heads and section.find(rule.kv_heads)
    kv_heads = given.get("kv_heads") or stated or heads
    hidden = section.find(rule.hidden) or _width_of(store, rule, needed, layers, Dimensions(heads, kv_heads, 1, 0, 1, 0, sizes))
    if {"nope", "rope"} <= sizes.keys():
        rank = sizes["nope"] + sizes["rope"]
    else:
        rank = given.get("head_dim") or (rule.head_dim and section.find(rule.head_dim)) or 0
        if not rank and rule.head_dim:  # elsewhere, other rows than `hidden / heads` for each head are a contradiction
            rank = _rank_of(store, rule, needed, layers, Dimensions(heads, kv_heads, 1, hidden, 1, hidden, sizes))
        rank = rank or _even_split(hidden, heads)
    value_rank = rank
    if rule.value_rank:  # without values, there are still queries and keys
        value_rank = 0 if section.find(rule.value_rank, least=0) == 0 else section.need(rule.value_rank)
    output_width = section.need(rule.output_width) if rule.output_width else hidden
    return tensors, layers, Dimensions(heads, kv_heads, rank, hidden, value_rank, output_width, sizes)


def undeclared(store: TensorStore, rule: StackRule, prefix: str, config: Section) -> list[str]:
    """A sentence if the checkpoint holds another layer than those that its configuration declares."""
    count = config.of(rule).count_layers(rule.layers)
    keys = [prefix + key for key in rule.tensors(QK).values() if "{layer}" in key]
    if count is None or not any(key.format(layer=count) in store for key in keys):
        return []
    return [
        f"not read: layer {count} of the stack '{rule.name}' and what follows it, since the configuration declares {count} layers"
    ]


def _candidates(rule: StackRule, section: Section) -> list[int] | None:
    """The layers that the configuration says are in the stack; None if it does not say."""
    count = section.count_layers(rule.layers)
    if count is None:
        if rule.sparse or rule.layer_types is not None:
            section.need(rule.layers)  # says what is missing
        return None
    kept: Iterable[int] = range(count - (section.find(rule.borrowed, least=0) or 0 if rule.borrowed else 0))
    if rule.among is not None:
        kept = [layer for layer in rule.among if layer in kept]
    if rule.layer_types is None:
        return list(kept)
    kinds = section.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != count:
        raise HeadgramError(f"{section.whose} should have a list `layer_types` of {count} entries")
    return [layer for layer in kept if kinds[layer] in rule.layer_types]


def _holds_any(store: TensorStore, rule: StackRule, prefix: str, section: Section) -> bool:
    candidates = _candidates(rule, section)
    names = [prefix + key for key in rule.tensors(QK).values()]
    return any(all(name.format(layer=layer) in store for name in names) for layer in ([0] if candidates is None else candidates))


def _layers(store: TensorStore, rule: StackRule, tensors: Mapping[str, str], section: Section) -> tuple[int, ...]:
    """The layers' indices; every tensor of every layer that the configuration declares must be there."""

    def missing(layer: int) -> list[str]:
        return [name for key in tensors.values() if (name := key.format(layer=layer)) not in store]

    if not any("{layer}" in key for key in tensors.values()):
        return (0,)
    candidates = _candidates(rule, section)
    if candidates is None:
        return tuple(itertools.takewhile(lambda layer: not missing(layer), itertools.count()))
    if rule.sparse:
        candidates = [layer for layer in candidates if len(missing(layer)) < len(tensors)]
    for layer in candidates:
        if lacking := missing(layer):
            raise HeadgramError(
                f"layer {layer}: the checkpoint lacks tensor {lacking[0]}, though its configuration declares that layer"
            )
    return tuple(candidates)


def _width_of(store: TensorStore, rule: StackRule, tensors: Mapping[str, str], layers: tuple[int, ...], unit: Dimensions) -> int:
    """The width that queries read, from the shape of a stored tensor. In `unit` it is 0, which shows the axis that holds it."""
    part = _query_part(rule)
    name, wanted = next((name, shape) for name, shape in part.shapes(unit).items() if 0 in shape)
    found = store.shape(tensors[name].format(layer=layers[0])) if layers else ()
    return found[wanted.index(0)] if len(found) == len(wanted) else 0


def _rank_of(store: TensorStore, rule: StackRule, tensors: Mapping[str, str], layers: tuple[int, ...], unit: Dimensions) -> int:
    """The rank of queries, from the shape of a stored tensor; 0 if no rank fits.

    In `unit` the rank is 1. With rank 2, the axis that holds it is twice as long, which shows the axis.
    """
    part = _query_part(rule)
    ratios = set()
    for name, twice in part.shapes(replace(unit, rank=2, value_rank=2)).items():
        once, found = part.shapes(unit)[name], store.shape(tensors[name].format(layer=layers[0])) if layers else ()
        if len(found) == len(once):
            grown = [axis for axis in range(len(once)) if once[axis] != twice[axis]]
            ratios |= {found[axis] // once[axis] for axis in grown if found[axis] % once[axis] == 0}
    return ratios.pop() if len(ratios) == 1 else 0


def _query_part(rule: StackRule) -> Part:
    return next(part for part in LAYOUTS[rule.layout] if "query" in part.gives)


def _even_split(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise HeadgramError(f"width {hidden} does not divide into {heads} heads: set `head_dim` in the manifest")
    return hidden // heads
