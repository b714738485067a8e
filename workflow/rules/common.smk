# The plan, the folders, and what decides whether a job is stale.
import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

from headgram.results.record import canonical, has_key, is_fresh
from headgram.results.asked import check_asked_for
from headgram.results.paths import Results
from headgram.run.devices import require_device, wants_gpu
from headgram.errors import HeadgramError
from headgram.run.startup import OPTIONS, Run, add_handlers
from headgram.forms.variants import NAME as FORM
from headgram.forms.variants import Variant
from headgram.study.forms import asked_forms


@contextlib.contextmanager
def headgram_errors():
    """Bad input ends the run with one sentence, Ctrl-C without one; an exception would have Snakemake print its traceback."""
    try:
        yield
    except HeadgramError as error:
        sys.exit(f"headgram: {error}")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(
            signal.SIGINT
        )  # so that whoever started it, such as a loop in a shell, ends too


RULES = Path(workflow.current_basedir.get_path_or_uri(secret_free=True))
# Else a module of somebody's workflow, whose config/config.yaml is not ours: all options are those of `config:`.
IS_MAIN = workflow.modifier.is_main_snakefile()

with headgram_errors():
    # Not by `configfile:`, which evaluates templates, code, in the file.
    RUN = Run(
        OPTIONS if IS_MAIN else None,
        given=config,
        scripts=RULES.parent / "scripts",
        is_job=workflow.remote_exec,
        in_environments=DeploymentMethod.CONDA
        in workflow.deployment_settings.deployment_method,
    )

PLAN = RUN.plan
GPUS = int(wants_gpu(PLAN.config.device))
RESULTS = PLAN.config.results
# Where results are kept, if that is no folder (--default-storage-provider).
STORAGE = workflow.storage_registry.default_storage_provider
PATHS = Results(RESULTS)
# The original script's two files, which are about queries and keys.
ORIGINAL = PLAN.config.original.enabled and Variant("qk") in asked_forms(PLAN.config)
RECORDS = {
    stage: PATHS.record(
        stage,
        "{model}",
        "{stack}",
        "{circuit}",
        {"gram": "{row}", "lineage": "{other}"}.get(stage, "{layers}"),
    )
    for stage in (
        "extract",
        "around",
        "eigen",
        "gram",
        "rotary",
        "merge",
        "derive",
        "composition",
        "tokens",
        "lineage",
        "render",
        "shell",
        "report",
    )
}
ENVIRONMENT = "../../envs/cuda.yaml" if GPUS else "../../envs/cpu.yaml"


wildcard_constraints:
    model=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    stack=r"[a-z][a-z0-9_-]*",
    circuit=FORM,
    layers=r"layers-\d+-\d+",
    row=r"row-\d+",


def memory_mb(wildcards, attempt):
    """What a job asks for: its budget, and what its own Snakemake takes on a node; more when it is sent again."""
    return attempt * (PLAN.config.memory_budget >> 20) + 512


def model_of(wildcards):
    if wildcards.model not in PLAN.models:
        raise WorkflowError(
            f"The manifest has no model '{wildcards.model}'; there are: {', '.join(PLAN.models)}."
        )
    return PLAN.models[wildcards.model]


def heads_of(wildcards):
    """The heads of a form of a stack, or of a circuit of which forms are made."""
    plan = model_of(wildcards)
    heads = {**plan.extracted, **plan.heads}
    place = wildcards.circuit, wildcards.stack
    if place not in heads:
        known = ", ".join(f"{circuit} of {stack}" for circuit, stack in heads)
        raise WorkflowError(
            f"The model {wildcards.model} has no circuit {place[0]} of a stack '{place[1]}'; there are: {known}."
        )
    return heads[place]


def recipe(stage, wildcards):
    """The recipe of the artifact that a job of a stage makes."""
    if stage in ("shell", "report"):
        return {"shell": PLAN.shell, "report": PLAN.report}[stage]
    if stage == "lineage":
        return PLAN.pair_recipe(pair_of(wildcards))
    return model_of(wildcards).recipes[stage, wildcards.get("circuit", "")]


# What every job runs. Snakemake takes a tenth of a second to start a Python script, as long as most jobs of small models work.
JOB = "../scripts/job.sh"


def job(stage, script=None, **facts):
    """Params for `JOB`: the name of the script that does the work, and what it is told, in one JSON text.

    Facts are values, or functions of the wildcards. Snakemake does not compare what follows from inputs, and need not: the
    key decides what is stale.
    """

    def told(wildcards, input, output, threads, resources):
        return canonical(
            {
                "recipe": recipe(stage, wildcards).described(),
                "results": RESULTS,
                "record": PATHS.relative(RECORDS[stage].format(**wildcards)),
                "inputs": dict(input.items()),
                "outputs": dict(output.items()),
                "wildcards": dict(wildcards.items()),
                "threads": threads,
                "gpu": bool(resources.get("gpu", 0)),
                "facts": {
                    name: fact(wildcards) if callable(fact) else fact
                    for name, fact in facts.items()
                },
            }
        )

    return {"script": script or stage, "job": told}


def run_if_stale(stage, wildcards):
    """Have Snakemake run a job whose artifact is there, but has another key than the plan asks for.

    Called by input functions, which see every job of the DAG before it is decided which must run. Returns whether the artifact
    is there and the one that the plan asks for.
    """
    key, record = recipe(stage, wildcards).key, RECORDS[stage].format(**wildcards)
    if workflow.remote_exec:
        # On a node: whoever sent the job decided. Snakemake removes outputs before a job begins: not those of a newer run.
        with headgram_errors():
            check_asked_for(Path(RESULTS), PATHS.relative(record), key)
        return False
    if STORAGE is None:
        file = record
        there = os.path.exists(record)  # most often it is not, of thousands of jobs
        fresh = there and is_fresh(Path(record), key)
    else:
        file = str(in_storage(record).local_path())
        found = stored_has_key(record, key)
        there, fresh = found is not None, bool(found)
    if there and not fresh:
        workflow.dag.forcefiles.add(file)
    return fresh


def stored_has_key(record, key):
    """Whether a record in object storage is the one that the plan asks for; None if there is none."""
    found = in_storage(record)
    try:
        if not found.exists():
            return None
        with tempfile.TemporaryDirectory() as folder:
            found.set_local_path(Path(folder, "record.json"))
            found.retrieve_object()
            return has_key(found.local_path(), key)
    except Exception as error:
        raise WorkflowError(f"{found.query} cannot be read: {error}") from None


def in_storage(path):
    """A file of the results as an object of the default storage."""
    prefix = workflow.storage_settings.default_storage_prefix
    return STORAGE.object(f"{prefix.rstrip('/')}/{path}")
