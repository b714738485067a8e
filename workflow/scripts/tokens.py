"""Tokens job: see headgram.stages.tokens."""

from pathlib import Path

from headgram.run.job import around_of, by_place, running

with running(snakemake) as (provenance, options):
    from headgram.stages.sources import Sources
    from headgram.stages.tokens import Artifact, Written, find_tokens

    files, output, keys = snakemake.input, snakemake.output, iter(provenance.identity.upstream)
    directions = Artifact(Path(files.directions), Path(files.record), next(keys))
    sources = Sources.read(by_place(files.weights), keys, around_of(files))
    channels = Artifact(Path(files.channels), Path(files.composed), next(keys)) if files.get("channels") else None
    written = Written(Path(output.table), Path(output.paths), Path(output.record))
    find_tokens(directions, channels, sources, written, snakemake.params.entry.how_to_open(), options, provenance)
