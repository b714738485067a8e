"""Composition job: see headgram.stages.composition."""

from headgram.run.job import files_by_place, running
from headgram.stages.composition import Composed, compose
from headgram.stages.extracted import ExtractedModel

with running() as (job, provenance, options):
    extracted = ExtractedModel.read(files_by_place(job.read("weights")), iter(provenance.recipe.upstream), job.around)
    compose(extracted, Composed(*job.write("composition", "channels", "kernels", "directions", "record")), options, provenance)
