"""The plan: models, stacks, groups of layers, shards and tiles, and the identity of every artifact.

A pure function of manifest, lock and configuration; sizes follow from dimensions and options alone, never from the
machine. Nothing here imports torch: the Snakefile reads this module at parse time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import BaseModel

from headgram.errors import HeadgramError, upgrade_command
from headgram.families.registry import family_of, family_of_gguf, family_text
from headgram.forms.variants import Variant
from headgram.geometry.costs import Sizes, cheapest, flops, spectra_flops
from headgram.results.paths import Place, Results
from headgram.results.record import Identity, canonical, digest
from headgram.study.forms import asked_forms, forms
from headgram.study.keys import code_digest, page_digest
from headgram.study.lineages import Pair, by_step, pairs
from headgram.study.lock import LockedCircuit, LockedModel, LockedStack
from headgram.study.manifest import Labels
from headgram.study.options import Config

#: What one core does, roughly; only the sizes of jobs follow from it.
_FLOPS_PER_SECOND = 40e9
#: A job should take about this long, so that starting it is noise: half a second here, three on a cluster's node.
_JOB_SECONDS = 10.0
#: The same of a tile of inner products: fewer and larger ones cost fewer operations, but a tile is also what a crash can lose.
_TILE_SECONDS = 300.0
#: Operations up to which all heads are multiplied with all heads where the options leave it open.
MOST_PAIR_FLOPS = 2e14
_STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

#: The stage that compares two models of a lineage, by what they share.
PAIR_STAGES = {"residual": "lineage", "tokens": "token_space"}

Layers = tuple[int, ...]
Keys = tuple[str, ...]


@dataclass(frozen=True)
class HeadsPlan:
    """How the layers of one circuit of a stack are cut into jobs: names and layers, in order.

    Attributes
    ----------
    all_pairs
        Whether every two heads are multiplied, or only those of the same index.
    groups
        Layers extracted together, one weights file each.
    shards
        Layers whose spectra one job measures.
    tiles
        Layers along one side of a Gram tile; tile `i` and all tiles from `i` on make row `i`.
    """

    stack: LockedStack
    locked: LockedCircuit
    all_pairs: bool
    groups: dict[str, Layers]
    shards: dict[str, Layers]
    tiles: tuple[Layers, ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows of tiles."""
        return tuple(f"row-{i:03d}" for i in range(len(self.tiles)))

    def groups_of(self, layers: Layers) -> list[str]:
        """The groups that hold any of these layers."""
        wanted = set(layers)
        return [name for name, members in self.groups.items() if wanted & set(members)]

    def row(self, name: str) -> tuple[Layers, ...]:
        """The tiles of a row: its own first, then all later ones."""
        return self.tiles[self.rows.index(name) :]

    def row_layers(self, name: str) -> Layers:
        """All layers that a row reads."""
        return tuple(layer for tile in self.row(name) for layer in tile)


@dataclass(frozen=True)
class ModelPlan:
    """One model of the manifest."""

    name: str
    entry: LockedModel
    labels: Labels
    heads: dict[Place, HeadsPlan]  # form by form, the stacks in the model's order
    extracted: dict[Place, HeadsPlan]  # circuit by circuit, of which the forms are made
    composed: tuple[str, ...]  # the stacks whose compositions are measured
    identities: dict[tuple[str, str], Identity]  # by stage and circuit, which is empty where a stage takes all

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
    report_code: str  # the digest of the stage that makes the page
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
    def report(self) -> Identity:
        """What the page follows from: the models' names, in order, their tables, what was rendered of them, and their drift."""
        stages = ("merge", "derive", "render")
        upstream = [model.identities[stage, ""].key for model in self.models.values() for stage in stages]
        upstream += [self.pair_identity(pair).key for pair in self.drawn_pairs]
        return Identity("report", canonical({}), digest(*self.models), self.report_code, tuple(upstream))

    def pair_places(self, pair: Pair) -> list[Place]:
        """The circuits and stacks that both models of a pair have, in forms as they are stored."""
        ours, theirs = (self.models[name].heads for name in pair)
        return [place for place in ours if place in theirs and place in self.models[pair[0]].extracted]

    def pair_identity(self, pair: Pair) -> Identity:
        """What the tables about a model and an earlier one follow from."""
        models = [self.models[name] for name in reversed(pair)]
        places = self.pair_places(pair)
        circuits = list(dict.fromkeys(circuit for circuit, _ in places))
        upstream = [
            model.identities[stage, circuit].key for model in models for stage in ("extract", "eigen") for circuit in circuits
        ]
        options = {"export": self.config.export.model_dump(mode="json")}
        code = self.pair_code
        if (
            self.config.lineage.basis == "tokens"
        ):  # embeddings are in no fingerprint: that their files are the locked ones must do
            options["lineage"] = {"basis": "tokens"}
            code = digest(code, *(canonical([file.model_dump(mode="json") for file in model.entry.files]) for model in models))
        else:
            all_pairs = all(model.heads[place].all_pairs for model in models for place in places)
            options["gram"] = {"pairs": "all" if all_pairs else "same"}
        return Identity("lineage", canonical(options), models[1].entry.fingerprint, code, tuple(upstream))

    def records(self) -> dict[str, str]:
        """The key of every artifact, by its record's path below the results folder."""
        paths = Results(".")
        keys = {paths.record("report"): self.report.key}
        for name, model in self.models.items():
            key = {stage: identity.key for stage, identity in model.identities.items()}
            keys |= {paths.record(stage, name): found for (stage, circuit), found in key.items() if not circuit}
            parts = [("extract", place, tuple(plan.groups)) for place, plan in model.extracted.items()]
            parts += [("eigen", place, tuple(plan.shards)) for place, plan in model.heads.items()]
            parts += [("gram", place, plan.rows) for place, plan in model.heads.items()]
            for stage, (circuit, stack), names in parts:
                keys |= {paths.record(stage, name, stack, circuit, part): key[stage, circuit] for part in names}
        for pair in self.pairs:
            keys[paths.record("lineage", pair[0], name=pair[1])] = self.pair_identity(pair).key
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
    report_code = digest(code_digest("report", scripts / "report.py"), page_digest())
    plan = Plan(config, models, pairs(labels, config.lineage.pairs), report_code, pair_code)
    return replace(plan, pairs=[pair for pair in plan.pairs if plan.pair_places(pair)])


def _plan_model(name: str, entry: LockedModel, labels: Labels, config: Config, scripts: Path) -> ModelPlan:
    extracted: dict[Place, HeadsPlan] = {
        (circuit, stack.name): _plan_heads(stack, circuit, config)
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
        or (enabled == "auto" and _composition_flops(extracted["qk", stack], extracted["ov", stack]) <= MOST_PAIR_FLOPS)
    )
    circuits, names = (list(dict.fromkeys(name for name, _ in places)) for places in (extracted, heads))
    identities = _identities(entry, labels, circuits, names, bool(composed), config, scripts)
    return ModelPlan(name, entry, labels, heads, extracted, composed, identities)


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
    }
    return canonical({name: section.model_dump(mode="json", exclude={"norm"}) for name, section in sections[stage].items()})


def _identities(
    entry: LockedModel,
    labels: Labels,
    circuits: Sequence[str],
    names: Sequence[str],
    composed: bool,
    config: Config,
    scripts: Path,
) -> dict[tuple[str, str], Identity]:
    """By stage and form: of `extract`, circuits; of `eigen` and `gram`, all forms by their names."""
    stages = ("extract", "around", "eigen", "gram", "rotary", "merge", "derive", "composition", "tokens", "render")
    code = {stage: code_digest(stage, scripts / f"{stage}.py") for stage in stages}
    find = family_of_gguf if entry.format == "gguf" and "model_type" not in entry.overrides else family_of
    family = entry.family.model_dump_json() if entry.family else family_text(find(entry.architecture).name)
    reads_weights = digest(code["extract"], family)
    found: dict[tuple[str, str], Identity] = {}
    if entry.pins_around:
        code_around = digest(code["around"], family, entry.around_fingerprint())
        found["around", ""] = Identity("around", stage_config("around", config), entry.fingerprint, code_around)
    for circuit in circuits:
        options, fingerprint = stage_config("extract", config), entry.fingerprint_of(circuit)
        found["extract", circuit] = Identity("extract", options, fingerprint, reads_weights)
    around: Keys = (found["around", ""].key,) if entry.pins_around else ()
    upstream: Keys
    for name in names:
        circuit = Variant.of(name).circuit
        fingerprint, upstream = entry.fingerprint_of(circuit), (found["extract", circuit].key,)
        made = name != circuit  # of what is extracted, as a job reads it
        upstream = upstream + around if made else upstream
        for stage in ("eigen", "gram"):
            works = digest(code[stage], name) if made else code[stage]
            found[stage, name] = Identity(stage, stage_config(stage, config, name), fingerprint, works, upstream)
    turned: Keys = ()
    if entry.pins_around and "qk" in circuits:
        upstream = (found["extract", "qk"].key, *around)
        options = stage_config("rotary", config)
        found["rotary", ""] = Identity("rotary", options, entry.fingerprint, code["rotary"], upstream)
        turned = (found["rotary", ""].key,)
    measured = {stage: tuple(found[stage, name].key for name in names) for stage in ("eigen", "gram")}
    upstream = measured["eigen"] + measured["gram"] + turned
    merge = Identity("merge", stage_config("merge", config), entry.fingerprint, code["merge"], upstream)
    writes_labels = digest(code["derive"], canonical(asdict(labels)))
    upstream = (merge.key, *measured["eigen"], *around)
    derive = Identity("derive", stage_config("derive", config), entry.fingerprint, writes_labels, upstream)
    found |= {("merge", ""): merge, ("derive", ""): derive}
    if config.tokens.enabled:  # embeddings are in no fingerprint: that their files are the locked ones must do
        reads_files = digest(code["tokens"], canonical([file.model_dump(mode="json") for file in entry.files]))
        found["tokens", ""] = Identity("tokens", stage_config("tokens", config), entry.fingerprint, reads_files, (merge.key,))
    if composed:
        upstream = (*(found["extract", circuit].key for circuit in ("qk", "ov")), *around)
        options = stage_config("composition", config)
        found["composition", ""] = Identity("composition", options, entry.fingerprint, code["composition"], upstream)
    drawn = tuple(found[stage, ""].key for stage in ("merge", "derive", "composition") if (stage, "") in found)
    found["render", ""] = Identity("render", canonical({}), entry.fingerprint, code["render"], drawn)
    return found


def _plan_heads(stack: LockedStack, circuit: str, config: Config) -> HeadsPlan:
    locked = stack.circuits[circuit]
    heads, rank, width, budget = stack.heads, locked.rank, stack.hidden, config.memory_budget
    stored = stored_bytes(locked, config)
    layer_bytes = (heads + stack.kv_heads) * rank * width * stored

    eigen_seconds = spectra_flops(heads, stack.kv_heads, rank, width) / _FLOPS_PER_SECOND
    directions = 4 * 4 * heads * min(config.eigen.topk, rank) * width
    group = budget // 4 // layer_bytes
    shard = min(_JOB_SECONDS / eigen_seconds, budget // 4 // directions)
    all_pairs = config.gram.pairs == "all" or (
        config.gram.pairs == "auto" and _tile_flops(stack, rank, len(stack.layers), True) <= MOST_PAIR_FLOPS
    )
    affordable = _TILE_SECONDS * _FLOPS_PER_SECOND
    lasting = [n for n in range(1, len(stack.layers) + 1) if _tile_flops(stack, rank, n, all_pairs) <= affordable]
    # Of one index at a time, the weights of the layers of both sides of a tile, as stored and in float32, beside products of a
    # constant size; of all heads, blocks of a constant size, and the results.
    fitting = math.isqrt(budget // 4 // 128) // heads if all_pairs else budget // 2 // (2 * 2 * rank * width * (stored + 4))
    tile = min(max(lasting, default=1), max(1, fitting))
    if config.eigen.layers_per_job != "auto":
        shard = config.eigen.layers_per_job
    if config.gram.layers_per_tile != "auto":
        tile = config.gram.layers_per_tile
    return HeadsPlan(
        stack=stack,
        locked=locked,
        all_pairs=all_pairs,
        groups=_named(_cut(stack.layers, group)),
        shards=_named(_cut(stack.layers, shard)),
        tiles=tuple(_cut(stack.layers, tile)),
    )


def stored_bytes(locked: LockedCircuit, config: Config) -> int:
    """Bytes of a number of extracted factors."""
    return {"stored": _STORED_BYTES.get(locked.dtype, 4), "bfloat16": 2, "float32": 4}[config.weights.dtype]


def _tile_flops(stack: LockedStack, rank: int, layers: int, all_pairs: bool) -> float:
    """Operations of a tile of some layers with themselves."""
    if not all_pairs:
        sizes = Sizes.unshared(layers, layers, rank, stack.hidden, same=True)
        return stack.heads * flops(cheapest(sizes), sizes)
    own, shared = layers * stack.heads, layers * stack.kv_heads
    sizes = Sizes((own, own), (shared, shared), (own, own), (rank, rank), stack.hidden, same=True)
    return flops(cheapest(sizes), sizes)


def _composition_flops(qk: HeadsPlan, ov: HeadsPlan) -> float:
    """Operations of all compositions of a stack, every head with every head: three kinds, two of them over offsets too; and of
    all kernels of spans, which are no more than twice the heads."""
    count = len(qk.stack.layers) * qk.stack.heads
    both = (count, count)
    of_kinds = [
        Sizes(both, both, both, (reading.locked.rank, ov.locked.rank), qk.stack.hidden, same=False, symmetric=True)
        for reading in (*(qk,) * (4 if _turns(qk) else 2), ov)
    ]
    spans, rank = (2 * (count + len(qk.stack.layers) * qk.stack.kv_heads),) * 2, max(qk.locked.rank, ov.locked.rank)
    of_kinds.append(Sizes(spans, spans, spans, (rank, rank), qk.stack.hidden, same=True, symmetric=True))
    return sum(flops(cheapest(sizes), sizes) for sizes in of_kinds)


def _turns(heads: HeadsPlan) -> bool:
    """Whether positions are known to turn queries and keys."""
    return heads.stack.around is not None and heads.stack.around.turns


def _cut(layers: Layers, size: float) -> list[Layers]:
    """Cut into the fewest runs of at most `size` layers, of nearly equal length."""
    count = math.ceil(len(layers) / max(1, int(size)))
    borders = [round(i * len(layers) / count) for i in range(count + 1)]
    return [layers[start:stop] for start, stop in itertools.pairwise(borders)]


def _named(runs: list[Layers]) -> dict[str, Layers]:
    return {f"layers-{run[0]:03d}-{run[-1]:03d}": run for run in runs}
