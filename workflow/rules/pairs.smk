# What is read and written about two models of one lineage, as functions of a rule's wildcards.
from headgram.results.paths import LINEAGE
from headgram.study.plan import PAIR_STAGES


def pair_of(wildcards):
    for name in (wildcards.model, wildcards.other):
        if name not in PLAN.models:
            raise WorkflowError(
                f"The manifest has no model '{name}'; there are: {', '.join(PLAN.models)}."
            )
    return wildcards.model, wildcards.other


def pair_parts(wildcards):
    """Of the earlier model and of the later one, every circuit and stack with the names of groups and of eigen shards."""
    pair = pair_of(wildcards)
    return [
        [
            [circuit, stack, list(heads.groups), list(heads.shards)]
            for circuit, stack in PLAN.pair_places(pair)
            for heads in [PLAN.models[name].heads[circuit, stack]]
        ]
        for name in reversed(pair)
    ]


def pair_entries(wildcards):
    """The lock's entries of the earlier model and of the later one."""
    return [
        PLAN.models[name].entry.model_dump(mode="json")
        for name in reversed(pair_of(wildcards))
    ]


def lineage_input(wildcards):
    """Of both models, files of factors and of directions, with their records.

    Where what is made of them is fresh, their dates mean nothing, as in `weights_of`.
    """
    pair = pair_of(wildcards)
    fresh = run_if_stale("lineage", wildcards)
    dated = ancient if fresh else str
    found = {}
    for side, name, parts in zip(
        ("before", "after"), reversed(pair), pair_parts(wildcards), strict=True
    ):
        files, records = [], []
        for circuit, stack, groups, shards in parts:
            for stage, names in (("extract", groups), ("eigen", shards)):
                place = stage, name, stack, circuit
                files += [dated(PATHS.part(*place, each, ".pt")) for each in names]
                records += [dated(PATHS.record(*place, each)) for each in names]
        found |= {side: files, f"{side}_records": records}
    return found
