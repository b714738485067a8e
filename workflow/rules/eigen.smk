# Weights -> spectra of every head of a shard of layers.
rule eigen:
    input:
        unpack(eigen_input),
    output:
        table=PATHS.part(
            "eigen", "{model}", "{stack}", "{circuit}", "{layers}", ".parquet"
        ),
        directions=PATHS.part(
            "eigen", "{model}", "{stack}", "{circuit}", "{layers}", ".pt"
        ),
        record=RECORDS["eigen"],
    log:
        PATHS.log("eigen", "{model}", "{stack}", "{circuit}", "{layers}"),
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=memory_mb,
    params:
        **job("eigen", layers=eigen_layers),
    message:
        "Spectra of {wildcards.model}, stack {wildcards.stack}, circuit {wildcards.circuit}, {wildcards.layers}"
    script:
        JOB
