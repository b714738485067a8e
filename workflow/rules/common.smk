# The plan, the folders, and what each rule reads, as functions of its wildcards.
import contextlib
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from headgram.artifacts import canonical, is_fresh
from headgram.devices import require_device, wants_gpu
from headgram.errors import HeadgramError
from headgram.startup import Run


@contextlib.contextmanager
def headgram_errors():
    """Bad input ends the run with one sentence; an exception would have Snakemake print its traceback."""
    try:
        yield
    except HeadgramError as error:
        sys.exit(f"headgram: {error}")


with headgram_errors():
    # Not by `configfile:`, which evaluates templates, code, in the file.
    RUN = Run(
        Path("config/config.yaml"),
        given=config,
        scripts=Path(workflow.basedir) / "workflow" / "scripts",
        is_job=workflow.remote_exec,
    )

PLAN = RUN.plan
GPUS = int(wants_gpu(PLAN.config.device))
RESULTS = PLAN.config.results
STACK = f"{RESULTS}/models/{{model}}/{{stack}}"
JOB_LOGS = f"{RESULTS}/logs"
JOB_BENCHMARKS = f"{RESULTS}/benchmarks"
ENVIRONMENT = "../../envs/cuda.yaml" if GPUS else "../../envs/cpu.yaml"


wildcard_constraints:
    model=r"[A-Za-z0-9][A-Za-z0-9._-]*",
    stack=r"[a-z][a-z0-9_-]*",
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


def stack_of(wildcards):
    stacks = model_of(wildcards).stacks
    if wildcards.stack not in stacks:
        raise WorkflowError(
            f"The model {wildcards.model} has no stack '{wildcards.stack}'; there are: {', '.join(stacks)}."
        )
    return stacks[wildcards.stack]


def stack_folder(wildcards):
    return STACK.format(model=wildcards.model, stack=wildcards.stack)


def identity_of(stage, field):
    """A param of a rule: one field of the identity of its artifacts. Together they decide what is stale."""

    def param(wildcards):
        value = getattr(model_of(wildcards).identities[stage], field)
        return value if isinstance(value, str) else canonical(value)

    return param


def stages_before(*stages):
    """A param of a rule: the identities of earlier stages, for its record to spell out what their keys stand for."""

    def param(wildcards):
        identities = model_of(wildcards).identities
        return canonical({stage: identities[stage].described() for stage in stages})

    return param


def run_if_stale(stage, wildcards, record):
    """Have Snakemake run a job whose artifact is there but belongs to another identity.

    Snakemake compares params with what it remembers in `.snakemake`; the artifact's own record also holds where that
    memory is lost. Called by input functions, which see every job of the DAG before it is decided which must run.
    """
    model = model_of(wildcards)
    if workflow.remote_exec:
        return  # on a node: whoever sent this job has decided
    if STORAGE is None:
        path, key = Path(record), model.identities[stage].key
        if path.exists() and not is_fresh(path, key):
            workflow.dag.forcefiles.add(record)
    elif stage in AFTER_MERGE or state_in_storage("merge", model.name) != "fresh":
        # Every record takes requests of its own; what only a finished merge would read again is not looked at.
        ...


def weights_of(wildcards, layers):
    """The weight files, with their records, that hold these layers."""
    folder = f"{stack_folder(wildcards)}/weights"
    groups = stack_of(wildcards).groups_of(layers)
    return {
        "weights": [f"{folder}/{group}.pt" for group in groups],
        "records": [f"{folder}/{group}.json" for group in groups],
    }


def final_files(model):
    """All files that a merge and a derivation write for a model."""
    atlas = f"{RESULTS}/atlas"
    files = [
        f"{atlas}/{table}/model={model}/{table}.parquet"
        for table in ("heads", "spectra", "gram", "overlap", "layers", "models")
    ]
    files += [f"{atlas}/directions/{model}.pt"]
    files += [f"{RESULTS}/provenance/{of}{model}.json" for of in ("", "derived/")]
    if PLAN.config.original.enabled:
        files += [f"{RESULTS}/seed/{model}.json", f"{RESULTS}/seed/{model}-eigdirs.pt"]
    return files


def extract_input(wildcards):
    run_if_stale(
        "extract",
        wildcards,
        f"{stack_folder(wildcards)}/weights/{wildcards.layers}.json",
    )
    return []


def locked_entry(wildcards):
    """A param of a rule: the lock's entry. Snakemake does not compare such objects: what a source holds is in the fingerprint, where it lies
    decides nothing."""
    return model_of(wildcards).entry


def extract_layers(wildcards):
    stack = stack_of(wildcards)
    digests = dict(zip(stack.stack.layers, stack.stack.digests, strict=True))
    return canonical(
        [[layer, digests[layer]] for layer in stack.groups[wildcards.layers]]
    )


def eigen_layers(wildcards):
    return stack_of(wildcards).shards[wildcards.layers]


def eigen_input(wildcards):
    run_if_stale(
        "eigen",
        wildcards,
        f"{stack_folder(wildcards)}/eigen/{wildcards.layers}.json",
    )
    return weights_of(wildcards, eigen_layers(wildcards))


def gram_input(wildcards):
    run_if_stale(
        "gram", wildcards, f"{stack_folder(wildcards)}/gram/{wildcards.row}.json"
    )
    return weights_of(wildcards, stack_of(wildcards).row_layers(wildcards.row))


def merge_parts(wildcards):
    """Of every stack, in the model's order: its name, and the tables of its eigen shards and of its Gram rows."""
    folder = f"{RESULTS}/models/{wildcards.model}"
    return [
        [
            name,
            [f"{folder}/{name}/eigen/{shard}.parquet" for shard in stack.shards],
            [f"{folder}/{name}/gram/{row}.parquet" for row in stack.rows],
        ]
        for name, stack in model_of(wildcards).stacks.items()
    ]


def merge_input(wildcards):
    run_if_stale("merge", wildcards, f"{RESULTS}/provenance/{wildcards.model}.json")
    parts = merge_parts(wildcards)
    shards = [path for _, tables, _ in parts for path in tables]
    rows = [path for _, _, tables in parts for path in tables]
    return {
        "tables": shards + rows,
        "directions": [str(Path(path).with_suffix(".pt")) for path in shards],
        "records": [str(Path(path).with_suffix(".json")) for path in shards + rows],
    }


def derive_shards(wildcards):
    """Of every stack, in the model's order: its name, and the tables of its eigen shards."""
    return [[name, shards] for name, shards, _ in merge_parts(wildcards)]


def derive_facts(wildcards):
    """What the lock says of a model. Its fingerprint covers all of it."""
    entry = model_of(wildcards).entry
    dtypes = {stack.name: stack.dtype for stack in entry.stacks}
    return canonical({"architecture": entry.architecture, "stored_dtype": dtypes})


def derive_input(wildcards):
    run_if_stale(
        "derive", wildcards, f"{RESULTS}/provenance/derived/{wildcards.model}.json"
    )
    model = wildcards.model
    shards = [path for _, tables in derive_shards(wildcards) for path in tables]
    return {
        "heads": f"{RESULTS}/atlas/heads/model={model}/heads.parquet",
        "gram": f"{RESULTS}/atlas/gram/model={model}/gram.parquet",
        "directions": f"{RESULTS}/atlas/directions/{model}.pt",
        "record": f"{RESULTS}/provenance/{model}.json",
        "shards": shards,
        "shard_files": [
            str(Path(path).with_suffix(suffix))
            for path in shards
            for suffix in (".pt", ".json")
        ],
    }
