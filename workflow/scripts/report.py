"""Report job: see headgram.stages.report."""

import json
from pathlib import Path

from headgram.run.job import running

with running(snakemake) as (provenance, _):
    from headgram.stages.report import Lineages, ReportFiles, Source, write_report

    names = ("models", "layers", "heads", "data", "merged", "derived", "rendered")
    files = zip(*(map(Path, snakemake.input[name]) for name in names), strict=True)
    sources = [
        Source(model, dict(zip(names, found[:3], strict=False)), *found[3:])
        for model, found in zip(json.loads(snakemake.params.models), files, strict=True)
    ]
    members, pairs = json.loads(snakemake.params.lineages)
    drift, compared = (
        dict(zip(map(tuple, pairs), map(Path, snakemake.input[name]), strict=True)) for name in ("drift", "compared")
    )
    shell = Path(snakemake.input.shell[0])
    page, record = (Path(snakemake.output[name]) for name in ("page", "record"))
    report = ReportFiles(page, figures=page.with_name("figures"), lineages=page.with_name("lineages"), record=record)
    write_report(shell, sources, Lineages(members, drift, compared), report, provenance)
