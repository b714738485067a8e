"""Report job: see headgram.stages.report."""

import json
from pathlib import Path

from headgram.run.job import running

with running(snakemake) as (provenance, _):
    from headgram.report.names import TABLES
    from headgram.stages.report import Report, Source, write_report

    models, composed = (json.loads(snakemake.params[name]) for name in ("models", "composed"))
    names = {**dict.fromkeys((*TABLES, "merged", "derived"), models), **dict.fromkeys(("composition", "composed"), composed)}
    files = {name: dict(zip(of, map(Path, snakemake.input[name]), strict=True)) for name, of in names.items()}
    sources = [
        Source(
            model,
            {name: files[name][model] for name in (*TABLES, "composition") if model in files[name]},
            [files[name][model] for name in ("merged", "derived", "composed") if model in files[name]],
        )
        for model in models
    ]
    page, record = (Path(snakemake.output[name]) for name in ("page", "record"))
    report = Report(page, data=page.with_name("data"), figures=page.with_name("figures"), record=record)
    write_report(sources, report, provenance, processes=snakemake.threads)
