# Every model's part of the atlas -> one page, and the figures of `snakemake --report`.
rule report:
    input:
        unpack(report_input),
    output:
        page=f"{REPORT}/index.html",
        # Folders, for Snakemake remembers with every output all of the job's inputs, and both grow with the manifest.
        data=directory(f"{REPORT}/data"),
        figures=[
            report(
                directory(f"{REPORT}/figures/{figure}"),
                patterns=["{model}/{stack}.svg"],
                caption=f"../report/{figure}.rst",
                category="Models",
                subcategory="{model}",
                labels={"stack": "{stack}", "picture": label},
            )
            for figure, label in STACK_FIGURES.items()
        ],
        profiles=[
            report(
                f"{REPORT}/figures/{figure}.svg",
                caption="../report/profile.rst",
                category="Along the depth",
                labels={"column": label},
            )
            for figure, label in PROFILE_FIGURES.items()
        ],
        record=f"{REPORT}/index.json",
    log:
        f"{JOB_LOGS}/report.log",
    conda:
        ENVIRONMENT
    threads: 2
    resources:
        mem_mb=memory_mb,
    params:
        config=PLAN.report.config,
        fingerprint=PLAN.report.fingerprint,
        code=PLAN.report.code,
        upstream=canonical(PLAN.report.upstream),
        models=canonical(list(PLAN.models)),
    message:
        "Reporting on all models"
    script:
        "../scripts/report.py"
