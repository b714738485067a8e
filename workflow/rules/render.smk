# One model's part of the atlas -> its data for the page, and its figures for `snakemake --report`.
rule render:
    input:
        unpack(render_input),
    output:
        data=PATHS.report("data/{model}.js"),
        # Folders only where results are in object storage, which must know of all that it is to keep. On a disk, Snakemake would
        # empty them before a job, of strangers' files too; there the record names the files.
        layers=directory(PATHS.report("data/{model}")) if STORAGE else [],
        figures=(
            [
                report(
                    directory(PATHS.report(f"figures/{figure}/{{model}}")),
                    patterns=["{circuit}/{stack}.svg"],
                    caption=f"../report/{figure}.rst",
                    category="Models",
                    subcategory="{model}",
                    labels={
                        "circuit": "{circuit}",
                        "stack": "{stack}",
                        "picture": label,
                    },
                )
                for figure, label in STACK_FIGURES.items()
            ]
            if STORAGE
            else []
        ),
        record=RECORDS["render"],
    log:
        PATHS.log("render", "{model}"),
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=memory_mb,
    params:
        **job("render"),
    message:
        "Rendering {wildcards.model}"
    script:
        JOB
