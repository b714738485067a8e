# Checkpoint -> the two factors of every head of a group of layers, for one circuit.
rule extract:
    input:
        extract_input,
    output:
        weights=PATHS.part(
            "extract", "{model}", "{stack}", "{circuit}", "{layers}", ".pt"
        ),
        record=RECORDS["extract"],
    log:
        PATHS.log("extract", "{model}", "{stack}", "{circuit}", "{layers}"),
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=memory_mb,
    params:
        **job(
            "extract",
            entry=locked_entry,
            manifest=PLAN.config.manifest,
            layers=extract_layers,
        ),
    message:
        "Extracting {wildcards.model}, stack {wildcards.stack}, circuit {wildcards.circuit}, {wildcards.layers}"
    script:
        JOB
