# Checkpoint -> what stands around the projections of every layer: norms, biases, rotary encoding, scale and bound of scores.
rule around:
    input:
        around_input,
    output:
        around=PATHS.around("{model}"),
        record=RECORDS["around"],
    log:
        PATHS.log("around", "{model}"),
    priority: 1  # the longest job of a model, composition, waits for it
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=memory_mb,
    params:
        **job("around", entry=locked_entry, manifest=PLAN.config.manifest),
    message:
        "Reading what stands around the projections of {wildcards.model}"
    script:
        JOB
