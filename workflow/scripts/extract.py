"""Extraction job: see headgram.stages.extract."""

import json
from pathlib import Path

from headgram.run.job import running

with running(snakemake) as (provenance, options):
    from headgram.stages.extract import extract

    layers, digests = zip(*json.loads(snakemake.params.layers), strict=True)
    source = snakemake.params.entry.how_to_open()
    extract(Path(snakemake.output.weights), source, layers, digests, options.weights.dtype, provenance, snakemake.params.manifest)
