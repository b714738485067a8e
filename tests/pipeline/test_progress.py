"""Progress of real runs: bars on a terminal, lines in a pipe, nothing where nothing runs."""

import os
import pty
import re

from pipeline.conftest import Project

LAST = "headgram: 1 of 1 jobs in "


def unfinished(finished: Project, folder) -> Project:
    """The finished project, but for one job."""
    project = finished.copy(folder)
    (project.folder / "results" / "provenance" / "derived" / "tiny-bert.json").unlink()
    return project


def on_a_terminal(project: Project, *arguments: str) -> tuple[int, str]:
    """Exit code and everything that a terminal receives."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(project.folder)
        command = project.command(*arguments)
        os.execvpe(command[0], command, project.environment() | {"TERM": "xterm", "COLUMNS": "120"})
    received = b""
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        received += data
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), received.decode()


def test_a_terminal_gets_bars_below_the_log(finished, tmp_path):
    project = unfinished(finished, tmp_path / "project")
    code, received = on_a_terminal(project, "--cores", "1")
    assert code == 0, received
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", received)
    assert re.search(r"derive +━+ +0/1", text)
    assert re.search(r"all stages +━+ +0/1", text)
    assert "Deriving the tables of tiny-bert" in text
    assert LAST in text.split("Finished jobid: 0")[1]
    assert "━" not in text.split(LAST)[1]
    assert received.rfind("\x1b[?25h") > received.rfind("\x1b[?25l")  # the cursor is there


def test_a_pipe_gets_plain_lines(finished, tmp_path):
    project = unfinished(finished, tmp_path / "project")
    done = project.run()
    assert LAST in done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    assert "━" not in done.stderr + done.stdout
    assert "headgram: " not in project.run().stderr  # nothing to do


def test_a_failed_run_says_how_far_it_came(finished, tmp_path):
    project = unfinished(finished, tmp_path / "project")
    shard = project.folder / "results" / "models" / "tiny-bert" / "self" / "qk" / "eigen" / "layers-000-001.pt"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = project.snakemake("--cores", "1")
    assert done.returncode == 1
    assert re.search(r"^headgram: 0 of 2 jobs in \d+ s, 1 failed$", done.stderr, re.MULTILINE)
