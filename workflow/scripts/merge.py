"""Merge job: see headgram.stages.merge."""

from headgram.run.job import by_place, running
from headgram.stages.merge import MergedFiles, Parts, merge

with running() as (job, provenance, options):
    tables = by_place(job.read("tables"))
    parts = {
        (circuit, stack): Parts(
            [tables[stack, circuit, "eigen", name] for name in shards], [tables[stack, circuit, "gram", name] for name in rows]
        )
        for circuit, stack, shards, rows in job.facts["parts"]
    }
    [record] = job.write("record")
    written = job.write("heads", "spectra", "gram", "pairs", "directions")
    atlas = MergedFiles(*written, seed=record.parents[1] / "seed" / record.name, record=record)
    merge(parts, atlas, options, provenance, tuple(job.read("turning")) or None)
