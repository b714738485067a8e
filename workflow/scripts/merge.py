"""Merge job: see headgram.stages.merge."""

import json
from pathlib import Path

from headgram.job import running

with running(snakemake) as provenance:
    from headgram.stages.merge import Atlas, StackParts, merge

    parts = {
        stack: StackParts(*([Path(path) for path in tables] for tables in (shards, rows)))
        for stack, shards, rows in json.loads(snakemake.params.parts)
    }
    record = Path(snakemake.output.record)
    atlas = Atlas(
        *(Path(snakemake.output[name]) for name in ("heads", "spectra", "gram", "directions")),
        seed=record.parents[1] / "seed" / record.name,
        record=record,
    )
    merge(parts, atlas, json.loads(snakemake.params.config), provenance)
