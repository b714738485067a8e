# What a study is to have in the end.
from headgram.results.paths import COMPOSED, DERIVED, MERGED


def final_stages(model):
    """The stages whose files a user reads, of a model."""
    stages = ("merge", "derive", *RENDERED)
    return [stage for stage in stages if (stage, "") in PLAN.models[model].recipes]


def final_records():
    """The records of all that a user reads. A lost one is made again by its job."""
    of_models = [
        PATHS.record(stage, model)
        for model in PLAN.models
        for stage in final_stages(model)
    ]
    of_pairs = [
        PATHS.record("lineage", model, name=other) for model, other in PLAN.pairs
    ]
    return (
        of_models
        + of_pairs
        + ([RECORDS["report"]] if PLAN.config.report.enabled else [])
    )


def final_files():
    """The files of the records that `final_records` means. On a disk, a record tells whether its files are there (`is_fresh`);
    Snakemake looks for those in object storage."""
    found = [PATHS.report("index.html")] if PLAN.config.report.enabled else []
    for pair in PLAN.pairs:
        found += [PATHS.pair_table(table, *pair) for table in LINEAGE]
    for model in PLAN.models:
        stages = final_stages(model)
        tables = [*MERGED, *DERIVED]
        for stage in stages[2:]:
            tables += COMPOSED if stage == "composition" else RENDERED[stage]
        found += [PATHS.table(table, model) for table in tables]
        found += [PATHS.directions(model), *(PATHS.original(model) if ORIGINAL else [])]
        found += [PATHS.channel_directions(model)] if "composition" in stages else []
    return found
