# What the report reads and writes, and what of it `snakemake --report` shows.
import itertools

from headgram.report.names import DRAWN, PROFILE_FIGURES, STACK_FIGURES
from headgram.report.names import TABLES as REPORTED
from headgram.results.paths import RENDERED


def stack_figures(models):
    """Of every figure of these models' stacks: its file, and the names of figure, model, circuit and stack."""
    return [
        (
            PATHS.report(f"figures/{figure}/{model}/{circuit}/{stack}.svg"),
            figure,
            model,
            circuit,
            stack,
        )
        for figure in STACK_FIGURES
        for model in models
        for circuit, stack in PLAN.models[model].heads
    ]


def beside_outputs(job):
    """What a job writes besides the outputs that Snakemake knows: `render`, a figure for every stack and a file for many layers;
    `report`, a file for every lineage."""
    if RECORDS["report"] in job.output and not STORAGE:
        return [PATHS.report(f"lineages/{i}.js") for i in range(len(PLAN.lineages))]
    model = job.wildcards_dict.get("model", "")
    if RECORDS["render"].format(model=model) not in job.output or STORAGE:
        return []
    layers = [
        PATHS.report(f"data/{model}/{circuit}-{stack}-{layer}.js")
        for (circuit, stack), heads in PLAN.models[model].heads.items()
        if heads.all_pairs and heads.stack.heads * len(heads.stack.layers) > DRAWN
        for layer in heads.stack.layers
    ]
    return layers + [file for file, *_ in stack_figures([model])]


def reported_figures():
    """For `snakemake --report`: the figures of stacks that are there. No rule declares them as output, so the last rule reads them."""
    found = []
    for file, figure, model, circuit, stack in stack_figures(PLAN.models):
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


def render_input(wildcards):
    run_if_stale("render", wildcards)
    model = wildcards.model
    further = {
        stage: tables
        for stage, tables in RENDERED.items()
        if (stage, "") in model_of(wildcards).recipes
    }
    stages = ["merge", "derive", *further]
    tables = [*REPORTED, *itertools.chain(*further.values())]
    return {
        **{table: PATHS.table(table, model) for table in tables},
        "records": [PATHS.record(stage, model) for stage in stages],
    }


def shell_input(wildcards):
    run_if_stale("shell", wildcards)
    return {}


def report_input(wildcards):
    run_if_stale("report", wildcards)
    models = PLAN.models
    return {
        "shell": [PATHS.report("shell.txt"), RECORDS["shell"]],
        **{
            table: [PATHS.table(table, model) for model in models]
            for table in ("models", "layers", "heads")
        },
        "data": [PATHS.report(f"data/{model}.js") for model in models],
        "merged": [PATHS.record("merge", model) for model in models],
        "derived": [PATHS.record("derive", model) for model in models],
        "rendered": [PATHS.record("render", model) for model in models],
        "drift": [PATHS.pair_table("drift", *pair) for pair in PLAN.drawn_pairs],
        "compared": [
            PATHS.record("lineage", model, name=other)
            for model, other in PLAN.drawn_pairs
        ],
    }
