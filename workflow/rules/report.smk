# Every model's part of the atlas -> one page, and the figures of `snakemake --report`.
rule report:
    input:
        unpack(report_input),
    output:
        page=f"{REPORT}/index.html",
        data=[f"{REPORT}/data/{model}.js" for model in PLAN.models],
        figures=[
            report(
                f"{REPORT}/figures/{model}/{stack}/{figure}.svg",
                caption=f"../report/{figure}.rst",
                category="Models",
                subcategory=model,
                labels={"stack": stack, "picture": label},
            )
            for model, plan in PLAN.models.items()
            for stack in plan.stacks
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
    threads: 1
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
