"""Rendering job: see headgram.stages.render."""

import itertools

from headgram.report.names import TABLES
from headgram.results.paths import RENDERED
from headgram.run.job import running
from headgram.stages.render import Rendered, render

with running() as (job, provenance, _):
    names = [name for name in (*TABLES, *itertools.chain(*RENDERED.values())) if name in job.inputs]
    tables = dict(zip(names, job.read(*names), strict=True))
    data, record = job.write("data", "record")
    for folder in job.write("layers"):  # object storage wants it, though it may stay empty
        folder.mkdir(parents=True, exist_ok=True)
    rendered = Rendered(data, figures=data.parents[1] / "figures", record=record)
    render(job.wildcards["model"], tables, job.read("records"), rendered, provenance)
