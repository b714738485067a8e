# One model's part of the atlas -> what follows from it: layer pairs, layers, the model as a whole.
rule derive:
    input:
        unpack(derive_input),
    output:
        overlap=PATHS.table("overlap", "{model}"),
        neighbours=PATHS.table("neighbours", "{model}"),
        layers=PATHS.table("layers", "{model}"),
        models=PATHS.table("models", "{model}"),
        record=RECORDS["derive"],
    log:
        PATHS.log("derive", "{model}"),
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=memory_mb,
    params:
        **job("derive", shards=derive_shards, facts=derive_facts),
    message:
        "Deriving the tables of {wildcards.model}"
    script:
        JOB
