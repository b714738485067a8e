"""Report job: see headgram.stages.report."""

from headgram.run.job import running
from headgram.stages.report import Lineages, ReportedModel, ReportFiles, write_report

with running() as (job, provenance, _):
    files = zip(*(job.read(name) for name in ("models", "layers", "heads", "data", "merged", "derived", "rendered")), strict=True)
    models = [
        ReportedModel(model, dict(zip(("models", "layers", "heads"), found[:3], strict=True)), *found[3:])
        for model, found in zip(job.facts["models"], files, strict=True)
    ]
    pairs = [tuple(pair) for pair in job.facts["pairs"]]
    drift, compared = (dict(zip(pairs, job.read(name), strict=True)) for name in ("drift", "compared"))
    shell, _ = job.read("shell")
    page, record = job.write("page", "record")
    report = ReportFiles(page, figures=page.with_name("figures"), lineages=page.with_name("lineages"), record=record)
    write_report(shell, models, Lineages(job.facts["lineages"], drift, compared), report, provenance)
