# Weights -> inner products of one tile of layers with itself and all later ones.
rule gram:
    input:
        unpack(gram_input),
    output:
        table=PATHS.part("gram", "{model}", "{stack}", "{circuit}", "{row}", ".parquet"),
        record=RECORDS["gram"],
    log:
        PATHS.log("gram", "{model}", "{stack}", "{circuit}", "{row}"),
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=memory_mb,
    params:
        **job("gram", tiles=gram_tiles),
    message:
        "Gram matrix of {wildcards.model}, stack {wildcards.stack}, circuit {wildcards.circuit}, {wildcards.row}"
    script:
        JOB
