# Checkpoint -> query and key weights of a group of layers.
rule extract:
    input:
        extract_input,
    output:
        weights=PATHS.part("extract", "{model}", "{stack}", "{layers}", ".pt"),
        record=RECORDS["extract"],
    log:
        PATHS.log("extract", "{model}", "{stack}", "{layers}"),
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=memory_mb,
    params:
        identity=identity_of("extract"),
        order=order_of("extract"),
        entry=locked_entry,
        layers=extract_layers,
    message:
        "Extracting {wildcards.model}, stack {wildcards.stack}, {wildcards.layers}"
    script:
        "../scripts/extract.py"
