# Shards and rows of one model -> its part of the atlas, and the original script's two files.
rule merge:
    input:
        unpack(merge_input),
    output:
        heads=PATHS.table("heads", "{model}"),
        spectra=PATHS.table("spectra", "{model}"),
        gram=PATHS.table("gram", "{model}"),
        pairs=PATHS.table("pairs", "{model}"),
        directions=PATHS.directions("{model}"),
        original=PATHS.original("{model}") if ORIGINAL else [],
        record=RECORDS["merge"],
    log:
        PATHS.log("merge", "{model}"),
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=memory_mb,
    params:
        **job("merge", parts=merge_parts, entry=locked_entry, stages=merged_stages),
    message:
        "Merging {wildcards.model}"
    script:
        JOB
