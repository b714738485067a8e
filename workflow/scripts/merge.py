"""Merge job: see headgram.stages.merge."""

import json
from pathlib import Path

from headgram.run.job import by_place, running

with running(snakemake) as (provenance, options):
    from headgram.stages.merge import MergedFiles, Parts, merge

    tables = by_place(snakemake.input.tables)
    parts = {
        (circuit, stack): Parts(
            [tables[stack, circuit, "eigen", name] for name in shards], [tables[stack, circuit, "gram", name] for name in rows]
        )
        for circuit, stack, shards, rows in json.loads(snakemake.params.parts)
    }
    record = Path(snakemake.output.record)
    atlas = MergedFiles(
        *(Path(snakemake.output[name]) for name in ("heads", "spectra", "gram", "pairs", "directions")),
        seed=record.parents[1] / "seed" / record.name,
        record=record,
    )
    turning = tuple(map(Path, snakemake.input.turning))
    merge(parts, atlas, options, provenance, turning or None)
