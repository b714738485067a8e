"""A process that has imported what jobs need, and forks copies of itself for them: torch is imported once a run, not once a job.

Importing torch takes longer than most jobs' work. So a run that works on this machine starts this server, and what Snakemake
starts for a job (`headgram.run.start_job`) asks the server to run the job's script in its stead: with the same files, environment
and terminal, and ends as that copy ended. A copy whose script was killed is killed; the server ends with its run, however that
ends. Where there is no server, as on a cluster's node, a script runs by itself.

The server first imports what the first jobs need, and the rest while no script waits. It computes nothing and touches no GPU, so
its copies begin as a fresh interpreter would. A copy whose script ended well may run another one: what libraries prepare when
they are first used is then there, which takes as long as the work of a small job. Linux only: elsewhere, forking a process that
has loaded a BLAS is not safe.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import runpy
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, NoReturn

from headgram.run.start_job import ADDRESS, STARTED, is_same_user

#: What every job imports, and extraction, which comes first.
_FIRST = ("headgram.stages.extract", "headgram.run.job")
#: What later jobs import, also what libraries import when they are first used.
_LATER = (
    *("headgram.stages.eigen", "scipy.linalg.blas", "scipy.linalg.lapack", "headgram.stages.gram"),
    *(
        "pandas",
        "pyarrow.dataset",
        "headgram.stages.merge",
        "headgram.stages.derive",
        "headgram.stages.composition",
        "headgram.stages.render",
        "headgram.stages.report",
    ),
)
#: As Snakemake sets them for a job with one thread; libraries read them when they are loaded.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
#: glibc: memory that a tensor frees is kept for the next. Mapped and zeroed anew, it would take a tenth of a job's time.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30)}
#: How many scripts may wait while the server is importing.
_BACKLOG = 1024
#: Bytes that a script may have held above what its copy began with, for the copy to run another one.
_GROWTH = 256 << 20
#: Seconds that a server has to end by itself.
_PATIENCE = 10


def start(keeps: bool = False) -> subprocess.Popen[bytes] | None:
    """Start a server for the jobs of this process; it ends when this process does. None where the system does not allow one.

    `keeps` says whether a copy may run several jobs, one after the other. Not where they use a GPU: a process keeps the first
    one that it was given, and memory on it.

    The socket is abstract, so that nothing is left behind when all are killed, and listens from now on: jobs wait for the
    server's imports instead of doing their own beside it.
    """
    if sys.platform != "linux":
        return None
    address = f"headgram-{secrets.token_hex(16)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, contextlib.suppress(OSError):
        listener.bind(f"\0{address}")
        listener.listen(_BACKLOG)
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", "headgram.run.forkserver", str(listener.fileno()), "keeps" if keeps else ""],
            stdin=subprocess.PIPE,  # closed when this process ends, which tells the server
            pass_fds=[listener.fileno()],
            env=KEEP_MEMORY | os.environ | _ONE_THREAD,
        )
        os.environ[ADDRESS] = address
        return server
    return None


def stop(server: subprocess.Popen[bytes]) -> None:
    """End a server that no script needs any more."""
    os.environ.pop(ADDRESS, None)
    try:
        server.communicate(timeout=_PATIENCE)  # closes its input
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def serve(listener: socket.socket, parent: int, on_interrupt: Any, keeps: bool) -> None:
    """Have every script run by a copy of this process, until the file descriptor `parent` is closed at its other end.

    `on_interrupt` is what copies do on Ctrl-C; `keeps` says whether a copy whose script has ended well waits for another one.
    """
    later = deque(_LATER)
    copies = Copies()
    while True:
        ready, _, _ = select.select([listener.fileno(), parent, *copies.controls], [], [], 0 if later else None)
        copies.note(ready)
        if parent in ready:
            break
        if not ready:
            with contextlib.suppress(ImportError):  # the job that needs it will say so
                importlib.import_module(later.popleft())
            _share_memory()
        if listener.fileno() in ready:
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError):  # no process can be forked: the client finds its connection closed
                if is_same_user(client) and not copies.give(client):
                    control = copies.fork()
                    if control:
                        listener.close()
                        _work(control, client, on_interrupt, keeps and not later)
    copies.end()


class Copies:
    """The server's copies, each with a socket between both: over it the copy says that it waits, and gets its next client."""

    def __init__(self) -> None:
        self._waiting: list[socket.socket] = []
        self._working: list[socket.socket] = []

    @property
    def controls(self) -> list[int]:
        return [control.fileno() for control in (*self._waiting, *self._working)]

    def note(self, ready: Container[int]) -> None:
        """Take note of copies that wait for another script, and of those that have ended."""
        for control in [each for each in (*self._waiting, *self._working) if each.fileno() in ready]:
            waits = False
            with contextlib.suppress(ConnectionError):
                waits = bool(control.recv(1))
            (self._waiting if control in self._waiting else self._working).remove(control)
            if waits:
                self._waiting.append(control)
            else:
                control.close()
        with contextlib.suppress(ChildProcessError):  # what they used counts as the server's
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass

    def give(self, client: socket.socket) -> bool:
        """Whether a waiting copy takes a client."""
        while self._waiting:
            control = self._waiting.pop()
            try:
                socket.send_fds(control, [b"-"], [client.fileno()])
            except OSError:  # the copy was killed
                control.close()
            else:
                self._working.append(control)
                return True
        return False

    def fork(self) -> socket.socket | None:
        """Make a copy; returns its socket in the copy, and None in the server."""
        control, of_copy = socket.socketpair()
        if os.fork():
            of_copy.close()
            self._working.append(control)
            return None
        for each in (control, *self._waiting, *self._working):
            each.close()
        return of_copy

    def end(self) -> None:
        """Let go of all copies; those that wait end at once."""
        for control in (*self._waiting, *self._working):
            control.close()
        with contextlib.suppress(ChildProcessError):
            while not self._working:
                os.waitpid(-1, 0)


def _share_memory() -> None:
    """Keep the garbage collector away from all objects that are there: what it writes to, copies no longer share."""
    gc.collect()
    gc.freeze()


def _work(control: socket.socket, client: socket.socket, on_interrupt: Any, keeps: bool) -> NoReturn:
    """In a copy: run the script that a client asks for, and then those of further clients while `keeps`."""
    try:
        most = _peak() + _GROWTH
        while _run(client, on_interrupt, lambda: keeps and _peak() < most and _waits(control)):
            _forget_job()
            _, (number,), _, _ = socket.recv_fds(control, 1, 1)  # of none, if the server has ended
            client = socket.socket(fileno=number)
    finally:
        os._exit(1)  # without the server's clean-up


def _waits(control: socket.socket) -> bool:
    """Tell the server that this copy waits for another script; False where the server is gone."""
    with contextlib.suppress(OSError):
        return bool(control.send(b"-"))
    return False


def _run(client: socket.socket, on_interrupt: Any, goes_on: Callable[[], bool]) -> bool:
    """Run the script that a client asks for, as if this process were it; returns whether it takes another one.

    A script that failed, or took much memory, is the last one: what it left in this process must not reach another job.
    """
    signal.signal(signal.SIGINT, on_interrupt)
    _, files, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile("rb") as requests:
        request = json.loads(requests.readline())
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv, path = request["arguments"], list(sys.path)
    client.sendall(STARTED)
    ended = threading.Event()
    threading.Thread(target=_die_with, args=[client, ended], daemon=True).start()
    status = _status_of(sys.argv[0])
    sys.path[:] = path
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(len(files)):  # whoever reads the script's output waits until nobody can write to it
        os.dup2(nowhere, number)
    os.close(nowhere)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    another = status == 0 and goes_on()
    ended.set()
    client.sendall(bytes([status]))
    return another


def _die_with(client: socket.socket, ended: threading.Event) -> None:
    """Kill this process when the other side's is gone, unless its script has ended."""
    with client, contextlib.suppress(OSError):  # reset, if it was killed with something unread
        client.recv(1)
    if not ended.is_set():
        os.kill(os.getpid(), signal.SIGKILL)


def _peak() -> int:
    """The most memory in bytes that this process has held since `_forget_job`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _forget_job() -> None:
    """Return freed memory to the system, and forget its peak, so that the next job's record shows that job's own."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status_of(script: str) -> int:
    """Run a script; its exit code."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code & 0xFF if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Import what jobs need, then serve."""
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which waits for its jobs
    for module in _FIRST:
        importlib.import_module(module)
    from headgram.results.record import library_versions  # which a script that hands itself over need not wait for

    library_versions()  # which remembers them
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # arrow's allocator has a thread
    _share_memory()
    serve(socket.socket(fileno=int(sys.argv[1])), sys.stdin.fileno(), on_interrupt, keeps=sys.argv[2] == "keeps")
    os._exit(0)  # there is nothing to clean up


if __name__ == "__main__":
    main()
