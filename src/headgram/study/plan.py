"""The plan: models, their stacks in jobs, and the recipe of every artifact.

A pure function of manifest, lock and configuration. Nothing here imports torch: the Snakefile reads this module at parse time.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import BaseModel

from headgram.errors import HeadgramError, upgrade_command
from headgram.families.registry import family_of, family_of_gguf, family_text
from headgram.forms.variants import Variant
from headgram.results.paths import RENDERED, Place, Results
from headgram.results.record import Recipe, canonical, digest
from headgram.study.forms import asked_forms, forms
from headgram.study.jobs import MOST_PAIR_FLOPS, HeadsPlan, composition_flops, plan_heads
from headgram.study.keys import code_digest, page_digest
from headgram.study.lineages import Pair, by_step, pairs
from headgram.study.lock import LockedModel
from headgram.study.manifest import Labels
from headgram.study.options import Config

#: The stage that compares two models of a lineage, by what they share.
PAIR_STAGES = {"residual": "lineage", "tokens": "token_space"}


@dataclass(frozen=True)
class ModelPlan:
    """One model of the manifest."""

    name: str
    entry: LockedModel
    labels: Labels
    heads: dict[Place, HeadsPlan]  # form by form, the stacks in the model's order
    extracted: dict[Place, HeadsPlan]  # circuit by circuit, of which the forms are made
    composed: tuple[str, ...]  # the stacks whose compositions are measured
    recipes: dict[tuple[str, str], Recipe]  # by stage and circuit, which is empty where a stage takes all

    @property
    def circuits(self) -> list[str]:
        """The circuits that are measured, each in all of its forms."""
        return list(dict.fromkeys(circuit for circuit, _ in self.heads))

    def stacks_of(self, circuit: str) -> list[str]:
        """The stacks of which a circuit is extracted."""
        return [stack for each, stack in self.extracted if each == circuit]


@dataclass(frozen=True)
class Plan:
    """Everything that the Snakefile needs to know."""

    config: Config
    models: dict[str, ModelPlan]
    pairs: list[Pair]  # of models of one lineage
    shell_code: str  # the digest of the stage that makes the page without models
    report_code: str  # that of the stage that puts models into it
    pair_code: str  # the digest of the stage that compares two models

    @property
    def lineages(self) -> dict[str, list[str]]:
        """The models of every lineage of several that share a residual basis, in the order of their steps."""
        if self.config.lineage.basis != "residual":
            return {}
        found = by_step({name: model.labels for name, model in self.models.items()})
        return {lineage: names for lineage, names in found.items() if len(names) > 1}

    @property
    def drawn_pairs(self) -> list[Pair]:
        """The pairs whose drift the page draws over the steps: of a model with its predecessor or with the first one."""
        drawn = {
            (names[i], other)
            for names in self.lineages.values()
            for i in range(1, len(names))
            for other in (names[0], names[i - 1])
        }
        return [pair for pair in self.pairs if pair in drawn]

    @property
    def shell(self) -> Recipe:
        """What the page without models follows from: code alone."""
        return Recipe("shell", canonical({}), digest(), self.shell_code)

    @property
    def report(self) -> Recipe:
        """What the page follows from: its shell, the models' names, in order, their tables, what was rendered of them, and their
        drift."""
        stages = ("merge", "derive", "render")
        upstream = [self.shell.key]
        upstream += [model.recipes[stage, ""].key for model in self.models.values() for stage in stages]
        upstream += [self.pair_recipe(pair).key for pair in self.drawn_pairs]
        return Recipe("report", canonical({}), digest(*self.models), self.report_code, tuple(upstream))

    def pair_places(self, pair: Pair) -> list[Place]:
        """The circuits and stacks that both models of a pair have, in forms as they are stored."""
        ours, theirs = (self.models[name].heads for name in pair)
        return [place for place in ours if place in theirs and place in self.models[pair[0]].extracted]

    def pair_recipe(self, pair: Pair) -> Recipe:
        """What the tables about a model and an earlier one follow from."""
        models = [self.models[name] for name in reversed(pair)]
        places = self.pair_places(pair)
        circuits = list(dict.fromkeys(circuit for circuit, _ in places))
        upstream = [
            model.recipes[stage, circuit].key for model in models for stage in ("extract", "eigen") for circuit in circuits
        ]
        options = {"export": self.config.export.model_dump(mode="json")}
        code = self.pair_code
        if self.config.lineage.basis == "tokens":
            # Embeddings are in no fingerprint: that their files are the locked ones must do.
            options["lineage"] = {"basis": "tokens"}
            code = digest(code, *(canonical([file.model_dump(mode="json") for file in model.entry.files]) for model in models))
        else:
            all_pairs = all(model.heads[place].all_pairs for model in models for place in places)
            options["gram"] = {"pairs": "all" if all_pairs else "same"}
        return Recipe("lineage", canonical(options), models[1].entry.fingerprint, code, tuple(upstream))

    def records(self) -> dict[str, str]:
        """The key of every artifact, by its record's path below the results folder."""
        paths = Results(".")
        keys = {paths.record("shell"): self.shell.key, paths.record("report"): self.report.key}
        for name, model in self.models.items():
            key = {stage: recipe.key for stage, recipe in model.recipes.items()}
            keys |= {paths.record(stage, name): found for (stage, circuit), found in key.items() if not circuit}
            parts = [("extract", place, tuple(plan.groups)) for place, plan in model.extracted.items()]
            parts += [("eigen", place, tuple(plan.shards)) for place, plan in model.heads.items()]
            parts += [("gram", place, plan.rows) for place, plan in model.heads.items()]
            for stage, (circuit, stack), names in parts:
                keys |= {paths.record(stage, name, stack, circuit, part): key[stage, circuit] for part in names}
        for pair in self.pairs:
            keys[paths.record("lineage", pair[0], name=pair[1])] = self.pair_recipe(pair).key
        return {paths.relative(path): key for path, key in keys.items()}


def left_out(plan: Plan) -> list[str]:
    """A sentence about every circuit that a model lacks, and every model of which something would cost too much."""
    absent = [
        f"{name}, stack {stack.name}: without the circuit {circuit}: {stack.missing[circuit]}"
        for name, model in plan.models.items()
        for stack in model.entry.stacks
        for circuit in plan.config.circuits
        if circuit in stack.missing
    ]
    costly = [
        f"{name}: all heads with all would cost more than {MOST_PAIR_FLOPS:.0e} operations, so heads of the same index alone "
        "are multiplied; --config 'gram={pairs: all}' multiplies all"
        for name, model in plan.models.items()
        if plan.config.gram.pairs == "auto" and not all(heads.all_pairs for heads in model.heads.values())
    ]
    uncomposed = [
        f"{name}, stack {stack}: without composition, which would cost more than {MOST_PAIR_FLOPS:.0e} operations; "
        "--config 'composition={enabled: true}' measures it"
        for name, model in plan.models.items()
        for stack in _in_both_circuits(model.extracted)
        if plan.config.composition.enabled == "auto" and stack not in model.composed
    ]
    unknown = [unpinned(name, Path(plan.config.manifest)) for name, model in plan.models.items() if not model.entry.pins_around]
    unmade = [
        f"{name}, stack {stack}: {sentence}"
        for name, model in plan.models.items()
        for (circuit, stack), heads in model.extracted.items()
        for sentence in forms(heads.stack, circuit, plan.config)[1]
    ]
    return absent + costly + uncomposed + unknown + unmade


def unpinned(model: str, manifest: Path) -> str:
    """The sentence about a model whose entry in the lock an earlier headgram wrote."""
    return (
        f"{model}: its lock does not pin the norms, biases and rotary encoding around its heads, so nothing is made of them; "
        f"`{upgrade_command(model, manifest)}` pins them"
    )


def make_plan(
    entries: Mapping[str, LockedModel], config: Config, scripts: Path, labels: Mapping[str, Labels] | None = None
) -> Plan:
    """Plan every model of the manifest, given its entry in the lock, the folder of the stages' scripts, and the models' labels.

    Raises
    ------
    HeadgramError
        If the lock holds an architecture that this version does not know, or a model has none of the circuits that are asked for.
    """
    labels = {name: (labels or {}).get(name, Labels()) for name in entries}
    models = {name: _plan_model(name, entry, labels[name], config, scripts) for name, entry in entries.items()}
    stage = PAIR_STAGES[config.lineage.basis]
    pair_code = code_digest(stage, scripts / f"{stage}.py")
    shell_code = digest(code_digest("shell", scripts / "shell.py"), page_digest())
    report_code = code_digest("report", scripts / "report.py")
    plan = Plan(config, models, pairs(labels, config.lineage.pairs), shell_code, report_code, pair_code)
    return replace(plan, pairs=[pair for pair in plan.pairs if plan.pair_places(pair)])


def _plan_model(name: str, entry: LockedModel, labels: Labels, config: Config, scripts: Path) -> ModelPlan:
    extracted: dict[Place, HeadsPlan] = {
        (circuit, stack.name): plan_heads(stack, circuit, config)
        for circuit in config.circuits
        for stack in entry.stacks
        if circuit in stack.circuits
    }
    if not extracted:
        reasons = {stack.missing[circuit] for stack in entry.stacks for circuit in config.circuits}
        raise HeadgramError(
            f"The model {name} has none of the circuits {', '.join(config.circuits)}: {'; '.join(sorted(reasons))}; "
            "give other circuits (--config 'circuits=[qk]') or remove its row."
        )
    made = {place: forms(plan.stack, place[0], config)[0] for place, plan in extracted.items()}
    each = dict.fromkeys([*asked_forms(config), *itertools.chain(*made.values())])
    order = sorted(each, key=lambda form: config.circuits.index(form.circuit))
    heads = {(form.name, place[1]): extracted[place] for form in order for place, found in made.items() if form in found}
    enabled = config.composition.enabled
    composed = tuple(
        stack
        for stack in _in_both_circuits(extracted)
        if enabled is True
        or (enabled == "auto" and composition_flops(extracted["qk", stack], extracted["ov", stack]) <= MOST_PAIR_FLOPS)
    )
    circuits, names = (list(dict.fromkeys(name for name, _ in places)) for places in (extracted, heads))
    recipes = _recipes(entry, labels, circuits, names, bool(composed), config, scripts)
    return ModelPlan(name, entry, labels, heads, extracted, composed, recipes)


def _in_both_circuits(heads: Mapping[Place, HeadsPlan]) -> list[str]:
    """The stacks of which both circuits are measured."""
    return [stack for circuit, stack in heads if circuit == "qk" and ("ov", stack) in heads]


def stage_config(stage: str, config: Config, circuit: str = "qk") -> str:
    """Canonical JSON of exactly the options that a stage reads: the contract between configuration and staleness."""
    if circuit != "qk" or Variant("qk") not in asked_forms(config):  # the original script knows no other
        config = config.model_copy(update={"original": config.original.model_copy(update={"enabled": False})})
    sections: dict[str, dict[str, BaseModel]] = {
        "extract": {"weights": config.weights},  # but for the norms, which are folded in later
        "around": {},
        "eigen": {"eigen": config.eigen, "original": config.original},
        "gram": {"gram": config.gram},
        "composition": {"composition": config.composition, "export": config.export},
        "tokens": {"tokens": config.tokens, "export": config.export},
        "merge": {"export": config.export, "original": config.original},
        "rotary": {"export": config.export},
        "derive": {"export": config.export},
        "render": {},
    }
    return canonical({name: section.model_dump(mode="json", exclude={"norm"}) for name, section in sections[stage].items()})


def _recipes(
    entry: LockedModel,
    labels: Labels,
    circuits: Sequence[str],
    names: Sequence[str],
    composed: bool,
    config: Config,
    scripts: Path,
) -> dict[tuple[str, str], Recipe]:
    """By stage and form: of `extract`, circuits; of `eigen` and `gram`, all forms by their names."""
    stages = ("extract", "around", "eigen", "gram", "rotary", "merge", "derive", "composition", "tokens", "render")
    code = {stage: code_digest(stage, scripts / f"{stage}.py") for stage in stages}
    find = family_of_gguf if entry.format == "gguf" and "model_type" not in entry.overrides else family_of
    family = entry.family.model_dump_json() if entry.family else family_text(find(entry.architecture).name)
    found: dict[tuple[str, str], Recipe] = {}

    def keys(stage: str, forms: Sequence[str] = ("",)) -> list[str]:
        """The keys of a stage's artifacts, for those of the forms that have one."""
        return [found[stage, form].key for form in forms if (stage, form) in found]

    def add(stage: str, upstream: Sequence[str], *told: str, form: str = "", fingerprint: str = entry.fingerprint) -> None:
        """Add a stage that reads artifacts of the keys `upstream`; `told` is what its jobs are told besides their options."""
        options, works = stage_config(stage, config, form or "qk"), digest(code[stage], *told) if told else code[stage]
        found[stage, form] = Recipe(stage, options, fingerprint, works, tuple(upstream))

    if entry.pins_around:
        add("around", [], family, entry.around_fingerprint())
    around = keys("around")
    for circuit in circuits:
        add("extract", [], family, form=circuit, fingerprint=entry.fingerprint_of(circuit))
    for name in names:
        circuit = Variant.of(name).circuit
        made = name != circuit  # of what is extracted, as a job reads it
        upstream = keys("extract", [circuit]) + (around if made else [])
        for stage in ("eigen", "gram"):
            add(stage, upstream, *([name] if made else []), form=name, fingerprint=entry.fingerprint_of(circuit))
    if entry.pins_around and "qk" in circuits:
        add("rotary", keys("extract", ["qk"]) + around)
    add("merge", keys("eigen", names) + keys("gram", names) + keys("rotary"))
    add("derive", keys("merge") + keys("eigen", names) + around, canonical(asdict(labels)))
    if composed:
        add("composition", keys("extract", ["qk", "ov"]) + around)
    if config.tokens.enabled:  # embeddings are in no fingerprint: that their files are the locked ones must do
        files = canonical([file.model_dump(mode="json") for file in entry.files])
        add("tokens", keys("merge") + keys("extract", circuits) + around + keys("composition"), files)
    add("render", [key for stage in ("merge", "derive", *RENDERED) for key in keys(stage)])
    return found
