# Checkpoint -> query and key weights of a group of layers.
def extract_input(wildcards):
    run_if_stale("extract", wildcards.model, f"{stack_folder(wildcards)}/weights/{wildcards.layers}.json")
    return []


def extract_source(wildcards):
    entry = PLAN.models[wildcards.model].entry
    return canonical({"source": entry.source, "revision": entry.commit, "overrides": entry.overrides})


def extract_layers(wildcards):
    stack = stack_of(wildcards)
    digests = dict(zip(stack.stack.layers, stack.stack.digests, strict=True))
    return canonical([[layer, digests[layer]] for layer in stack.groups[wildcards.layers]])


rule extract:
    input:
        extract_input,
    output:
        weights=f"{STACK}/weights/{{layers}}.pt",
        record=f"{STACK}/weights/{{layers}}.json",
    log:
        f"{JOB_LOGS}/extract/{{model}}/{{stack}}/{{layers}}.log",
    benchmark:
        f"{JOB_BENCHMARKS}/extract/{{model}}/{{stack}}/{{layers}}.tsv"
    threads: 1
    resources:
        mem_mb=MEMORY_MB,
    params:
        config=identity_of("extract", "config"),
        fingerprint=identity_of("extract", "fingerprint"),
        code=identity_of("extract", "code"),
        upstream=identity_of("extract", "upstream"),
        source=extract_source,
        layers=extract_layers,
    message:
        "Extracting {wildcards.model}, stack {wildcards.stack}, {wildcards.layers}"
    conda:
        ENVIRONMENT
    script:
        "../scripts/extract.py"
