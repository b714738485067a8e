# All jobs of one model, or of a few, as one job: what an earlier run started is started again, one after the other.
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
    log:
        "fused-logs/{group}",
    params:
        script="../../benchmarks/fused_job",
        job=lambda wildcards, output: json.dumps(
            [*GROUPS[int(wildcards.group)], output[0]]
        ),
    script:
        "../workflow/scripts/job.sh"


onstart:
    SERVERS.append(forkserver.start())


onsuccess:
    forkserver.stop(SERVERS.pop())


onerror:
    forkserver.stop(SERVERS.pop())
