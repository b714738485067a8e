"""Job that measures how scores depend on offsets: see headgram.stages.rotary."""

from pathlib import Path

from headgram.run.job import files_by_place, running
from headgram.stages.rotary import Turned, measure_rotary

with running() as (job, provenance, options):
    weights: dict[str, list[Path]] = {}
    for (stack, *_), path in files_by_place(job.read("weights")).items():
        weights.setdefault(stack, []).append(path)
    assert job.around is not None
    measure_rotary(job.around, weights, Turned(*job.write("rotary", "frequencies", "turning", "record")), options, provenance)
