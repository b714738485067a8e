"""A job that outlives a killed run overwrites nothing of a newer run."""

import os
import signal
import subprocess
import time

import psutil
import pytest

from pipeline.arena import jobs_of
from pipeline.conftest import edit, small_project

#: Before it writes the file named here, the job of the old run waits until it is told to go on.
_WAITS = """
import os, time
import headgram.results.files as files
_written_whole = files.written_whole
def written_whole(path, *arguments):
    if os.path.exists("hold") and "/{part}" in str(path) and not str(path).endswith(".svg"):
        open("held", "w").close()
        while not os.path.exists("go"):
            time.sleep(0.05)
    return _written_whole(path, *arguments)
files.written_whole = written_whole
"""


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [
        ("eigen/", "topk: 8", "topk: 4"),
        ("gram/", "precision: auto", "precision: float64"),
        ("atlas/heads/", "topk: 8", "topk: 4"),
    ],
)
def test_an_older_job_leaves_what_a_newer_run_finished(tmp_path, part, old, new):
    project = small_project(tmp_path / "project")
    expected = small_project(tmp_path / "expected")
    for each in (project, expected):
        edit(each.folder / "config" / "config.yaml", "report:\n  enabled: true", "report:\n  enabled: false")
    edit(expected.folder / "config" / "config.yaml", old, new)
    expected.run()

    (project.folder / "src" / "sitecustomize.py").write_text(_WAITS.replace("{part}", part))
    (project.folder / "hold").touch()
    command = project.command("--cores", "1")
    run = subprocess.Popen(command, cwd=project.folder, env=project.environment(), stderr=subprocess.DEVNULL)
    while not (project.folder / "held").exists():
        assert run.poll() is None
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    (project.folder / "hold").unlink()
    left = jobs_of(project)
    assert left

    edit(project.folder / "config" / "config.yaml", old, new)
    project.run()
    (project.folder / "go").touch()
    assert psutil.wait_procs(left, timeout=60)[1] == []
    assert project.tables() == expected.tables()
    assert not [path for path in project.folder.rglob("*.log") if "no longer asks for" in path.read_text()]
    verified = project.headgram("verify")
    assert verified.returncode == 0, verified.stderr
    assert project.planned() == set()
