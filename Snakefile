# headgram: weights of attention heads -> spectra, inner products, compositions.
from snakemake.utils import min_version

min_version("9.0")


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/inputs.smk"
include: "workflow/rules/extract.smk"
include: "workflow/rules/around.smk"
include: "workflow/rules/eigen.smk"
include: "workflow/rules/gram.smk"
include: "workflow/rules/rotary.smk"
include: "workflow/rules/merge.smk"
include: "workflow/rules/derive.smk"
include: "workflow/rules/pairs.smk"
include: "workflow/rules/lineage.smk"
include: "workflow/rules/composition.smk"
include: "workflow/rules/tokens.smk"
include: "workflow/rules/reported.smk"
include: "workflow/rules/render.smk"
include: "workflow/rules/shell.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/final.smk"
include: "workflow/rules/handlers.smk"


rule all:
    default_target: True
    input:
        final_records(),
        final_files() if STORAGE else [],
        reported_figures() if PLAN.config.report.enabled else [],
    message:
        "Every table of this study is there"
