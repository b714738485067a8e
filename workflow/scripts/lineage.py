"""Lineage job: see headgram.stages.lineage."""

import json
from pathlib import Path

from headgram.run.job import by_place, running

with running(snakemake) as (provenance, options):
    from headgram.results.paths import LINEAGE
    from headgram.stages.lineage import FactorsAndDirections, write_pair

    sides = []
    for side, places in zip(("before", "after"), json.loads(snakemake.params.parts), strict=True):
        files = by_place(snakemake.input[side])
        sides.append(
            {
                (circuit, stack): FactorsAndDirections(
                    [files[stack, circuit, "weights", name] for name in groups],
                    [files[stack, circuit, "eigen", name] for name in shards],
                )
                for circuit, stack, groups, shards in places
            }
        )
    tables = {name: Path(snakemake.output[name]) for name in LINEAGE}
    write_pair(*sides, tables, Path(snakemake.output.record), options, provenance)
