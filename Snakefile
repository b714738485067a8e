# headgram: query and key weights -> spectra and Gram matrices of attention heads.
from snakemake.utils import min_version

min_version("9.0")


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/extract.smk"
include: "workflow/rules/eigen.smk"
include: "workflow/rules/gram.smk"
include: "workflow/rules/merge.smk"
include: "workflow/rules/derive.smk"
include: "workflow/rules/lineage.smk"
include: "workflow/rules/composition.smk"
include: "workflow/rules/tokens.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        [final_files(model) for model in PLAN.models],
        [pair_files(*pair) for pair in PLAN.pairs],
        [PATHS.report("index.html"), RECORDS["report"], *reported_figures()]
        if PLAN.config.report.enabled
        else [],


def begin_run():
    with headgram_errors():
        if workflow.local_exec:
            require_device(PLAN.config.device)
        RUN.begin(workflow, beside_outputs)


onstart:
    begin_run()


onsuccess:
    RUN.end()


onerror:
    RUN.end()


if not IS_MAIN:
    add_handlers(workflow, begin_run, RUN.end)
