# Shards and rows of one model -> its part of the atlas, and the original script's two files.
def merge_parts(wildcards):
    """Tables of the eigen shards and of the Gram rows, by stack."""
    return {
        name: {
            "shards": [f"{RESULTS}/models/{wildcards.model}/{name}/eigen/{shard}.parquet" for shard in stack.shards],
            "rows": [f"{RESULTS}/models/{wildcards.model}/{name}/gram/{row}.parquet" for row in stack.rows],
        }
        for name, stack in PLAN.models[wildcards.model].stacks.items()
    }


def merge_input(wildcards):
    run_if_stale("merge", wildcards.model, f"{RESULTS}/provenance/{wildcards.model}.json")
    shards = [path for part in merge_parts(wildcards).values() for path in part["shards"]]
    rows = [path for part in merge_parts(wildcards).values() for path in part["rows"]]
    return {
        "tables": shards + rows,
        "directions": [str(Path(path).with_suffix(".pt")) for path in shards],
        "records": [str(Path(path).with_suffix(".json")) for path in shards + rows],
    }


rule merge:
    input:
        unpack(merge_input),
    output:
        heads=f"{RESULTS}/atlas/heads/model={{model}}/heads.parquet",
        spectra=f"{RESULTS}/atlas/spectra/model={{model}}/spectra.parquet",
        gram=f"{RESULTS}/atlas/gram/model={{model}}/gram.parquet",
        directions=f"{RESULTS}/atlas/directions/{{model}}.pt",
        seed=(
            [f"{RESULTS}/seed/{{model}}.json", f"{RESULTS}/seed/{{model}}-eigdirs.pt"]
            if PLAN.config.original.enabled
            else []
        ),
        record=f"{RESULTS}/provenance/{{model}}.json",
    log:
        f"{JOB_LOGS}/merge/{{model}}.log",
    benchmark:
        f"{JOB_BENCHMARKS}/merge/{{model}}.tsv"
    threads: 1
    resources:
        mem_mb=MEMORY_MB,
    params:
        config=identity_of("merge", "config"),
        fingerprint=identity_of("merge", "fingerprint"),
        code=identity_of("merge", "code"),
        upstream=identity_of("merge", "upstream"),
        parts=lambda wildcards: canonical(merge_parts(wildcards)),
    message:
        "Merging {wildcards.model}"
    conda:
        ENVIRONMENT
    script:
        "../scripts/merge.py"
