"""The registry of families: data files beside this module, read once, checked strictly."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from headgram.errors import HeadgramError, UnknownTypeError
from headgram.families.around import AroundRule, NormRule, Rule, unproven_rule
from headgram.families.layouts import LAYOUTS, QK, ROLES, extra_sizes_of, reads_of

_FOLDER = files("headgram.families")


#: A name in the checkpoint's configuration; of several, the first that it states.
Names = str | tuple[str, ...]
#: What names of tensors begin with, or modules below that; nothing in braces but the layer.
_Place = Annotated[str, Field(pattern=r"^[^{}]*(\{layer\}[^{}]*)?$", max_length=500)]


class Remark(Rule):
    """What a reader of some roles must know, or why they are not read at all."""

    roles: tuple[str, ...]
    text: str
    types: tuple[str, ...] = ()  # the model types that it is about; all of the family if there are none
    unproven: bool = False  # the roles are left out, for the reason that `text` gives

    @model_validator(mode="after")
    def _known_roles(self) -> Self:
        if unknown := set(self.roles) - set(ROLES):
            raise ValueError(f"unknown role {sorted(unknown)[0]!r}")
        if self.unproven and set(self.roles) & set(QK):
            raise ValueError("a stack without queries and keys is no stack")
        return self


class StackRule(Rule):
    """One run of attention layers: where its tensors are, and what the checkpoint's config calls its head counts.

    Rules with the same name are alternatives: the first whose `when` holds and whose tensors are there is taken.
    """

    name: str
    layout: str
    block: _Place  # what the modules' names begin with, below the prefix; `{layer}` stands for the layer's index
    modules: dict[str, _Place]  # what the layout reads -> the module below `block` that holds it, or `…_weight` itself
    leaf: Annotated[str, Field(pattern=r"^[^{}]*$")] = ".weight"  # what ends the name of a module's tensor
    config: str | None = None  # a section of the config, such as `text_config` or `a.b`, looked into before the config itself
    when: dict[str, bool | int | str] = Field(default={})  # what the config must state for this rule to apply
    layers: Names = "num_hidden_layers"  # no name at all: they are counted, or the block has no `{layer}` and is the only one
    heads: Names = "num_attention_heads"
    heads_over: Names | None = None  # the name for n, where only heads / n heads, but at least one, are attention heads
    kv_heads: Names | int | None = None  # None, or absent from the config: as many key heads as query heads
    hidden: Names = "hidden_size"  # absent from the config: the width of the tensor of queries
    head_dim: Names | None = None  # None, or absent from the config: hidden / heads
    value_rank: Names | None = None  # None: values have the rank of keys
    output_width: Names | None = None  # None: heads write to the width that they read
    sizes: dict[str, Names] = Field(default={})  # further sizes that the layout reads
    layer_types: tuple[str, ...] | None = None  # only the layers that the config's `layer_types` calls so
    borrowed: Names | None = None  # so many last layers read the keys of earlier ones, and are left out
    by_layer: bool = False  # counts of heads may be lists with an entry for every layer: one stack for all layers of equal counts
    among: tuple[int, ...] | None = None  # only these layers
    sparse: bool = False  # only some layers hold attention: those with all of the tensors
    optional: bool = False  # a checkpoint may hold another stack alone
    defaults: dict[str, dict[str, Any]] = Field(default={})  # model type -> what its published configs may leave unsaid
    remarks: tuple[Remark, ...] = ()
    tower: bool = False  # of a tower: what a manifest states about counts is not about it
    around: tuple[AroundRule, ...] = ()

    @model_validator(mode="after")
    def _known_layout(self) -> Self:
        if self.layout not in LAYOUTS:
            raise ValueError(f"unknown layout {self.layout!r}")
        if set(self.sizes) != extra_sizes_of(self.layout):
            raise ValueError(f"the layout {self.layout!r} reads the sizes {sorted(extra_sizes_of(self.layout))}")
        known, needed = reads_of(self.layout, ROLES), reads_of(self.layout, QK)
        if not needed <= set(self.modules) <= known:
            raise ValueError(f"the layout {self.layout!r} reads {sorted(known)}, and cannot do without {sorted(needed)}")
        return self

    def tensors(self, roles: tuple[str, ...] = ROLES) -> dict[str, str]:
        """What the layout reads for some roles -> key below the prefix."""
        wanted = reads_of(self.layout, roles)
        names = {tensor: self.block + name for tensor, name in self.modules.items() if tensor in wanted}
        return {tensor: name if name.endswith("_weight") else f"{name}{self.leaf}" for tensor, name in names.items()}


class FinalRule(Rule):
    """The norm between the last stream and the unembedding, below the prefix, for some types or all; none: it is not proven."""

    types: tuple[str, ...] = ()
    norm: NormRule | None = None


class GgufRule(Rule):
    """The family in llama.cpp's naming."""

    architectures: tuple[str, ...]
    layout: str = "separate"
    permuted: bool = False  # llama.cpp's converter reordered the rows of q and k
    modules: dict[str, str] = Field(default={"query": "attn_q", "key": "attn_k", "value": "attn_v", "output": "attn_output"})
    around: tuple[AroundRule, ...] = ()  # in those names; its types are architectures
    final: tuple[FinalRule, ...] = ()  # likewise


class Tower(Rule):
    """A part of a multimodal model that is a model of another type, which its section of the configuration names."""

    name: str
    config: str
    places: tuple[str, ...]  # what its tensors' names begin with, before the prefixes of its own family
    type: str | None = None  # its type, if no section describes this tower; its counts are then those of another tower's section


class Family(Rule):
    """One family of architectures.

    A family without stacks holds models whose text tower is of another type, which their config names in `text_config`, or
    models that are towers alone.
    """

    name: str
    model_types: tuple[str, ...]
    prefixes: tuple[_Place, ...] = ()  # where the base model may sit inside the checkpoint
    embedding: tuple[str, ...] = ()  # the module, below the prefix, with a row for every token; the first that is there
    unembedding: tuple[str, ...] = ("lm_head",)  # with a row for every token that is predicted, if they are not the embedding
    final: tuple[FinalRule, ...] = ()  # of several about a type, the last one says
    stacks: tuple[StackRule, ...] = ()
    gguf: GgufRule | None = None
    walked: bool = False  # written by the walk over live models
    alone: bool = True  # False: its types are towers of other models alone, with which they are proven
    towers: tuple[Tower, ...] = ()
    text: bool = True  # False: without stacks, its models have no `text_config`, and are towers alone

    def without_surroundings(self, why: str) -> Family:
        """The family's layouts alone, for a type that is not its own."""
        stacks = tuple(rule.model_copy(update={"around": (unproven_rule(why),)}) for rule in self.stacks)
        return self.model_copy(update={"stacks": stacks, "embedding": (), "final": ()})


def final_norm(rules: Iterable[FinalRule], architecture: str) -> NormRule | None:
    """What rules say of the norm before the unembedding of a type."""
    return next((rule.norm for rule in reversed(tuple(rules)) if architecture in rule.types or not rule.types), None)


@cache
def families() -> tuple[Family, ...]:
    """Every family, by name."""
    return _read("")


@cache
def others() -> tuple[Family, ...]:
    """The layouts of other programs than transformers, called by the program; held against its published code in the tests."""
    return _read("others/")


def _read(folder: str) -> tuple[Family, ...]:
    items = (_FOLDER / folder if folder else _FOLDER).iterdir()
    names = sorted(folder + item.name.removesuffix(".toml") for item in items if item.name.endswith(".toml"))
    return tuple(Family(name=name, **tomllib.loads(family_text(name))) for name in names)


def family_text(name: str) -> str:
    """A family's data file, as it is; what weights are read with it depend on every byte."""
    return (_FOLDER / f"{name}.toml").read_text(encoding="utf-8")


#: Types that a family owns for a while, to see whether it fits them.
_adopted: dict[str, Family] = {}


@contextmanager
def adopting(model_type: str, family: Family) -> Iterator[None]:
    """Let a family own a `model_type`, for as long as the context lasts."""
    _adopted[model_type] = family
    try:
        yield
    finally:
        del _adopted[model_type]


def family_of(model_type: str) -> Family:
    """The family that owns a `model_type` of transformers.

    Raises
    ------
    HeadgramError
        If no family does.
    """
    owners = {name: family for family in (*families(), *others()) for name in family.model_types} | _adopted
    if model_type in owners:
        return owners[model_type]
    raise UnknownTypeError(
        model_type,
        f"the model type '{model_type}' is not known{_nearest(model_type, owners)}; add it to a file in "
        "src/headgram/families/ or set `model_type` in the manifest to a known type with the same layout "
        f"(`headgram adopt {model_type}` looks for one)",
    )


def family_of_gguf(architecture: str) -> Family:
    """The family that owns a GGUF `general.architecture`.

    Raises
    ------
    HeadgramError
        If no family does.
    """
    owners = {name: family for family in families() if family.gguf for name in family.gguf.architectures}
    if architecture in owners:
        return owners[architecture]
    raise HeadgramError(
        f"the GGUF architecture '{architecture}' is not known{_nearest(architecture, owners)}; add it to a file in "
        "src/headgram/families/ or set `model_type` in the manifest to a known type with the same layout"
    )


def _nearest(name: str, owners: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, owners, n=1)
    return f" (the nearest known one is '{near[0]}')" if near else ""


def with_towers(family: Family, towers: tuple[Tower, ...], config: Mapping[str, Any], architecture: str) -> Family:
    """A text tower's family, and the stacks of the other towers whose types are known, under the names of those.

    `architecture` is the text tower's type, by which the defaults of all are then found.
    """
    rules = list(family.stacks)
    for tower in towers:
        section = config.get(tower.config)
        section = section if isinstance(section, Mapping) else {}
        inner = tower.type or section.get("model_type")
        owner = next((one for one in families() if inner in one.model_types), None)
        if owner is None:
            continue
        for rule in owner.stacks:
            name = tower.name if rule.name in ("self", "vision", "encoder", tower.name) else f"{tower.name}_{rule.name}"
            own = rule.defaults.get(str(inner), {})
            nested = rule.config is not None and rule.config in section
            changes = {
                "name": name,
                "config": f"{tower.config}.{rule.config}" if nested else tower.config,
                "optional": True,
                "tower": True,
                "defaults": {architecture: own} if own else {},
                "remarks": tuple(
                    remark.model_copy(update={"types": ()})
                    for remark in rule.remarks
                    if inner in remark.types or not remark.types
                ),
                "around": (),
            }
            fronts = dict.fromkeys(place + prefix for place in tower.places for prefix in owner.prefixes)
            rules += [rule.model_copy(update={**changes, "block": front + rule.block}) for front in fronts]
    return family.model_copy(update={"stacks": tuple(rules)})
