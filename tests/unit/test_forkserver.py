"""Scripts run in copies of a warm process as they would by themselves."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from headgram.run import forkserver, start_job

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the server is for Linux only")

#: Starts a script, and leaves a mark when it has asked the server and is about to wait for the answer.
_MARKED = """
import pathlib, runpy, socket, sys
del sys.argv[0]
class Marked(socket.socket):
    def recv(self, *arguments):
        pathlib.Path("asked").touch()
        return super().recv(*arguments)
socket.socket = Marked
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_SCRIPT = """
import sys
imported = "torch" in sys.modules
import os
from pathlib import Path
"""


@pytest.fixture
def server(monkeypatch) -> Iterator[subprocess.Popen]:
    monkeypatch.delenv("HEADGRAM_FORKSERVER", raising=False)
    server = forkserver.start()
    yield server
    forkserver.stop(server)


def started(folder: Path, body: str, by: tuple[str, ...] = ("-I", "-S"), **options) -> subprocess.Popen:
    """What starts a script for Snakemake."""
    script = folder / "script.py"
    script.write_text(_SCRIPT + body)
    command = [sys.executable, *by, start_job.__file__, script, "a b"]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def ended(folder: Path, body: str, typed: str = "", **options) -> tuple[int, str, str]:
    process = started(folder, body, **{"stdin": subprocess.PIPE, **options})
    output, errors = process.communicate(typed, timeout=120)
    return process.returncode, output, errors


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def comes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_script_runs_in_a_copy_of_a_process_that_has_imported_torch(server, tmp_path):
    code, output, _ = ended(tmp_path, "print(imported, os.getppid())")
    assert (code, output) == (0, f"True {server.pid}\n")


def test_the_copy_has_the_files_environment_and_folder_of_its_script(server, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    body = "print(os.getcwd(), os.environ['COLOUR'], input(), sys.argv); print('said', file=sys.stderr)"
    (tmp_path / "input").write_text("typed\n")
    with (tmp_path / "input").open() as typed:
        code, output, errors = ended(tmp_path, body, cwd=home, env=os.environ | {"COLOUR": "green"}, stdin=typed)
    assert (code, output, errors) == (0, f"{home} green typed ['{tmp_path}/script.py', 'a b']\n", "said\n")


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit(-1)", 255, ""),
        ("sys.exit('a sentence')", 1, "a sentence\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        (
            "os.kill(os.getpid(), 9)",
            1,
            "headgram: the job was killed, perhaps because memory ran out; run the same command again\n",
        ),
    ],
)
def test_the_script_ends_as_its_copy_ended(server, tmp_path, body, code, said):
    status, _, errors = ended(tmp_path, body)
    assert status == code
    assert errors.endswith(said)
    assert bool(errors) == bool(said)


def test_a_copy_whose_script_was_killed_is_killed(server, tmp_path):
    pid = tmp_path / "pid"
    process = started(tmp_path, f"import time; Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(300)")
    assert comes_true(lambda: pid.exists() and pid.read_text() != "")
    copy = psutil.Process(int(pid.read_text()))
    assert copy.pid != process.pid
    assert copy.is_running()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert comes_true(lambda: not copy.is_running() or copy.status() == psutil.STATUS_ZOMBIE)


def test_a_copy_whose_script_was_killed_before_it_knew_is_killed(server, tmp_path):
    """The script is stopped while it waits for a server that is stopped, so that it never reads that its copy has begun."""
    begun, done = tmp_path / "begun", tmp_path / "done"
    body = f"import time; Path({str(begun)!r}).touch(); time.sleep(3); Path({str(done)!r}).touch()"
    server.send_signal(signal.SIGSTOP)
    process = started(tmp_path, body, by=("-c", _MARKED), cwd=tmp_path)
    assert comes_true((tmp_path / "asked").exists)
    process.send_signal(signal.SIGSTOP)
    server.send_signal(signal.SIGCONT)
    assert comes_true(begun.exists)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(4)
    assert not done.exists()


@pytest.mark.parametrize("ignored", [True, False])
def test_ctrl_c_does_to_a_copy_what_it_would_do_to_its_script(tmp_path, ignored):
    """A run that was started in the background of a shell script ignores it, and so do its jobs."""
    (tmp_path / "script.py").write_text(
        _SCRIPT + "import signal, time; Path('begun').touch(); time.sleep(2); Path('done').touch()"
    )
    starter = f"""
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.{"SIG_IGN" if ignored else "SIG_DFL"})
from headgram.run import forkserver
server = forkserver.start()
code = subprocess.Popen([sys.executable, "-I", "-S", {start_job.__file__!r}, "script.py"])
signal.signal(signal.SIGINT, signal.SIG_IGN)
code = code.wait()
forkserver.stop(server)
sys.exit(code)
"""
    run = subprocess.Popen([sys.executable, "-c", starter], cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL)
    assert comes_true((tmp_path / "begun").exists)
    os.killpg(run.pid, signal.SIGINT)
    assert (run.wait(60) == 0) == ignored
    assert (tmp_path / "done").exists() == ignored


@pytest.fixture(scope="module")
def keeping(tmp_path_factory) -> Iterator[subprocess.Popen]:
    """A server whose copies run several scripts."""
    server = started_keeping(tmp_path_factory.mktemp("scripts"))
    yield server
    forkserver.stop(server)


def started_keeping(folder: Path) -> subprocess.Popen:
    """A server that has imported all that it will: from then on, its copies run several scripts."""
    server = forkserver.start(keeps=True)
    assert comes_true(lambda: copy_of(folder) == copy_of(folder))
    return server


def copy_of(folder: Path, body: str = "") -> int:
    """The process that runs a script."""
    return int(ended(folder, f"print(os.getpid()){body}")[1])


def test_a_copy_runs_one_script_after_the_other_each_as_if_it_were_alone(keeping, tmp_path):
    body = "print(os.getcwd(), os.environ.get('COLOUR'), len(sys.path), 'left' in globals(), sys.stdin.read())"
    home = tmp_path / "home"
    home.mkdir()
    first = ended(tmp_path, body + "; left = 1; sys.path.append('x'); os.environ['COLOUR'] = 'red'", typed="typed")
    second = ended(tmp_path, body, cwd=home, env=os.environ | {"COLOUR": "green"}, typed="more")
    paths = first[1].split()[2]
    assert first[1] == f"{Path.cwd()} None {paths} False typed\n"
    assert second[1] == f"{home} green {paths} False more\n"


@pytest.mark.parametrize("last", ["; sys.exit(3)", "; 1 / 0", "; held = b'.' * 2**29"])
def test_a_script_that_failed_or_held_much_memory_is_its_copys_last(keeping, tmp_path, last):
    used = copy_of(tmp_path)
    assert copy_of(tmp_path, last) == used
    assert copy_of(tmp_path) != used


def test_a_kept_copy_is_killed_with_its_script_alone(keeping, tmp_path):
    used, pid = copy_of(tmp_path), tmp_path / "pid"
    process = started(tmp_path, f"import time; Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(300)")
    assert comes_true(lambda: pid.exists() and pid.read_text() == str(used))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert comes_true(lambda: not is_alive(used))
    other = copy_of(tmp_path)
    psutil.Process(other).kill()
    assert comes_true(lambda: not is_alive(other))
    assert copy_of(tmp_path) != other


def test_a_script_at_work_ends_well_though_the_server_is_killed(monkeypatch, tmp_path):
    monkeypatch.delenv("HEADGRAM_FORKSERVER", raising=False)
    server, pid, go = started_keeping(tmp_path), tmp_path / "pid", tmp_path / "go"
    body = f"import time; Path({str(pid)!r}).write_text(str(os.getpid()))\nwhile not Path({str(go)!r}).exists(): time.sleep(0.01)"
    process = started(tmp_path, body)
    assert comes_true(lambda: pid.exists() and pid.read_text() != "")
    server.kill()
    server.wait()
    go.touch()
    assert process.communicate(timeout=120) == ("", "")
    assert process.returncode == 0
    assert comes_true(lambda: not is_alive(int(pid.read_text())))


def test_a_record_counts_what_its_own_job_used(keeping, tmp_path):
    """Not what an earlier job of the same process did, which took longer and more memory."""
    body = """
import json, time
from headgram.results.record import Recipe, Provenance, seal
provenance = Provenance(Recipe("merge", "{}", "", ""), "model", None)
held, end = bytearray(SIZE << 20), time.process_time() + SECONDS
while time.process_time() < end:
    pass
seal(Path("record.json"), provenance, [])
used = json.loads(Path("record.json").read_text())
print(os.getpid(), used["cpu_seconds"], used["peak_mib"])
"""
    large, small = (
        ended(tmp_path, body.replace("SIZE", size).replace("SECONDS", seconds), cwd=tmp_path)[1].split()
        for size, seconds in (("128", "1"), ("0", "0"))
    )
    assert large[0] == small[0]
    assert float(large[1]) >= 1
    assert float(small[1]) < 0.9
    assert int(large[2]) - int(small[2]) > 100


def test_an_impostor_gets_nothing(server, tmp_path, monkeypatch):
    """Whoever takes the name of a server that is gone; another user here, which the other side's credentials say."""
    monkeypatch.setattr(start_job, "is_same_user", lambda peer: False)
    monkeypatch.setattr(socket, "send_fds", lambda *_: pytest.fail("something was sent"))
    assert start_job.hand_over(["script.py"]) is None


def test_a_script_runs_by_itself_where_the_server_is_gone(server, tmp_path):
    server.kill()
    server.wait()
    code, output, _ = ended(tmp_path, "print(imported, os.getppid())")
    assert (code, output) == (0, f"False {os.getpid()}\n")


def test_the_server_ends_with_the_process_that_started_it(tmp_path):
    starter = "from headgram.run import forkserver; import time; print(forkserver.start().pid, flush=True); time.sleep(300)"
    process = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True)
    server = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.communicate()
    assert comes_true(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)


def test_another_user_is_not_served(monkeypatch):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert start_job.is_same_user(ours)
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        assert not start_job.is_same_user(ours)


def test_where_the_system_allows_no_server_there_is_none(monkeypatch, tmp_path):
    def refused(*_):
        raise OSError

    monkeypatch.delenv("HEADGRAM_FORKSERVER", raising=False)
    monkeypatch.setattr(socket.socket, "listen", refused)
    assert forkserver.start() is None
    code, output, _ = ended(tmp_path, "print(imported)")
    assert (code, output) == (0, "False\n")


def test_many_scripts_wait_for_the_server_and_then_run_at_once(server, tmp_path):
    processes = []
    for i in range(12):
        (tmp_path / str(i)).mkdir()
        processes.append(started(tmp_path / str(i), f"print({i}, os.getppid())"))
    assert [process.communicate(timeout=120)[0] for process in processes] == [f"{i} {server.pid}\n" for i in range(12)]
