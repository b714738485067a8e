"""Composition job: see headgram.stages.composition."""

from headgram.run.job import by_place, running
from headgram.stages.composition import Composed, compose
from headgram.stages.sources import Sources

with running() as (job, provenance, options):
    sources = Sources.read(by_place(job.read("weights")), iter(provenance.recipe.upstream), job.around)
    compose(sources, Composed(*job.write("composition", "channels", "kernels", "directions", "record")), options, provenance)
