"""How far a run is, told by a clock of our own."""

import logging

import pytest
from rich.console import Console
from snakemake_interface_logger_plugins.common import LogEvent

from headgram.run.progress import LINE_SECONDS, ProgressHandler, Tally


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_time_left_follows_from_what_jobs_took(clock):
    """Two at a time: four of 10 s; then two of 30 s, of which nothing is known at first but the average."""
    tally = Tally({1: "eigen", 2: "eigen", 3: "eigen", 4: "eigen", 5: "merge", 6: "merge"}, clock)
    assert tally.left(tally.whole) is None
    for pair in ((1, 2), (3, 4)):
        for job in pair:
            tally.start(job)
        clock.now += 10
        for job in pair:
            tally.finish(job)
    assert tally.per_minute(tally.stages["eigen"]) == pytest.approx(12)
    assert tally.left(tally.whole) == pytest.approx(10)
    tally.start(5)
    tally.start(6)
    clock.now += 4
    assert tally.left(tally.whole) == pytest.approx(6)
    assert tally.line() == ("headgram: 4 of 6 jobs in 24 s (merge 0/2), 10 per minute, about 6 s left")
    clock.now += 26
    tally.finish(5)
    assert tally.left(tally.stages["merge"]) == pytest.approx(0)
    tally.finish(6)
    assert tally.line() == "headgram: 6 of 6 jobs in 50 s"


def test_failed_jobs_are_told_and_not_waited_for(clock):
    tally = Tally({1: "extract", 2: "extract", 3: "eigen"}, clock)
    tally.start(1)
    tally.start(2)
    clock.now += 100
    tally.finish(1)
    tally.fail(2)
    assert ", 1 failed, " in tally.line()
    assert tally.left(tally.whole) == pytest.approx(100 / 2)
    tally.start(2)  # tried again
    assert "failed" not in tally.line()
    clock.now += 100
    tally.finish(2)
    tally.start(4)  # not one of ours
    tally.finish(4)
    assert tally.whole.done == 2


def test_bars_say_the_same(clock):
    tally = Tally({1: "extract", 2: "eigen"}, clock)
    tally.start(1)
    clock.now += 120
    tally.finish(1)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(tally.table())
    rows = [line.replace("━", "").split() for line in captured.get().splitlines()]
    assert rows == [
        ["extract", "1/1", "0.5/min"],
        ["eigen", "0/1", "2", "min", "left"],
        ["all", "stages", "1/2", "0.5/min", "2", "min", "left"],
    ]


def test_without_a_terminal_a_line_comes_now_and_then(clock, caplog):
    log = logging.Logger("run", logging.INFO)
    log.addHandler(caplog.handler)
    handler = ProgressHandler(Tally(dict.fromkeys(range(10), "eigen"), clock), log, finished=list)
    log.addHandler(handler)
    for job in range(10):
        log.info("", extra={"event": LogEvent.JOB_STARTED, "jobs": [job]})
        clock.now += LINE_SECONDS / 3
        log.info("", extra={"event": LogEvent.JOB_FINISHED, "job_id": job})
    handler.stop(last_line=True)
    handler.stop(last_line=True)
    said = [record.message for record in caplog.records if record.message]
    assert [line.split(" jobs")[0] for line in said] == [f"headgram: {done} of 10" for done in (3, 6, 9, 10)]


def test_what_goes_wrong_ends_the_display_only(clock):
    log = logging.Logger("run", logging.INFO)
    handler = ProgressHandler(Tally({1: "eigen"}, clock), log, finished=list)
    log.addHandler(handler)
    log.info("", extra={"event": LogEvent.JOB_STARTED})  # says nothing about jobs
    assert log.handlers == []
