# What the report reads and writes, and what of it `snakemake --report` shows.
from headgram.report.names import DRAWN, PROFILE_FIGURES, STACK_FIGURES
from headgram.report.names import TABLES as REPORTED


def stack_figures():
    """Of every figure of a stack: its file, and the names of figure, model, circuit and stack."""
    return [
        (
            PATHS.report(f"figures/{figure}/{model}/{circuit}/{stack}.svg"),
            figure,
            model,
            circuit,
            stack,
        )
        for figure in STACK_FIGURES
        for model, plan in PLAN.models.items()
        for circuit, stack in plan.heads
    ]


def beside_outputs(job):
    """What a job writes besides the outputs that Snakemake knows: a report, a model's files.

    Snakemake remembers with every output all inputs of its job, and here both would grow with the manifest.
    """
    if RECORDS["report"] not in job.output or STORAGE:
        return []
    figures = [file for file, *_ in stack_figures()]
    layers = [
        f"{model}/{circuit}-{stack}-{layer}"
        for model, plan in PLAN.models.items()
        for (circuit, stack), heads in plan.heads.items()
        if heads.all_pairs and heads.stack.heads * len(heads.stack.layers) > DRAWN
        for layer in heads.stack.layers
    ]
    return [
        PATHS.report(f"data/{name}.js") for name in [*PLAN.models, *layers]
    ] + figures


def reported_figures():
    """For `snakemake --report`: the figures of stacks that are there. No rule's output, so that they are the last rule's input."""
    found = []
    for file, figure, model, circuit, stack in stack_figures():
        if Path(file).is_file():
            labels = {
                "circuit": circuit,
                "stack": stack,
                "picture": STACK_FIGURES[figure],
            }
            caption = f"workflow/report/{figure}.rst"
            shown = report(
                file,
                caption=caption,
                category="Models",
                subcategory=model,
                labels=labels,
            )
            found.append(shown)
    return found


def composed():
    """The models whose compositions are measured."""
    return [name for name, model in PLAN.models.items() if model.composed]


def report_input(_):
    run_if_other(PLAN.report.key, RECORDS["report"])
    return {
        "merged": [PATHS.record("merge", model) for model in PLAN.models],
        "derived": [PATHS.record("derive", model) for model in PLAN.models],
        "composition": [PATHS.table("composition", model) for model in composed()],
        "composed": [PATHS.record("composition", model) for model in composed()],
        **{
            table: [PATHS.table(table, model) for model in PLAN.models]
            for table in REPORTED
        },
    }
