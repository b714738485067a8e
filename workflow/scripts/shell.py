"""Shell job: see headgram.stages.shell."""

from pathlib import Path

from headgram.run.job import running

with running(snakemake) as (provenance, _):
    from headgram.stages.shell import write_shell

    write_shell(Path(snakemake.output.shell), Path(snakemake.output.record), provenance)
