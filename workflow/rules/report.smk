# What was rendered of every model -> one page, and the figures of all models for `snakemake --report`.
rule report:
    input:
        unpack(report_input),
    output:
        page=PATHS.report("index.html"),
        profiles=[
            report(
                PATHS.report(f"figures/{figure}.svg"),
                caption="../report/profile.rst",
                category="Along the depth",
                labels={"column": label},
            )
            for figure, label in PROFILE_FIGURES.items()
        ],
        # As in `render`.
        lineages=(
            directory(PATHS.report("lineages")) if STORAGE and PLAN.lineages else []
        ),
        record=RECORDS["report"],
    log:
        PATHS.log("report"),
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=memory_mb,
    params:
        **job(
            "report",
            models=list(PLAN.models),
            lineages=PLAN.lineages,
            pairs=PLAN.drawn_pairs,
        ),
    message:
        "Reporting on all models"
    script:
        JOB
