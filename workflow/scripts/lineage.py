"""Lineage job: see headgram.stages.lineage."""

from headgram.results.paths import LINEAGE
from headgram.run.job import both_sides, running
from headgram.stages.lineage import write_pair

with running() as (job, provenance, options):
    tables = dict(zip(LINEAGE, job.write(*LINEAGE), strict=True))
    write_pair(both_sides(job), tables, *job.write("record"), options, provenance)
