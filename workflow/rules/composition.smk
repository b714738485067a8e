# Weights of both circuits -> which heads of a model write what later heads read.
rule composition:
    input:
        unpack(composition_input),
    output:
        composition=PATHS.table("composition", "{model}"),
        channels=PATHS.table("channels", "{model}"),
        kernels=PATHS.table("kernels", "{model}"),
        directions=PATHS.channel_directions("{model}"),
        record=RECORDS["composition"],
    log:
        PATHS.log("composition", "{model}"),
    priority: 1  # the longest job of a model begins first
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=memory_mb,
    params:
        **job("composition"),
    message:
        "Composition of the heads of {wildcards.model}"
    script:
        JOB
