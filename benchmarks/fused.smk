# All jobs of one model, or of a few, as one job: the scripts that an earlier run kept run again, one after the other.
import json
from pathlib import Path

from headgram.run import forkserver
from headgram.run.startup import Run

# The plan that a run would make, for its cost.
PLAN = Run(None, config, Path(workflow.basedir, "../workflow/scripts")).plan
GROUPS = json.loads(Path("groups.json").read_text())
LAST = str(len(GROUPS) - 1)
SERVERS = []


wildcard_constraints:
    group=r"\d+",


rule all:
    input:
        f"fused/{LAST}",


rule fused:
    input:
        lambda wildcards: (
            [f"fused/{i}" for i in range(len(GROUPS) - 1)]
            if wildcards.group == LAST
            else []
        ),
    output:
        "fused/{group}",
    params:
        scripts=lambda wildcards: GROUPS[int(wildcards.group)],
    script:
        "fused_job.py"


onstart:
    SERVERS.append(forkserver.start())


onsuccess:
    forkserver.stop(SERVERS.pop())


onerror:
    forkserver.stop(SERVERS.pop())
