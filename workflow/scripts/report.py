"""ReportFiles job: see headgram.stages.report."""

import json
from pathlib import Path

from headgram.run.job import running

with running(snakemake) as (provenance, _):
    from headgram.stages.report import ReportFiles, Source, write_report

    names = ("models", "layers", "data", "merged", "derived", "rendered")
    files = zip(*(map(Path, snakemake.input[name]) for name in names), strict=True)
    sources = [
        Source(model, {"models": models, "layers": layers}, *others)
        for model, (models, layers, *others) in zip(json.loads(snakemake.params.models), files, strict=True)
    ]
    page, record = (Path(snakemake.output[name]) for name in ("page", "record"))
    write_report(sources, ReportFiles(page, figures=page.with_name("figures"), record=record), provenance)
