"""Rendering job: see headgram.stages.render."""

import itertools
from pathlib import Path

from headgram.run.job import running

with running(snakemake) as (provenance, _):
    from headgram.report.names import TABLES
    from headgram.results.paths import RENDERED
    from headgram.stages.render import Rendered, render

    names = (*TABLES, *itertools.chain(*RENDERED.values()))
    tables = {name: Path(snakemake.input[name]) for name in names if snakemake.input.get(name)}
    data, record = (Path(snakemake.output[name]) for name in ("data", "record"))
    if snakemake.output.get("layers"):  # object storage wants the folder, which may stay empty
        Path(snakemake.output.layers).mkdir(parents=True, exist_ok=True)
    rendered = Rendered(data, figures=data.parents[1] / "figures", record=record)
    render(snakemake.wildcards.model, tables, list(map(Path, snakemake.input.records)), rendered, provenance)
