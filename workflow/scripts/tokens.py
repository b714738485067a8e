"""Tokens job: see headgram.stages.tokens."""

from headgram.run.job import files_by_place, running
from headgram.stages.extracted import ExtractedModel
from headgram.stages.tokens import Artifact, Written, find_tokens

with running() as (job, provenance, options):
    keys = iter(provenance.recipe.upstream)
    directions = Artifact(*job.read("directions", "record"), next(keys))
    extracted = ExtractedModel.read(files_by_place(job.read("weights")), keys, job.around)
    channels = Artifact(*job.read("channels", "composed"), next(keys)) if "channels" in job.inputs else None
    written = Written(*job.write("table", "paths", "record"))
    find_tokens(directions, channels, extracted, written, job.model.how_to_open(), options, provenance)
