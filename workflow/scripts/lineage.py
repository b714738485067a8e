"""Lineage job: see headgram.stages.lineage."""

from pathlib import Path

from headgram.run.job import both_sides, running

with running(snakemake) as (provenance, options):
    from headgram.results.paths import LINEAGE
    from headgram.stages.lineage import write_pair

    tables = {name: Path(snakemake.output[name]) for name in LINEAGE}
    write_pair(both_sides(snakemake), tables, Path(snakemake.output.record), options, provenance)
