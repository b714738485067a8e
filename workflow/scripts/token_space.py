"""Lineage job of models that share tokens alone: see headgram.stages.token_space."""

from pathlib import Path

from headgram.run.job import both_sides, running

with running(snakemake) as (provenance, options):
    from headgram.results.paths import LINEAGE
    from headgram.stages.token_space import Source, write_pair

    names = snakemake.wildcards.other, snakemake.wildcards.model
    sources = [Source(name, entry.how_to_open()) for name, entry in zip(names, snakemake.params.entries, strict=True)]
    tables = {name: Path(snakemake.output[name]) for name in LINEAGE}
    write_pair(both_sides(snakemake), sources, tables, Path(snakemake.output.record), options, provenance)
