"""Lineage job of models that share tokens alone: see headgram.stages.token_space."""

from headgram.results.paths import LINEAGE
from headgram.run.job import both_sides, running
from headgram.stages.token_space import LockedSource, write_pair
from headgram.study.lock import LockedModel

with running() as (job, provenance, options):
    names = job.wildcards["other"], job.wildcards["model"]
    entries = map(LockedModel.model_validate, job.facts["entries"])
    sources = [LockedSource(name, entry.how_to_open()) for name, entry in zip(names, entries, strict=True)]
    tables = dict(zip(LINEAGE, job.write(*LINEAGE), strict=True))
    write_pair(both_sides(job), sources, tables, *job.write("record"), options, provenance)
