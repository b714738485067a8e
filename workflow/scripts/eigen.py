"""Eigen job: see headgram.stages.eigen."""

import json
from pathlib import Path

from headgram.run.job import around_of, running

with running(snakemake) as (provenance, options):
    from headgram.stages.eigen import measure_shard

    measure_shard(
        table=Path(snakemake.output.table),
        tensors=Path(snakemake.output.directions),
        weights=[Path(path) for path in snakemake.input.weights],
        layers=json.loads(snakemake.params.layers),
        options=options,
        provenance=provenance,
        around=around_of(snakemake.input),
    )
