# A model's directions and weights, and its embeddings -> the tokens that project most on each direction; what heads do between tokens.
rule tokens:
    input:
        unpack(tokens_input),
    output:
        table=PATHS.table("tokens", "{model}"),
        paths=PATHS.table("token_paths", "{model}"),
        record=RECORDS["tokens"],
    log:
        PATHS.log("tokens", "{model}"),
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=memory_mb,
    params:
        **job("tokens", entry=locked_entry),
    message:
        "Tokens of the directions of {wildcards.model}"
    script:
        JOB
