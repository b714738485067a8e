"""Shell job: see headgram.stages.shell."""

from headgram.run.job import running
from headgram.stages.shell import write_shell

with running() as (job, provenance, _):
    write_shell(*job.write("shell", "record"), provenance)
