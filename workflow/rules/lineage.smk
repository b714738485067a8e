# Two models of one lineage -> what changed from the earlier to the later one, and which head became, or is like, which.
rule lineage:
    input:
        unpack(lineage_input),
    output:
        **{table: PATHS.pair_table(table, "{model}", "{other}") for table in LINEAGE},
        record=RECORDS["lineage"],
    log:
        PATHS.log("lineage", "{model}", "{other}"),
    wildcard_constraints:
        other=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=memory_mb,
    params:
        **job(
            "lineage",
            script=PAIR_STAGES[PLAN.config.lineage.basis],
            parts=pair_parts,
            entries=pair_entries,
        ),
    message:
        "Comparing {wildcards.model} with {wildcards.other}"
    script:
        JOB
