"""Processes that share the work of one job."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from headgram.errors import HeadgramError


@contextlib.contextmanager
def workers(count: int) -> Iterator[Executor]:
    """So many processes that begin as copies of this one, when the first piece of work is submitted, and end with it.

    With one, and where forking is not safe, this process does the work itself, when it is submitted.

    Raises
    ------
    HeadgramError
        If one of them is killed.
    """
    if count == 1 or sys.platform != "linux":
        yield _Itself()
        return
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, mp_context=fork, initializer=_belong_to, initargs=(os.getpid(),))
    try:
        yield pool
    except BrokenProcessPool:
        raise HeadgramError(
            "A process of the job was killed, perhaps because memory ran out: run the same command again."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Itself(Executor):
    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*arguments, **named))
        return done


def _belong_to(parent: int) -> None:
    """Leave Ctrl-C to the process that this one works for, and end when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
