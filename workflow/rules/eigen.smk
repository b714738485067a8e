# Weights -> spectra of every head of a shard of layers.
rule eigen:
    input:
        unpack(eigen_input),
    output:
        table=f"{STACK}/eigen/{{layers}}.parquet",
        directions=f"{STACK}/eigen/{{layers}}.pt",
        record=f"{STACK}/eigen/{{layers}}.json",
    log:
        f"{JOB_LOGS}/eigen/{{model}}/{{stack}}/{{layers}}.log",
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=memory_mb,
    params:
        config=identity_of("eigen", "config"),
        fingerprint=identity_of("eigen", "fingerprint"),
        code=identity_of("eigen", "code"),
        upstream=identity_of("eigen", "upstream"),
        layers=lambda wildcards: canonical(eigen_layers(wildcards)),
    message:
        "Spectra of {wildcards.model}, stack {wildcards.stack}, {wildcards.layers}"
    script:
        "../scripts/eigen.py"
