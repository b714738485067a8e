"""Walk over all model types of transformers: python docs/walk.py [TYPE ... | --lists | --count]

Each type that no family knows, and each that is named, is derived from tiny live models and proven, in a process of its own with
limits on time and memory. What is proven is written to src/headgram/families/; what is not is listed with the reason. The walk
goes on where it was stopped: build/walk/ has a file for every type that is done; remove one to have its type tried again.
With `--lists`, nothing is tried, and what is done is written. With `--count`, every type is built without weights, and the page
says how many of those with separate modules of queries and keys are read; that takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from headgram.errors import HeadgramError
from headgram.families.registry import Family, families
from headgram.proofs.candidates import proven_family
from headgram.proofs.inputs import looks_like_attention
from headgram.proofs.shrink import classes_to_build, model_classes, tiny_config, way_of
from headgram.study.options_docs import renewed

ROOT = Path(__file__).parents[1]
FAMILIES = ROOT / "src" / "headgram" / "families"
PAGE = ROOT / "docs" / "families.md"
DONE = ROOT / "build" / "walk"
_SECONDS, _BYTES = 120, 8 << 30


def outcome(model_type: str) -> dict[str, Any]:
    """What the walk makes of one type: a family's data if it is proven, or what stands in the way."""
    try:
        family = proven_family(model_type)
    except HeadgramError as error:
        return {"problems": [str(error)]}
    return {"family": family.model_dump(mode="json", exclude_defaults=True)}


def apart(model_type: str) -> dict[str, Any]:
    """As `outcome`, in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        signal.alarm(4 * _SECONDS)
        with os.fdopen(write, "w") as file:
            json.dump(outcome(model_type), file)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    return json.loads(said) if said and not status else {"problems": [f"takes more than {_SECONDS} s or {_BYTES >> 30} GiB"]}


def merged(group: Sequence[Family]) -> Family:
    """One family of several whose rules are the same."""
    first = min(group, key=lambda family: family.name)
    rules = []
    for place, rule in enumerate(first.stacks):
        defaults = {name: value for family in group for name, value in family.stacks[place].defaults.items()}
        rules.append(rule.model_copy(update={"defaults": dict(sorted(defaults.items()))}))
    return first.model_copy(
        update={
            "model_types": tuple(sorted(name for family in group for name in family.model_types)),
            "prefixes": tuple(
                sorted({prefix for family in group for prefix in family.prefixes}, key=lambda one: (len(one), one))
            ),
            "stacks": tuple(rules),
        }
    )


def written(family: Family) -> str:
    """The data file of a family."""
    lines = ["# Written by the walk over live models (`make walk`).", f"model_types = {_toml(family.model_types)}"]
    lines += [f"prefixes = {_toml(family.prefixes)}", "walked = true"]
    for rule in family.stacks:
        lines += ["", "[[stacks]]"]
        values = rule.model_dump(mode="json", exclude_defaults=True)
        remarks, defaults = values.pop("remarks", ()), values.pop("defaults", {})
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
        if defaults:
            lines += ["", "[stacks.defaults]", *(f"{_key(key)} = {_toml(value)}" for key, value in defaults.items())]
        for remark in remarks:
            lines += ["", "[[stacks.remarks]]", *(f"{key} = {_toml(value)}" for key, value in remark.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[\w-]+", key) else json.dumps(key)


def write_families(results: dict[str, dict[str, Any]]) -> None:
    """One file for all types whose data agree but for prefixes and defaults."""
    groups: dict[str, list[Family]] = defaultdict(list)
    for result in results.values():
        if "family" in result:
            family = Family(**result["family"])
            rules = [rule.model_copy(update={"defaults": {}}).model_dump(mode="json") for rule in family.stacks]
            groups[json.dumps(rules)].append(family)
    for path in FAMILIES.glob("*.toml"):
        if "\nwalked = true\n" in path.read_text(encoding="utf-8"):
            path.unlink()
    for group in groups.values():
        family = merged(group)
        (FAMILIES / f"{family.name}.toml").write_text(written(family), encoding="utf-8")


def kept() -> dict[str, dict[str, Any]]:
    """What earlier walks have written: the data of every type by itself."""
    found = {}
    for family in families():
        for name in family.model_types if family.walked else ():
            stacks = tuple(
                rule.model_copy(update={"defaults": {name: rule.defaults[name]} if name in rule.defaults else {}})
                for rule in family.stacks
            )
            own = family.model_copy(update={"model_types": (name,), "stacks": stacks})
            found[name] = {"family": own.model_dump(mode="json", exclude_defaults=True)}
    return found


#: A module that makes queries, and one that makes keys, by their names.
_TWO = (r"^(to_)?q(uery|_?proj|_?lin|_head)?(_proj|_proj_\w+)?$", r"^(to_)?k(ey|_?proj|_?lin|_head)?(_proj|_proj_\w+)?$")
#: What an attention that is not softmax(q k^T) v says of itself.
_OTHER_KIND = ("no attention module was found",)
_NO_MODEL = "transformers has no model of this type alone"


def lists(results: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of the three lists: what is proven, what is not softmax attention, and what is not yet proven."""
    walked = {name: family for family in families.__wrapped__() if family.walked for name in family.model_types}
    proven = [
        (f"`{name}`", family.name, ", ".join(dict.fromkeys(rule.name for rule in family.stacks)))
        for name, family in walked.items()
    ]
    rest = {name: result["problems"] for name, result in results.items() if name not in walked and "problems" in result}
    rest = {name: problems for name, problems in rest.items() if problems[0] != _NO_MODEL}
    other = sorted(name for name, problems in rest.items() if problems[0] in _OTHER_KIND)
    later = sorted((f"`{name}`", _cell(problems[0])) for name, problems in rest.items() if name not in other)
    by_hand = sum(
        name in CONFIG_MAPPING for family in families() if family.alone and not family.walked for name in family.model_types
    )
    unbuilt = sum("cannot be built small" in problem for _, problem in later)
    whole = by_hand + len(proven)
    return [
        f"Of {whole + len(later)} model types of transformers with softmax attention, {whole} are proven: {by_hand} described by "
        f"hand, {len(proven)} derived by the walk. Of the others, {unbuilt} cannot be built small here.",
        "",
        f"Proven, besides the types above: {len(proven)}.",
        "",
        *_table(("model type", "family", "stacks"), sorted(proven)),
        "",
        f"Not softmax attention, {len(other)}: {', '.join(f'`{name}`' for name in other)}.",
        "",
        f"Not yet, {len(later)}:",
        "",
        *_table(("model type", "what stands in the way"), later),
    ]


def has_separate_modules(model_type: str) -> bool:
    """Whether a tiny model of a type can be built, and has attention whose queries and keys are made by two modules."""
    try:
        base, way = classes_to_build(model_type)[0], way_of(model_type)
        with torch.device("meta"):
            model: Any = base(tiny_config(model_type, 0, way))
    except Exception:  # whatever transformers raises
        return False
    return any(
        looks_like_attention(module) and all(any(re.search(one, name) for name in dict(module.named_children())) for one in _TWO)
        for module in model.modules()
    )


def count() -> list[str]:
    """How many of the types with separate modules of queries and keys are read, and which are not."""
    known = {name for family in families() for name in family.model_types}
    found = [name for name in CONFIG_MAPPING if has_separate_modules(name)]
    none = [name for name in found if name not in known]
    return [
        f"Of {len(found)} model types that can be built small and make queries and keys by two modules, {len(found) - len(none)} "
        f"are read, and {len(none)} not: {', '.join(f'`{name}`' for name in none)}."
    ]


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "").replace(">", "")[:200].strip()


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)]


def main(asked: list[str]) -> None:
    """Walk, then write the families and print the lists."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    if asked == ["--count"]:
        counted = count()
        PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), "count", "walk", counted), encoding="utf-8")
        return
    DONE.mkdir(parents=True, exist_ok=True)
    by_hand = {name for family in families() if not family.walked for name in family.model_types}
    known = kept()
    for model_type in (
        [] if asked == ["--lists"] else asked or [name for name in CONFIG_MAPPING if name not in {*by_hand, *known}]
    ):
        path = DONE / f"{model_type}.json"
        if path.exists() and not asked:
            continue
        classes: list[type] = []
        with suppress(Exception):
            classes = model_classes(model_type)
        result = apart(model_type) if classes else {"problems": ["transformers has no model of this type alone"]}
        path.write_text(json.dumps(result), encoding="utf-8")
        print(model_type, "proven" if "family" in result else result["problems"][0], flush=True)
    done = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(DONE.glob("*.json"))}
    results = done | {name: data for name, data in known.items() if "family" not in done.get(name, {})}
    write_families({name: result for name, result in results.items() if name not in by_hand})
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), "walk", "walk", lists(results)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
