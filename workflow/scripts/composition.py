"""Composition job: see headgram.stages.composition."""

from pathlib import Path

from headgram.run.job import around_of, by_place, running

with running(snakemake) as (provenance, options):
    from headgram.stages.composition import Composed, compose
    from headgram.stages.sources import Sources

    qk, ov, *around = provenance.identity.upstream
    sources = Sources.read(by_place(snakemake.input.weights), {"qk": qk, "ov": ov}, around_of(snakemake.input), *around)
    names = ("composition", "channels", "kernels", "directions", "record")
    compose(sources, Composed(*(Path(snakemake.output[name]) for name in names)), options, provenance)
