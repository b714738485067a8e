# Checkpoint -> query and key weights of a group of layers.
rule extract:
    input:
        extract_input,
    output:
        weights=f"{STACK}/weights/{{layers}}.pt",
        record=f"{STACK}/weights/{{layers}}.json",
    log:
        f"{JOB_LOGS}/extract/{{model}}/{{stack}}/{{layers}}.log",
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=memory_mb,
    params:
        config=identity_of("extract", "config"),
        fingerprint=identity_of("extract", "fingerprint"),
        code=identity_of("extract", "code"),
        upstream=identity_of("extract", "upstream"),
        entry=locked_entry,
        layers=extract_layers,
    message:
        "Extracting {wildcards.model}, stack {wildcards.stack}, {wildcards.layers}"
    script:
        "../scripts/extract.py"
