"""Tokens job: see headgram.stages.tokens."""

from pathlib import Path

from headgram.run.job import around_of, by_place, running

with running(snakemake) as (provenance, options):
    from headgram.stages.sources import Sources
    from headgram.stages.tokens import Artifact, Written, find_tokens

    files, output = snakemake.input, snakemake.output
    weights = by_place(files.weights)
    circuits = list(dict.fromkeys(circuit for _, circuit, *_ in weights))
    merge, *keys = provenance.identity.upstream
    around, composition = keys[len(circuits) :], keys[-1]
    sources = Sources.read(weights, dict(zip(circuits, keys, strict=False)), around_of(files), *around[:1])
    directions = Artifact(Path(files.directions), Path(files.record), merge)
    channels = Artifact(Path(files.channels), Path(files.composed), composition) if files.get("channels") else None
    written = Written(Path(output.table), Path(output.paths), Path(output.record))
    find_tokens(directions, channels, sources, written, snakemake.params.entry.how_to_open(), options, provenance)
