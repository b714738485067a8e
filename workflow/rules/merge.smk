# Shards and rows of one model -> its part of the atlas, and the original script's two files.
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
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=memory_mb,
    params:
        config=identity_of("merge", "config"),
        fingerprint=identity_of("merge", "fingerprint"),
        code=identity_of("merge", "code"),
        upstream=identity_of("merge", "upstream"),
        parts=lambda wildcards: canonical(merge_parts(wildcards)),
        entry=locked_entry,
        stages=stages_before("extract", "eigen", "gram"),
    message:
        "Merging {wildcards.model}"
    script:
        "../scripts/merge.py"
