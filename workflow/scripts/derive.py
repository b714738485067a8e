"""Derivation job: see headgram.stages.derive."""

from headgram.run.job import files_by_place, running
from headgram.stages.derive import Derived, Merged, derive

with running() as (job, provenance, options):
    tables = files_by_place(job.read("shards"))
    shards = {
        (circuit, stack): [tables[stack, circuit, "eigen", name] for name in names]
        for circuit, stack, names in job.facts["shards"]
    }
    merged = Merged(*job.read("heads", "gram", "pairs", "directions", "record"), shards=shards, around=job.around)
    derived = Derived(*job.write("overlap", "neighbours", "layers", "models", "record"))
    derive(merged, derived, job.facts["facts"], options.export, provenance)
