"""Eigen job: see headgram.stages.eigen."""

from headgram.run.job import running
from headgram.stages.eigen import measure_shard

with running() as (job, provenance, options):
    table, directions = job.write("table", "directions")
    measure_shard(table, directions, job.read("weights"), job.facts["layers"], options, provenance, job.around)
