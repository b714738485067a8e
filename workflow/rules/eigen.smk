# Weights -> spectra of every head of a shard of layers.
rule eigen:
    input:
        unpack(eigen_input),
    output:
        table=PATHS.part("eigen", "{model}", "{stack}", "{layers}", ".parquet"),
        directions=PATHS.part("eigen", "{model}", "{stack}", "{layers}", ".pt"),
        record=RECORDS["eigen"],
    log:
        PATHS.log("eigen", "{model}", "{stack}", "{layers}"),
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=memory_mb,
    params:
        identity=identity_of("eigen"),
        order=order_of("eigen"),
        layers=lambda wildcards: canonical(eigen_layers(wildcards)),
    message:
        "Spectra of {wildcards.model}, stack {wildcards.stack}, {wildcards.layers}"
    script:
        "../scripts/eigen.py"
