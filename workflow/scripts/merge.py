"""Merge job: see headgram.stages.merge."""

from pathlib import Path

from headgram.results.paths import Results
from headgram.run.job import files_by_place, running
from headgram.stages.merge import MergedFiles, Parts, merge

with running() as (job, provenance, options):
    tables = files_by_place(job.read("tables"))
    parts = {
        (circuit, stack): Parts(
            [tables[stack, circuit, "eigen", name] for name in shards], [tables[stack, circuit, "gram", name] for name in rows]
        )
        for circuit, stack, shards, rows in job.facts["parts"]
    }
    [record] = job.write("record")
    written = job.write("heads", "spectra", "gram", "pairs", "directions")
    original, _ = Results(str(record.parents[1])).original(record.stem)
    atlas = MergedFiles(*written, original=Path(original), record=record)
    merge(parts, atlas, options, provenance, tuple(job.read("turning")) or None)
