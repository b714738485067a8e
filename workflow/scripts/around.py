"""Job that reads what stands around projections: see headgram.stages.around."""

from pathlib import Path

from headgram.run.job import running
from headgram.stages.around import extract_around

with running() as (job, provenance, _):
    output, record = job.write("around", "record")
    locked = {stack.name: list(zip(stack.layers, stack.around.digests, strict=True)) for stack in job.model.stacks}
    extract_around(output, record, job.model.how_to_open(), locked, provenance, Path(job.facts["manifest"]))
