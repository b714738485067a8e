"""Progress of a run: bars on a terminal, a line now and then elsewhere.

Listens to Snakemake's own log in the process that schedules the jobs. Whatever goes wrong here ends the display, never the run.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from snakemake_interface_logger_plugins.common import LogEvent

#: Seconds between two lines where there is no terminal.
LINE_SECONDS = 30.0


@dataclass
class Stage:
    """The jobs of one stage, or of all."""

    total: int = 0
    done: int = 0
    seconds: float = 0.0  # of the finished jobs, together
    failed: int = 0
    began: float | None = None  # when the first job started

    @property
    def waiting(self) -> int:
        """Jobs that are neither finished nor given up."""
        return self.total - self.done - self.failed


class Tally:
    """How far a run is.

    Parameters
    ----------
    jobs
        The stage of every job, by the job's id.
    clock
        Tells the time in seconds.
    """

    def __init__(self, jobs: Mapping[Any, str], clock: Callable[[], float] = time.monotonic) -> None:
        self._jobs = jobs
        self.clock = clock
        self._running: dict[Any, float] = {}  # id -> when it started
        self._failed: set[Any] = set()
        self._spent = 0.0  # seconds of all jobs that have ended
        self.whole = Stage(len(jobs), began=clock())
        self.stages = {name: Stage(total) for name, total in Counter(jobs.values()).items()}

    def _of(self, job: Any) -> tuple[Stage, Stage]:
        return self.whole, self.stages[self._jobs[job]]

    def start(self, job: Any) -> None:
        """A job starts, perhaps again."""
        if job not in self._jobs:
            return
        self._running[job] = self.clock()
        for stage in self._of(job):
            stage.began = self.clock() if stage.began is None else stage.began
            stage.failed -= job in self._failed
        self._failed.discard(job)

    def finish(self, job: Any) -> None:
        """A job is done."""
        if job in self._running:
            seconds = self.clock() - self._running.pop(job)
            self._spent += seconds
            for stage in self._of(job):
                stage.done += 1
                stage.seconds += seconds

    def fail(self, job: Any) -> None:
        """A job failed."""
        if job in self._running:
            self._spent += self.clock() - self._running.pop(job)
            self._failed.add(job)
            for stage in self._of(job):
                stage.failed += 1

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self.clock() - (self.whole.began or 0.0)

    def per_minute(self, stage: Stage) -> float | None:
        """Finished jobs per minute since the first of them started; None before one is finished."""
        if not stage.done or stage.began is None:
            return None
        return 60 * stage.done / max(self.clock() - stage.began, 1e-9)

    def left(self, stage: Stage) -> float | None:
        """Seconds that the waiting jobs should take, as many at a time as so far; None before any job is finished.

        A stage of which nothing is finished is taken to be as slow as the others are on average.
        """
        if not self.whole.done:
            return None
        now = self.clock()
        average = self.whole.seconds / self.whole.done
        ahead = 0.0
        for name, each in self.stages.items():
            if stage in (self.whole, each):
                expected = each.seconds / each.done if each.done else average
                spent = [now - started for job, started in list(self._running.items()) if self._jobs[job] == name]
                ahead += expected * each.waiting - sum(min(seconds, expected) for seconds in spent)
        busy = self._spent + sum(now - started for started in list(self._running.values()))
        return ahead / max(busy / max(self.elapsed, 1e-9), 1.0)

    def line(self) -> str:
        """The run in one line, with the stages that are under way."""
        whole = self.whole
        line = f"headgram: {whole.done} of {whole.total} jobs in {_duration(self.elapsed)}"
        begun = [(name, stage) for name, stage in self.stages.items() if stage.began is not None and stage.waiting]
        if begun:
            line += f" ({', '.join(f'{name} {stage.done}/{stage.total}' for name, stage in begun)})"
        if whole.failed:
            line += f", {whole.failed} failed"
        rate, left = self.per_minute(whole), self.left(whole)
        if rate is not None and left is not None and whole.waiting:
            line += f", {rate:.3g} per minute, about {_duration(left)} left"
        return line

    def table(self) -> Table:
        """The run as bars: a row for every stage, and one for all."""
        table = Table.grid(padding=(0, 2))
        for justify in ("left", "left", "right", "right", "right"):
            table.add_column(justify=justify)
        for name, stage in {**self.stages, "all stages": self.whole}.items():
            rate, left = self.per_minute(stage), self.left(stage)
            table.add_row(
                name,
                ProgressBar(total=stage.total, completed=stage.done, width=30, finished_style="green"),
                f"{stage.done}/{stage.total}" + (f", {stage.failed} failed" if stage.failed else ""),
                "" if rate is None else f"{rate:.3g}/min",
                "" if left is None or not stage.waiting else f"{_duration(left)} left",
                style="bold" if stage is self.whole else None,
            )
        return table


def _duration(seconds: float) -> str:
    """`42 s`, `7 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class ProgressHandler(logging.Handler):
    """Listens to a run's log, and shows how far the run is."""

    def __init__(self, tally: Tally, log: logging.Logger, finished: Callable[[], Iterable[Any]], draws: bool = True) -> None:
        super().__init__(logging.INFO)
        self._tally = tally
        self._log = log
        self._finished = finished  # ids of jobs: with --quiet, the log does not tell of them
        self._said = tally.clock()
        self._display = contextlib.ExitStack()
        stream = next((each for each in log.handlers if each.name == "DefaultStreamHandler"), None)
        self._draws = False
        if draws and isinstance(stream, logging.StreamHandler) and stream.stream.isatty() and os.environ.get("TERM") != "dumb":
            self._draws = True
            self._display.enter_context(_bars(stream, Console(file=stream.stream), tally.table))

    def emit(self, record: logging.LogRecord) -> None:
        """Take note of what a record says about jobs; never raises."""
        try:
            self._note(record)
        except Exception:
            self.stop()

    def _note(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", None)
        if event is LogEvent.JOB_STARTED:
            for job in record.__dict__["jobs"]:
                self._tally.start(job)
        elif event is LogEvent.JOB_ERROR:
            self._tally.fail(record.__dict__["jobid"])
        elif event is LogEvent.JOB_FINISHED:
            self._tally.finish(record.__dict__["job_id"])
            if not self._draws and self._tally.clock() - self._said >= LINE_SECONDS:
                self._said = self._tally.clock()
                self._log.info(self._tally.line())

    def stop(self, last_line: bool = False) -> None:
        """End the display, and say how far the run came; may be called again."""
        if self not in self._log.handlers:
            return
        self._log.removeHandler(self)
        with contextlib.suppress(Exception):
            self._display.close()
            if last_line:
                for job in self._finished():
                    self._tally.finish(job)
                self._log.info(self._tally.line())

    def close(self) -> None:
        """Logging ends: however a run ends, the terminal is left in order."""
        self.stop()
        super().close()


class _AboveTheBars(io.TextIOBase):
    """A terminal's stream while bars are drawn on it: whole lines appear above them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pending = ""

    def write(self, text: str) -> int:
        lines, newline, self._pending = (self._pending + text).rpartition("\n")
        if newline:
            self._console.out(lines, highlight=False)
        return len(text)

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def _bars(stream: logging.StreamHandler, console: Console, table: Callable[[], Table]) -> Iterator[None]:
    """Draw a table below what Snakemake prints, renewed twice a second and gone at the end."""
    with Live(console=console, get_renderable=table, refresh_per_second=2, transient=True):
        console.show_cursor(True)  # should the run be killed, the terminal stays as it was
        original = stream.setStream(_AboveTheBars(console))
        try:
            yield
        finally:
            stream.setStream(original)


def show_progress(workflow: Any) -> ProgressHandler | None:
    """Show how far a run of Snakemake is, until `stop`. Called when jobs are about to run; shows nothing where nothing can be.

    Parameters
    ----------
    workflow
        Snakemake's, as the Snakefile knows it.
    """
    try:
        from snakemake.logging import logger  # type: ignore[import-untyped]

        if not workflow.is_main_process:
            return None
        order = [rule.name for rule in workflow.rules]
        jobs = [job for job in workflow.dag.needrun_jobs() if job.output]
        stages = {job.jobid: job.rule.name for job in sorted(jobs, key=lambda job: order.index(job.rule.name))}
        dag = workflow.dag
        quiet = {each.name for each in workflow.output_settings.quiet or ()} - {"REASON", "HOST"}  # which say nothing of progress
        handler = ProgressHandler(Tally(stages), logger, lambda: [job.jobid for job in dag.finished_jobs], draws=not quiet)
        logger.addHandler(handler)
        return handler
    except Exception as error:
        print(f"headgram: progress cannot be shown: {error}", file=sys.stderr)
        return None
