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

from headgram import forkserver

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the server is for Linux only")

_SCRIPT = """
import sys
imported = "torch" in sys.modules
import os
from pathlib import Path
from headgram.forkserver import hand_over
hand_over(Path(__file__))
"""


@pytest.fixture
def server(monkeypatch) -> Iterator[subprocess.Popen]:
    monkeypatch.delenv("HEADGRAM_FORKSERVER", raising=False)
    server = forkserver.start()
    yield server
    forkserver.stop(server)


def started(folder: Path, body: str, **options) -> subprocess.Popen:
    """The process of a script that hands itself over, if it can."""
    script = folder / "script.py"
    script.write_text(_SCRIPT + body)
    return subprocess.Popen([sys.executable, script], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def ended(folder: Path, body: str, **options) -> tuple[int, str, str]:
    process = started(folder, body, **options)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


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
    assert (code, output, errors) == (0, f"{home} green typed ['{tmp_path}/script.py']\n", "said\n")


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
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


def test_a_script_runs_by_itself_where_the_server_is_gone(server, tmp_path):
    server.kill()
    server.wait()
    code, output, _ = ended(tmp_path, "print(imported, os.getppid())")
    assert (code, output) == (0, f"False {os.getpid()}\n")


def test_the_server_ends_with_the_process_that_started_it(tmp_path):
    starter = "from headgram import forkserver; import time; print(forkserver.start().pid, flush=True); time.sleep(300)"
    process = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True)
    server = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.communicate()
    assert comes_true(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)


def test_another_user_is_not_served(monkeypatch):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert forkserver._is_ours(ours)
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        assert not forkserver._is_ours(ours)


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
