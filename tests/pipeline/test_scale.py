"""A thousand models are planned in a minute; nothing to do is nothing to wait for. Limits leave room for slow machines."""

import json
import os
import re
import subprocess
import sys
import time

from locked import locked_llama

from headgram.study.lock import write_lock
from pipeline.conftest import new_project

_MEASURE = """
import json, resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss]))
sys.exit(code)
"""


def test_a_thousand_models_are_planned_quickly_and_within_a_gibibyte(tmp_path):
    """With the options as they are delivered: twelve jobs a model, the page without models, and the page."""
    project = new_project(tmp_path / "project")
    models = {f"model-{i:04d}": locked_llama(f"{i:08x}") for i in range(1000)}
    rows = [f"{name}\t{entry.source}" for name, entry in models.items()]
    (project.folder / "many.tsv").write_text("name\tsource\n" + "\n".join(rows) + "\n")
    write_lock(project.folder / "many.lock.json", models)
    command = project.command("-n", "--quiet", "rules", "--config", "manifest=many.tsv")
    # Measured from a small process of its own: a child counts as its memory what its parent held when it was started.
    measure = [sys.executable, "-c", _MEASURE, *command]
    done = subprocess.run(measure, cwd=project.folder, env=project.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cpu, kibibytes = json.loads(done.stdout.splitlines()[-1])
    print(f"1,000 models planned: {cpu:.1f} s of CPU, {kibibytes >> 10} MiB")
    assert re.search(r"^total +12003$", done.stdout + done.stderr, re.MULTILINE), done.stdout  # with `shell`, `report` and `all`
    assert cpu < 60  # 37 beside other work; machines differ
    assert kibibytes < 2**20


def test_nothing_to_do_is_soon_said(finished):
    """Of CPU: the machine of a test may be busy."""
    before, start = os.times(), time.monotonic()
    done = finished.snakemake("--cores", "2")
    seconds = time.monotonic() - start
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout + done.stderr
    print(json.dumps({"wall": round(seconds, 1), "cpu": round(cpu, 1)}))
    assert cpu < 6  # 2 on a free core; machines differ
