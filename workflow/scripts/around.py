"""Job that reads what stands around projections: see headgram.stages.around."""

from pathlib import Path

from headgram.run.job import running

with running(snakemake) as (provenance, _):
    from headgram.stages.around import extract_around

    entry = snakemake.params.entry
    locked = {stack.name: list(zip(stack.layers, stack.around.digests, strict=True)) for stack in entry.stacks}
    output, record = Path(snakemake.output.around), Path(snakemake.output.record)
    extract_around(output, record, entry.how_to_open(), locked, provenance, snakemake.params.manifest)
