"""Composition job: see headgram.stages.composition."""

from pathlib import Path

from headgram.run.job import around_of, by_place, running

with running(snakemake) as (provenance, options):
    from headgram.stages.composition import Composed, compose
    from headgram.stages.sources import Sources

    weights, keys = by_place(snakemake.input.weights), iter(provenance.identity.upstream)
    sources = Sources.read(weights, keys, around_of(snakemake.input))
    names = ("composition", "channels", "kernels", "directions", "record")
    compose(sources, Composed(*(Path(snakemake.output[name]) for name in names)), options, provenance)
