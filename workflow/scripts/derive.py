"""Derivation job: see headgram.stages.derive."""

import json
from pathlib import Path

from headgram.run.job import around_of, by_place, running

with running(snakemake) as (provenance, options):
    from headgram.stages.derive import Derived, Merged, derive

    tables = by_place(snakemake.input.shards)
    shards = {
        (circuit, stack): [tables[stack, circuit, "eigen", name] for name in names]
        for circuit, stack, names in json.loads(snakemake.params.shards)
    }
    merged = Merged(
        *(Path(snakemake.input[name]) for name in ("heads", "gram", "pairs", "directions", "record")),
        shards=shards,
        around=around_of(snakemake.input),
    )
    derived = Derived(*(Path(snakemake.output[name]) for name in ("overlap", "neighbours", "layers", "models", "record")))
    derive(merged, derived, json.loads(snakemake.params.facts), options.export, provenance)
