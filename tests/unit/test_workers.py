"""Processes that share the work of one job."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from headgram.errors import HeadgramError
from headgram.report.workers import workers

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the job does the work itself")


@pytest.mark.parametrize("count", [1, 3])
def test_every_piece_of_work_is_done(count):
    with workers(count) as pool:
        assert [future.result() for future in [pool.submit(divmod, i, 3) for i in range(20)]] == [divmod(i, 3) for i in range(20)]


@pytest.mark.parametrize("count", [1, 2])
def test_what_goes_wrong_is_said(count):
    def fails() -> None:
        with workers(count) as pool:
            pool.submit(_refuses).result()

    with pytest.raises(HeadgramError, match="a sentence"):
        fails()


def _refuses():
    raise HeadgramError("a sentence")


@linux
def test_with_one_this_process_does_the_work():
    with workers(1) as pool:
        assert pool.submit(os.getpid).result() == os.getpid()
    with workers(2) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()


@linux
def test_a_killed_process_is_said_in_a_sentence():
    def killed() -> None:
        with workers(2) as pool:
            pool.submit(os.kill, pool.submit(os.getpid).result(), signal.SIGKILL)
            [future.result() for future in [pool.submit(time.sleep, 30) for _ in range(2)]]

    with pytest.raises(HeadgramError, match="was killed"):
        killed()


@linux
def test_the_processes_end_with_theirs(tmp_path):
    script = (
        "import os, time\nfrom headgram.report.workers import workers\n"
        "with workers(2) as pool:\n"
        "    busy = [pool.submit(time.sleep, 300) for _ in range(2)]\n"
        "    print(os.getpid(), flush=True)\n"
        "    busy[0].result()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
