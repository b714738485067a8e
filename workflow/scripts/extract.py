"""Extraction job: see headgram.stages.extract."""

from pathlib import Path

from headgram.run.job import running
from headgram.stages.extract import extract

with running() as (job, provenance, options):
    [weights] = job.write("weights")
    layers, digests = zip(*job.facts["layers"], strict=True)
    extract(weights, job.model.how_to_open(), layers, digests, options.weights.dtype, provenance, Path(job.facts["manifest"]))
