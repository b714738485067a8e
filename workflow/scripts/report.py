"""Report job: see headgram.stages.report."""

import json
from pathlib import Path

from headgram.run.job import running

with running(snakemake) as (provenance, _):
    from headgram.report.names import TABLES
    from headgram.stages.report import Report, Source, write_report

    files = {name: [Path(path) for path in snakemake.input[name]] for name in (*TABLES, "merged", "derived")}
    sources = [
        Source(model, {name: files[name][i] for name in TABLES}, [files["merged"][i], files["derived"][i]])
        for i, model in enumerate(json.loads(snakemake.params.models))
    ]
    page, record = (Path(snakemake.output[name]) for name in ("page", "record"))
    report = Report(page, data=page.with_name("data"), figures=page.with_name("figures"), record=record)
    write_report(sources, report, provenance, processes=snakemake.threads)
