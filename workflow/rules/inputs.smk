# What each rule of one model reads, as functions of its wildcards.
from dataclasses import asdict

from headgram.study.plan import unpinned


def weights_of(wildcards, layers, fresh):
    """The weight files, with their records, that hold these layers; and what stands around them, if the form follows from it.

    If the artifact that is made of them is fresh, its key says that they are the same, even if they are extracted anew. So their
    dates do not count then.
    """
    groups = heads_of(wildcards).groups_of(layers)
    circuit = Variant.of(wildcards.circuit).circuit
    place = wildcards.model, wildcards.stack, circuit
    dated = ancient if fresh else str
    around = wildcards.circuit != circuit
    return {
        **(around_files(wildcards.model, dated) if around else {}),
        "weights": [
            dated(file)
            for group in groups
            for file in PATHS.data("extract", *place, group)
        ],
        "records": [dated(PATHS.record("extract", *place, group)) for group in groups],
    }


def extract_input(wildcards):
    run_if_stale("extract", wildcards)
    return []


def around_input(wildcards):
    if not model_of(wildcards).entry.pins_around:
        raise WorkflowError(unpinned(wildcards.model, Path(PLAN.config.manifest)))
    run_if_stale("around", wildcards)
    return []


def locked_entry(wildcards):
    """What the lock says of a model."""
    return model_of(wildcards).entry.model_dump(mode="json")


def extract_layers(wildcards):
    heads = heads_of(wildcards)
    digests = dict(zip(heads.stack.layers, heads.locked.digests, strict=True))
    return [[layer, digests[layer]] for layer in heads.groups[wildcards.layers]]


def eigen_layers(wildcards):
    return heads_of(wildcards).shards[wildcards.layers]


def eigen_input(wildcards):
    fresh = run_if_stale("eigen", wildcards)
    return weights_of(wildcards, eigen_layers(wildcards), fresh)


def gram_input(wildcards):
    fresh = run_if_stale("gram", wildcards)
    return weights_of(wildcards, heads_of(wildcards).row_layers(wildcards.row), fresh)


def gram_tiles(wildcards):
    heads = heads_of(wildcards)
    return {"tiles": heads.row(wildcards.row), "all_pairs": heads.all_pairs}


def merge_parts(wildcards):
    """Of every circuit and stack: their names, and the names of the eigen shards and of the Gram rows."""
    return [
        [circuit, stack, list(heads.shards), list(heads.rows)]
        for (circuit, stack), heads in model_of(wildcards).heads.items()
    ]


def part_files(wildcards, stage, suffix):
    """Files of the eigen shards or of the Gram rows of all circuits and stacks."""
    return [
        PATHS.part(stage, wildcards.model, stack, circuit, name, suffix)
        for circuit, stack, shards, rows in merge_parts(wildcards)
        for name in (shards if stage == "eigen" else rows)
    ]


def is_turned(model):
    """Whether the stage `rotary` has something to measure of a model."""
    return ("rotary", "") in PLAN.models[model].recipes


def around_files(model, dated=str):
    """What stands around the projections of a model, and its record; nothing where the lock does not pin it."""
    if not PLAN.models[model].entry.pins_around:
        return {}
    return {
        "around": dated(PATHS.around(model)),
        "around_record": dated(PATHS.record("around", model)),
    }


def rotary_input(wildcards):
    plan = model_of(wildcards)
    if not is_turned(wildcards.model):
        raise WorkflowError(
            f"The tables rotary and frequencies need the circuit qk; {unpinned(wildcards.model, Path(PLAN.config.manifest))}."
        )
    fresh = run_if_stale("rotary", wildcards)
    dated = ancient if fresh else str
    places = [("qk", stack) for stack in plan.stacks_of("qk")]
    return {
        **extracted(plan, places, dated),
        **around_files(wildcards.model, dated),
    }


def merge_input(wildcards):
    run_if_stale("merge", wildcards)
    model = wildcards.model
    turning = [PATHS.turning(model), PATHS.record("rotary", model)]
    return {
        "turning": turning if is_turned(model) else [],
        "tables": part_files(wildcards, "eigen", ".parquet")
        + part_files(wildcards, "gram", ".parquet"),
        "directions": part_files(wildcards, "eigen", ".pt"),
        "records": part_files(wildcards, "eigen", ".json")
        + part_files(wildcards, "gram", ".json"),
    }


def merged_stages(wildcards):
    """The recipes of the stages before a merge, for its record to spell out what their keys stand for: by stage, by circuit."""
    found = {}
    for (stage, circuit), each in model_of(wildcards).recipes.items():
        if stage in ("extract", "around", "eigen", "gram", "rotary"):
            found.setdefault(stage, {})[circuit] = each.described()
    return found


def derive_shards(wildcards):
    """Of every circuit and stack: their names, and the names of the eigen shards."""
    return [parts[:3] for parts in merge_parts(wildcards)]


def derive_facts(wildcards):
    """What the lock and the manifest say of a model. Its recipe covers all of it."""
    plan = model_of(wildcards)
    return {
        "architecture": plan.entry.architecture,
        "stored_dtypes": [
            [*place, heads.locked.dtype] for place, heads in plan.heads.items()
        ],
        "labels": asdict(plan.labels),
    }


def derive_input(wildcards):
    fresh = run_if_stale("derive", wildcards)
    model = wildcards.model
    return {
        "heads": PATHS.table("heads", model),
        "gram": PATHS.table("gram", model),
        "pairs": PATHS.table("pairs", model),
        "directions": PATHS.directions(model),
        "record": PATHS.record("merge", model),
        "shards": part_files(wildcards, "eigen", ".parquet"),
        "shard_files": part_files(wildcards, "eigen", ".pt")
        + part_files(wildcards, "eigen", ".json"),
        **around_files(model, ancient if fresh else str),
    }


def composition_input(wildcards):
    """The weights of both circuits, of every stack that has both."""
    plan = model_of(wildcards)
    if not plan.composed:
        raise WorkflowError(
            f"The model {wildcards.model} has no composition: it needs both circuits, and the option composition.enabled."
        )
    run_if_stale("composition", wildcards)
    places = [(circuit, stack) for stack in plan.composed for circuit in ("qk", "ov")]
    return {**extracted(plan, places), **around_files(wildcards.model)}


def extracted(plan, places, dated=str):
    """The weight files of circuits of stacks of a model, with their records."""
    groups = [
        (plan.name, stack, circuit, group)
        for circuit, stack in places
        for group in plan.extracted[circuit, stack].groups
    ]
    return {
        "weights": [
            dated(file) for group in groups for file in PATHS.data("extract", *group)
        ],
        "records": [dated(PATHS.record("extract", *group)) for group in groups],
    }


def tokens_input(wildcards):
    if not PLAN.config.tokens.enabled:
        raise WorkflowError(
            "The table tokens is asked for by the option tokens.enabled."
        )
    fresh = run_if_stale("tokens", wildcards)
    dated = ancient if fresh else str
    plan, model = model_of(wildcards), wildcards.model
    composed = {
        "channels": PATHS.table("channels", model),
        "composed": PATHS.record("composition", model),
    }
    return {
        "directions": PATHS.directions(model),
        "record": PATHS.record("merge", model),
        **extracted(plan, plan.extracted, dated),
        **around_files(model, dated),
        **(composed if plan.composed else {}),
    }
