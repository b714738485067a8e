"""A family's data from what tiny live models show.

Attention modules are grouped into stacks, and every count of a stack is looked for in the configuration that its modules were
made with, in models of several shapes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from headgram.errors import HeadgramError
from headgram.families.registry import Family
from headgram.proofs.inputs import attention_modules
from headgram.proofs.named import PREFERRED, at_layer, name_of_count, stated
from headgram.proofs.shrink import SHAPES, classes_to_build, tiny_model
from headgram.proofs.walk import COUNTS, Found, Sighting, look_at, names_on_disk


@dataclass(frozen=True)
class _LayerSeries:
    """Attention modules of one model whose tensors' names differ in one number: the layer's."""

    names: Mapping[str, str]  # with `{layer}`
    layers: tuple[int, ...]
    one: Found
    placed: bool


def layer_series(found: Sequence[Found]) -> list[_LayerSeries]:
    """The modules of one model, grouped into series of layers."""
    groups: dict[Any, list[Found]] = defaultdict(list)
    for one in found:
        starred = tuple(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in one.names.values())
        groups[starred, one.layout, one.section, one.kind, tuple(one.counts.items()), one.notes].append(one)
    made = []
    for group in groups.values():
        numbers = [[int(part) for part in re.findall(r"(?<=\.)\d+(?=\.)", next(iter(one.names.values())))] for one in group]
        varying = [place for place in range(len(numbers[0])) if len({number[place] for number in numbers}) > 1]
        place = varying[-1] if varying else (0 if numbers[0] else None)
        parts: dict[Any, list[tuple[int, Found]]] = defaultdict(list)
        for number, one in zip(numbers, group, strict=True):
            fixed = tuple(value for at, value in enumerate(number) if at != place)
            parts[fixed].append((number[place] if place is not None else 0, one))
        for members in parts.values():
            first = members[0][1]
            names = {role: _template(name, place) for role, name in first.names.items()}
            made.append(
                _LayerSeries(names, tuple(sorted(layer for layer, _ in members)), first, any(one.placed for _, one in members))
            )
    return made


def _template(name: str, place: int | None) -> str:
    if place is None:
        return name
    matches = list(re.finditer(r"(?<=\.)\d+(?=\.)", name))
    return name[: matches[place].start()] + "{layer}" + name[matches[place].end() :] if place < len(matches) else name


def stacks_of(sightings: Sequence[Sighting]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rules of every series of layers that all models of one class have, and what stands in the way of others."""
    tables = [_table(sighting) for sighting in sightings]
    problems = [problem for sighting in sightings for problem in sighting.problems]
    rules: list[dict[str, Any]] = []
    for key in dict.fromkeys(key for table in tables for key in table):
        if any(key not in table for table in tables):
            problems.append(f"{key[0]}: not in every model")
            continue
        series = [table[key] for table in tables]
        configs = [_at(sighting.config, series[0].one.section) for sighting in sightings]
        sections = [stated(at_layer(config.to_dict(), each.layers[0])) for config, each in zip(configs, series, strict=True)]
        try:
            rules.append(_rule(series, sections, configs, key[-1]))
            rules[-1]["inner_type"] = _inner_type(sightings[0].config, series[0].one.section)
        except HeadgramError as error:
            problems.append(f"{series[0].one.module}: {error}")
    _name(rules)
    return rules, list(dict.fromkeys(problems))


def _table(sighting: Sighting) -> dict[tuple[Any, ...], _LayerSeries]:
    """The series of layers of one model, by what is the same in every model of the class.

    That is: names, layout, section, kind of attention; where layers have counts of their own, also the kinds of the layers.
    """
    table = {}
    for each in layer_series(sighting.found):
        config = _at(sighting.config, each.one.section)
        kinds = _kinds(config, each.layers) if config.to_dict().get("per_layer_config") else ()
        table[tuple(each.names.values()), each.one.layout, each.one.section, each.one.kind, kinds] = each
    return table


def _kinds(config: Any, layers: Sequence[int]) -> tuple[str, ...]:
    """What the configuration calls these layers; empty if it calls other layers so, too."""
    stated = list(getattr(config, "layer_types", None) or ())
    kinds = {stated[layer] for layer in layers if layer < len(stated)}
    return tuple(sorted(kinds)) if tuple(layer for layer, kind in enumerate(stated) if kind in kinds) == tuple(layers) else ()


def _inner_type(config: Any, path: str) -> str:
    """The type of a section that may be of any type."""
    outer, _, name = path.rpartition(".")
    made = getattr(_at(config, outer), "sub_configs", {}).get(name)
    return _at(config, path).model_type if getattr(made, "__name__", "") == "AutoConfig" else ""


def _at(config: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        config = getattr(config, name)
    return config


def _rule(
    series: Sequence[_LayerSeries], sections: Sequence[Mapping[str, Any]], configs: Sequence[Any], kinds: tuple[str, ...]
) -> dict[str, Any]:
    first = series[0]
    names = list(first.names.values())
    path = names[0]
    declared = {field.name for field in fields(type(configs[0]))}

    def named(what: str, values: Sequence[int]) -> str | None:
        return name_of_count(what, values, sections, path, declared)

    counts = {what: [each.one.counts[what] for each in series] for what in COUNTS}
    block = _common(
        [name.split("{layer}.")[0] + "{layer}." if "{layer}" in name else name.rpartition(".")[0] + "." for name in names]
    )
    rule: dict[str, Any] = {
        "layout": first.one.layout,
        "block": block,
        "modules": {role: name.removeprefix(block).removesuffix(".weight") for role, name in first.names.items()},
    }
    if not all(name.endswith(("_weight", ".weight")) and name.startswith(block) for name in names):
        raise HeadgramError(f"a tensor is called {names[0]}")
    if first.one.section:
        rule["config"] = first.one.section
    lengths = [len(config.layer_types) if kinds else len(each.layers) for config, each in zip(configs, series, strict=True)]
    whole = bool(kinds) or all(each.layers == tuple(range(len(each.layers))) for each in series)
    layers = named("layers", lengths) if whole else None
    if kinds:
        rule["layer_types"] = kinds
    if layers is None and not whole:
        rule["sparse"] = True
        layers = next(
            (name for name in PREFERRED["layers"] if all(isinstance(section.get(name), int) for section in sections)), None
        )
        if layers is None or "{layer}" not in block:
            raise HeadgramError("the configuration states no count of its layers")
    if layers is None:
        rule["layers"] = "none"  # no name states it: layers are counted
    elif layers != "num_hidden_layers":
        rule["layers"] = layers
    heads = named("heads", counts["heads"])
    if heads is None:
        raise HeadgramError(f"the configuration states no count of its {counts['heads'][0]} heads")
    if heads != "num_attention_heads":
        rule["heads"] = heads
    kv = named("kv_heads", counts["kv_heads"])
    if kv and kv != heads:
        rule["kv_heads"] = kv
    elif counts["kv_heads"] != counts["heads"]:
        if set(counts["kv_heads"]) != {1}:
            raise HeadgramError("the configuration states no count of its key heads")
        rule["kv_heads"] = 1
    hidden = named("hidden", counts["hidden"])
    if hidden != "hidden_size":
        rule["hidden"] = hidden or "none"
    rank = named("rank", counts["rank"])
    even = all(d % h == 0 and d // h == r for d, h, r in zip(counts["hidden"], counts["heads"], counts["rank"], strict=True))
    if rank:
        rule["head_dim"] = rank
    elif not even:
        if any("head_dim" in section for section in sections) or first.one.layout != "separate":
            raise HeadgramError(f"the configuration states no rank of {counts['rank'][0]}")
        rule["head_dim"] = "head_dim"  # absent, so that the rank is that of the stored rows
    if "writes" not in first.one.notes and counts["value_rank"] != counts["rank"]:
        rule["value_rank"] = named("value_rank", counts["value_rank"]) or _fail("the rank of its values")
    if counts["output_width"] != counts["hidden"]:
        rule["output_width"] = named("output_width", counts["output_width"]) or _fail("the width of its outputs")
    stated = [rule.get("layers", "num_hidden_layers"), heads, rule.get("kv_heads"), rule.get("hidden", "hidden_size"), rank]
    rule["defaults"] = {
        field.name: value for field in fields(type(configs[0])) if field.name in stated and type(value := field.default) is int
    }
    rule["at"] = first.layers[:1]
    rule["kind"], rule["notes"], rule["path"] = first.one.kind, first.one.notes, first.one.module
    rule["placed"] = any(each.placed for each in series)
    return rule


def _fail(what: str) -> Any:
    raise HeadgramError(f"the configuration does not state {what}")


def _common(blocks: Sequence[str]) -> str:
    common = blocks[0]
    for block in blocks[1:]:
        while not block.startswith(common):
            common = common.rstrip(".").rpartition(".")[0] + "."
    return common


def _name(rules: list[dict[str, Any]]) -> None:
    """Give every rule a name of its own: by its tower, its side and what it attends to."""
    for rule in rules:
        section = rule.get("config", "").rpartition(".")[2]
        tower = section.removesuffix("_config").removesuffix("_cfg")
        path = rule["block"] + rule["modules"].get("query", rule["modules"].get("fused", ""))
        side = "decoder" if "decoder" in rule["block"] else "encoder" if re.search(r"(^|\.)encoder\.", rule["block"]) else ""
        cross = rule["kind"] == "cross" or bool(re.search(r"cross|enc_?dec|encoder_attn", path.lower()))
        rule["tower"], rule["side"], rule["cross"] = tower, side, cross
    sides = {rule["side"] for rule in rules if not rule["tower"]}
    for rule in rules:
        seq = rule["tower"] == "" and len(sides) > 1
        parts = [rule["tower"]] if rule["tower"] else []
        if rule["cross"]:
            parts.append("cross")
        elif seq and rule["side"]:
            parts.append(rule["side"])
        parts += [kind.removesuffix("_attention") for kind in rule.get("layer_types", ())]
        rule["name"] = "_".join(parts) or "self"
    for name in {rule["name"] for rule in rules}:
        same = [rule for rule in rules if rule["name"] == name]
        if len(same) > 1:
            paths = [rule["block"] + next(iter(rule["modules"].values())) for rule in same]
            split = [[word for word in path.replace("{layer}", "").split(".") if word] for path in paths]
            for rule, words in zip(same, split, strict=True):
                own = [
                    f"{words[place - 1]}_{word}" if word.isdigit() else word
                    for place, word in enumerate(words)
                    if not all(word in other for other in split)
                ]
                tail = "_".join(re.sub(r"\W", "_", word) for word in own[:2]) or str(same.index(rule))
                rule["name"] = tail if name == "self" and not tail.isdigit() else f"{name}_{tail}"


_GATED = (
    "every channel is multiplied by a gate, which depends on the token, between values and outputs: W_O W_V has no fixed form, "
    "and is the circuit with all gates equal"
)
_NO_FORM = "what its heads write is no product of two tensors that the live models show"
_REMARKS = {
    "gate": _GATED,
    "norm": "a norm between values and outputs is left out, its gain and its division by the rms of what it is given",
    "norm of values": "a norm divides every head's values by their rms, which is left out",
    "sink": "a sink takes part of the softmax, so that what a head writes is scaled by one positive number per head and token",
}
_PLACES = "queries and keys read the tokens and what stands for their places; values read the tokens alone"
_CROSS = (
    "values read the encoder's stream and outputs write the decoder's, two bases: trace, symmetry and copying of W_O W_V are not "
    "defined"
)


def derive_family(model_type: str) -> tuple[Family | None, list[str]]:
    """The family that a type is derived to be, and what stands in the way of being whole; nothing of it is proven yet."""
    base, *others = classes_to_build(model_type)
    first = tiny_model(model_type, base, 0)
    sightings = [look_at(model_type, base, number) for number in range(len(SHAPES))]
    rules, problems = stacks_of(sightings)
    if not rules:
        return None, problems
    prefixes = [""]
    for other in others:
        try:
            model = tiny_model(model_type, other, 0)
            fronts = _fronts(names_on_disk(model), rules)
        except Exception:  # a class that cannot be built or saved says nothing
            continue
        if fronts and len(attention_modules(model)) == len(attention_modules(first)):
            prefixes.append(min(fronts, key=len))
        else:
            more, _ = stacks_of([look_at(model_type, other, number) for number in range(len(SHAPES))])
            for rule in more:
                known = [
                    one["block"] for one in rules if one["modules"] == rule["modules"] and rule["block"].endswith(one["block"])
                ]
                if known:
                    prefixes.append(rule["block"].removesuffix(max(known, key=len)))
                else:
                    rules.append(rule)
    data = {
        "name": re.sub(r"\W", "_", model_type),
        "model_types": (model_type,),
        "prefixes": tuple(dict.fromkeys(prefixes)),
        "stacks": tuple(_stack_rule(rule, model_type, alone=len(rules) == 1) for rule in rules),
        "walked": True,
    }
    return Family(**data), problems


def _fronts(names: Sequence[str], rules: Sequence[Mapping[str, Any]]) -> set[str]:
    """The prefixes under which a model holds the tensors of all rules."""
    ends = [end.format(layer=layer) for rule in rules for end in _tensors(rule) for layer in rule["at"]]
    return set.intersection(*({name.removesuffix(end) for name in names if name.endswith(end)} for end in ends))


def _tensors(rule: Mapping[str, Any]) -> list[str]:
    """The names of a rule's tensors below the prefix."""
    names = [rule["block"] + name for name in rule["modules"].values()]
    return [name if name.endswith("_weight") else f"{name}.weight" for name in names]


def _stack_rule(rule: Mapping[str, Any], model_type: str, alone: bool) -> dict[str, Any]:
    """A rule as the registry reads it."""
    kept = (
        "name",
        "layout",
        "block",
        "modules",
        "config",
        "layers",
        "heads",
        "kv_heads",
        "hidden",
        "head_dim",
        "value_rank",
        "output_width",
        "layer_types",
        "sparse",
    )
    made = {key: () if rule[key] == "none" else rule[key] for key in kept if key in rule}
    if not alone:
        made["optional"] = True
    if rule["inner_type"]:
        made["when"] = {"model_type": rule["inner_type"]}
    if rule["defaults"]:
        made["defaults"] = {model_type: rule["defaults"]}
    texts = [_REMARKS[note] for note in rule["notes"] if note != "writes"] + ([_CROSS] if rule["cross"] else [])
    remarks: list[dict[str, Any]] = []
    if rule["placed"]:
        remarks.append({"roles": ("query", "key"), "text": _PLACES})
    if "writes" in rule["notes"]:
        remarks.append({"roles": ("value", "output"), "text": _NO_FORM, "unproven": True})
    elif texts:
        remarks.append({"roles": ("value", "output"), "text": "; ".join(texts)})
    if remarks:
        made["remarks"] = tuple(remarks)
    return made
