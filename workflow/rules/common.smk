# The plan, the folders, and what each rule reads, as functions of its wildcards.
import contextlib
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from snakemake.exceptions import WorkflowError

from headgram.results.record import canonical, has_key, is_fresh
from headgram.results.asked import check_asked_for
from headgram.results.paths import COMPOSED, DERIVED, MERGED, TURNED, Results
from headgram.run.devices import require_device, wants_gpu
from headgram.errors import HeadgramError
from headgram.run.startup import OPTIONS, Run, add_handlers
from headgram.forms.variants import NAME as FORM
from headgram.forms.variants import Variant
from headgram.study.forms import asked_forms
from headgram.study.plan import unpinned


@contextlib.contextmanager
def headgram_errors():
    """Bad input ends the run with one sentence; an exception would have Snakemake print its traceback."""
    try:
        yield
    except HeadgramError as error:
        sys.exit(f"headgram: {error}")


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
    )

PLAN = RUN.plan
GPUS = int(wants_gpu(PLAN.config.device))
RESULTS = PLAN.config.results
# Where results are kept, if that is no folder (--default-storage-provider).
STORAGE = workflow.storage_registry.default_storage_provider
PATHS = Results(RESULTS)
# The original script's two files, which are about queries and keys.
ORIGINAL = PLAN.config.original.enabled and Variant("qk") in asked_forms(PLAN.config)
TABLES = (*MERGED, *DERIVED)
RECORDS = {
    stage: PATHS.record(
        stage,
        "{model}",
        "{stack}",
        "{circuit}",
        "{row}" if stage == "gram" else "{layers}",
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
        "render",
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


def identity(stage, wildcards):
    """The identity of a stage's artifacts of a model, and of a circuit where the stage takes one."""
    return model_of(wildcards).identities[stage, wildcards.get("circuit", "")]


def identity_of(stage):
    """A param of a rule: the identity of its artifacts, which decides what is stale."""
    return lambda wildcards: canonical(identity(stage, wildcards).described())


def order_of(stage):
    """A param of a rule: the results folder, and the record that a job writes there, for it to see what is still asked for."""

    def param(wildcards):
        return canonical([RESULTS, PATHS.relative(RECORDS[stage].format(**wildcards))])

    return param


def stages_before(*stages):
    """A param of a rule: the identities of earlier stages, for its record to spell out what their keys stand for."""

    def param(wildcards):
        identities = model_of(wildcards).identities
        return canonical(
            {
                stage: {
                    circuit: found.described()
                    for (each, circuit), found in identities.items()
                    if each == stage
                }
                for stage in stages
            }
        )

    return param


def run_if_stale(stage, wildcards):
    """Have Snakemake run a job whose artifact is there but belongs to another identity.

    Snakemake compares params with what it remembers in `.snakemake`; the artifact's own record also holds where that
    memory is lost. Called by input functions, which see every job of the DAG before it is decided which must run.
    """
    return run_if_other(
        identity(stage, wildcards).key, RECORDS[stage].format(**wildcards)
    )


def run_if_other(key, record):
    """As `run_if_stale`; returns whether the artifact is there and the one that the plan asks for."""
    if workflow.remote_exec:
        # On a node: whoever sent the job decided. Snakemake removes outputs before a job begins: not those of a newer run.
        with headgram_errors():
            check_asked_for(Path(RESULTS), PATHS.relative(record), key)
        return False
    if STORAGE is None:
        file = record
        there, fresh = Path(record).exists(), is_fresh(Path(record), key)
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


def weights_of(wildcards, layers, fresh):
    """The weight files, with their records, that hold these layers; and what stands around them, if the form follows from it.

    Where what is made of them is fresh, their dates mean nothing: weights that are extracted anew are the same then.
    """
    groups = heads_of(wildcards).groups_of(layers)
    circuit = Variant.of(wildcards.circuit).circuit
    place = wildcards.model, wildcards.stack, circuit
    dated = ancient if fresh else str
    around = wildcards.circuit != circuit
    return {
        **(around_files(wildcards.model, dated) if around else {}),
        "weights": [
            dated(file)
            for group in groups
            for file in PATHS.data("extract", *place, group)
        ],
        "records": [dated(PATHS.record("extract", *place, group)) for group in groups],
    }


def final_files(model):
    """All files that a user reads of a model, and their records."""
    files = [PATHS.table(table, model) for table in TABLES]
    files += [PATHS.directions(model)]
    files += [PATHS.record(stage, model) for stage in ("merge", "derive")]
    if PLAN.models[model].composed:
        files += [PATHS.table(table, model) for table in COMPOSED]
        files += [PATHS.channel_directions(model), PATHS.record("composition", model)]
    if is_turned(model):
        files += [PATHS.table(table, model) for table in TURNED]
        files += [PATHS.record("rotary", model)]
    if PLAN.config.tokens.enabled:
        files += [PATHS.table("tokens", model), PATHS.record("tokens", model)]
    return files + (PATHS.original(model) if ORIGINAL else [])


def extract_input(wildcards):
    run_if_stale("extract", wildcards)
    return []


def around_input(wildcards):
    if not model_of(wildcards).entry.pins_around:
        raise WorkflowError(unpinned(wildcards.model))
    run_if_stale("around", wildcards)
    return []


def locked_entry(wildcards):
    """A param of a rule: the lock's entry. Snakemake does not compare such objects, and need not.

    What a source holds is in the fingerprint; where it lies decides nothing.
    """
    return model_of(wildcards).entry


def extract_layers(wildcards):
    heads = heads_of(wildcards)
    digests = dict(zip(heads.stack.layers, heads.locked.digests, strict=True))
    return canonical(
        [[layer, digests[layer]] for layer in heads.groups[wildcards.layers]]
    )


def eigen_layers(wildcards):
    return heads_of(wildcards).shards[wildcards.layers]


def eigen_input(wildcards):
    fresh = run_if_stale("eigen", wildcards)
    return weights_of(wildcards, eigen_layers(wildcards), fresh)


def gram_input(wildcards):
    fresh = run_if_stale("gram", wildcards)
    return weights_of(wildcards, heads_of(wildcards).row_layers(wildcards.row), fresh)


def merge_parts(wildcards):
    """Of every circuit and stack: their names, and the names of the eigen shards and of the Gram rows."""
    return [
        [circuit, stack, list(heads.shards), list(heads.rows)]
        for (circuit, stack), heads in model_of(wildcards).heads.items()
    ]


def part_files(wildcards, stage, suffix):
    """Files of the eigen shards or of the Gram rows of all circuits and stacks."""
    return [
        PATHS.part(stage, wildcards.model, stack, circuit, name, suffix)
        for circuit, stack, shards, rows in merge_parts(wildcards)
        for name in (shards if stage == "eigen" else rows)
    ]


def is_turned(model):
    """Whether the stage `rotary` has something to measure of a model."""
    return ("rotary", "") in PLAN.models[model].identities


def around_files(model, dated=str):
    """What stands around the projections of a model, and its record; nothing where the lock does not pin it."""
    if not PLAN.models[model].entry.pins_around:
        return {}
    return {
        "around": dated(PATHS.around(model)),
        "around_record": dated(PATHS.record("around", model)),
    }


def rotary_input(wildcards):
    plan = model_of(wildcards)
    if not is_turned(wildcards.model):
        raise WorkflowError(
            f"The tables rotary and frequencies need the circuit qk; {unpinned(wildcards.model)}."
        )
    fresh = run_if_stale("rotary", wildcards)
    dated = ancient if fresh else str
    places = [
        (wildcards.model, stack, "qk", group)
        for stack in plan.stacks_of("qk")
        for group in plan.extracted["qk", stack].groups
    ]
    return {
        "weights": [
            dated(file) for place in places for file in PATHS.data("extract", *place)
        ],
        "records": [dated(PATHS.record("extract", *place)) for place in places],
        **around_files(wildcards.model, dated),
    }


def merge_input(wildcards):
    run_if_stale("merge", wildcards)
    model = wildcards.model
    turning = [PATHS.turning(model), PATHS.record("rotary", model)]
    return {
        "turning": turning if is_turned(model) else [],
        "tables": part_files(wildcards, "eigen", ".parquet")
        + part_files(wildcards, "gram", ".parquet"),
        "directions": part_files(wildcards, "eigen", ".pt"),
        "records": part_files(wildcards, "eigen", ".json")
        + part_files(wildcards, "gram", ".json"),
    }


def derive_shards(wildcards):
    """Of every circuit and stack: their names, and the names of the eigen shards."""
    return [parts[:3] for parts in merge_parts(wildcards)]


def derive_facts(wildcards):
    """What the lock and the manifest say of a model. Its identity covers all of it."""
    plan = model_of(wildcards)
    return canonical(
        {
            "architecture": plan.entry.architecture,
            "stored_dtypes": [
                [*place, heads.locked.dtype] for place, heads in plan.heads.items()
            ],
            "labels": asdict(plan.labels),
        }
    )


def derive_input(wildcards):
    fresh = run_if_stale("derive", wildcards)
    model = wildcards.model
    return {
        "heads": PATHS.table("heads", model),
        "gram": PATHS.table("gram", model),
        "pairs": PATHS.table("pairs", model),
        "directions": PATHS.directions(model),
        "record": PATHS.record("merge", model),
        "shards": part_files(wildcards, "eigen", ".parquet"),
        "shard_files": part_files(wildcards, "eigen", ".pt")
        + part_files(wildcards, "eigen", ".json"),
        **around_files(model, ancient if fresh else str),
    }


def composition_input(wildcards):
    """The weights of both circuits, of every stack that has both."""
    plan = model_of(wildcards)
    if not plan.composed:
        raise WorkflowError(
            f"The model {wildcards.model} has no composition: it needs both circuits, and the option composition.enabled."
        )
    run_if_stale("composition", wildcards)
    places = [
        (wildcards.model, stack, circuit, group)
        for stack in plan.composed
        for circuit in ("qk", "ov")
        for group in plan.extracted[circuit, stack].groups
    ]
    return {
        "weights": [file for place in places for file in PATHS.data("extract", *place)],
        "records": [PATHS.record("extract", *place) for place in places],
        **around_files(wildcards.model),
    }


def tokens_input(wildcards):
    if not PLAN.config.tokens.enabled:
        raise WorkflowError(
            "The table tokens is asked for by the option tokens.enabled."
        )
    run_if_stale("tokens", wildcards)
    return {
        "directions": PATHS.directions(wildcards.model),
        "record": PATHS.record("merge", wildcards.model),
    }
