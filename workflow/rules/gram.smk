# Weights -> inner products of one tile of layers with itself and all later ones.
rule gram:
    input:
        unpack(gram_input),
    output:
        table=f"{STACK}/gram/{{row}}.parquet",
        record=f"{STACK}/gram/{{row}}.json",
    log:
        f"{JOB_LOGS}/gram/{{model}}/{{stack}}/{{row}}.log",
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=memory_mb,
    params:
        config=identity_of("gram", "config"),
        fingerprint=identity_of("gram", "fingerprint"),
        code=identity_of("gram", "code"),
        upstream=identity_of("gram", "upstream"),
        tiles=lambda wildcards: canonical(stack_of(wildcards).row(wildcards.row)),
    message:
        "Gram matrix of {wildcards.model}, stack {wildcards.stack}, {wildcards.row}"
    script:
        "../scripts/gram.py"
