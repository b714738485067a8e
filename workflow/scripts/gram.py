"""Gram job: see headgram.stages.gram."""

from headgram.run.job import running
from headgram.stages.gram import measure_row

with running() as (job, provenance, options):
    [table] = job.write("table")
    measure_row(
        output=table,
        weights=job.read("weights"),
        **job.facts["tiles"],
        options=options.gram,
        provenance=provenance,
        around=job.around,
    )
