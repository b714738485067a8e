"""Tokens job: see headgram.stages.tokens."""

from pathlib import Path

from headgram.run.job import running

with running(snakemake) as (provenance, options):
    from headgram.stages.tokens import Directions, Written, find_tokens

    merged = Directions(Path(snakemake.input.directions), Path(snakemake.input.record))
    written = Written(Path(snakemake.output.table), Path(snakemake.output.record))
    find_tokens(merged, written, snakemake.params.entry.how_to_open(), options, provenance)
