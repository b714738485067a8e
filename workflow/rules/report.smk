# Every model's part of the atlas -> one page, and the figures of `snakemake --report`.
rule report:
    input:
        unpack(report_input),
    output:
        page=PATHS.report("index.html"),
        # Folders only where results are in object storage, which must know of all that it is to keep. On a disk, Snakemake would
        # empty them before a job, of strangers' files too; there the record names the files.
        data=directory(PATHS.report("data")) if STORAGE else [],
        figures=(
            [
                report(
                    directory(PATHS.report(f"figures/{figure}")),
                    patterns=["{model}/{circuit}/{stack}.svg"],
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
        profiles=[
            report(
                PATHS.report(f"figures/{figure}.svg"),
                caption="../report/profile.rst",
                category="Along the depth",
                labels={"column": label},
            )
            for figure, label in PROFILE_FIGURES.items()
        ],
        record=RECORDS["report"],
    log:
        PATHS.log("report"),
    conda:
        ENVIRONMENT
    threads: 2
    resources:
        mem_mb=memory_mb,
    params:
        identity=canonical(PLAN.report.described()),
        order=order_of("report"),
        models=canonical(list(PLAN.models)),
        composed=canonical(composed()),
    message:
        "Reporting on all models"
    script:
        "../scripts/report.py"
