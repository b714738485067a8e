"""Gram job: see headgram.stages.gram."""

import json
from pathlib import Path

from headgram.run.job import around_of, running

with running(snakemake) as (provenance, options):
    from headgram.stages.gram import measure_row

    measure_row(
        output=Path(snakemake.output.table),
        weights=[Path(path) for path in snakemake.input.weights],
        **json.loads(snakemake.params.tiles),
        options=options.gram,
        provenance=provenance,
        around=around_of(snakemake.input),
    )
