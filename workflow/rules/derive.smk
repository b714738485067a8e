# One model's part of the atlas -> what follows from it: layer pairs, layers, the model as a whole.
rule derive:
    input:
        unpack(derive_input),
    output:
        overlap=f"{RESULTS}/atlas/overlap/model={{model}}/overlap.parquet",
        neighbours=f"{RESULTS}/atlas/neighbours/model={{model}}/neighbours.parquet",
        layers=f"{RESULTS}/atlas/layers/model={{model}}/layers.parquet",
        models=f"{RESULTS}/atlas/models/model={{model}}/models.parquet",
        record=f"{RESULTS}/provenance/derived/{{model}}.json",
    log:
        f"{JOB_LOGS}/derive/{{model}}.log",
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=memory_mb,
    params:
        config=identity_of("derive", "config"),
        fingerprint=identity_of("derive", "fingerprint"),
        code=identity_of("derive", "code"),
        upstream=identity_of("derive", "upstream"),
        shards=lambda wildcards: canonical(derive_shards(wildcards)),
        facts=derive_facts,
    message:
        "Deriving the tables of {wildcards.model}"
    script:
        "../scripts/derive.py"
