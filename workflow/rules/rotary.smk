# Queries and keys, and what stands around them -> how scores depend on the offset, and on each token alone.
rule rotary:
    input:
        unpack(rotary_input),
    output:
        rotary=PATHS.table("rotary", "{model}"),
        frequencies=PATHS.table("frequencies", "{model}"),
        turning=PATHS.turning("{model}"),
        record=RECORDS["rotary"],
    log:
        PATHS.log("rotary", "{model}"),
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=memory_mb,
    params:
        **job("rotary"),
    message:
        "Scores of {wildcards.model} by offset and frequency"
    script:
        JOB
