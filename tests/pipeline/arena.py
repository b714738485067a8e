"""Where faults strike: a project of one small model, the processes at work in it, and what must hold after each fault.

After a fault the same command is given again, at most twice: once to meet what the fault left, once to mend it. Then the tables
must be those of an undisturbed run, byte by byte, nothing that was finished may have been made again, and nothing half-written,
no lock that is held and no job to do may be left.
"""

import contextlib
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import filelock
import psutil

from headgram.errors import HeadgramError
from headgram.results.files import checksum
from headgram.results.record import read_record
from pipeline.conftest import WITH_STAND_IN, OnStandIn, Project, edit, new_project
from tiny import write_llama, write_manifest

STAGES = ("extract", "eigen", "gram", "merge", "derive")
MODEL = "tiny-llama"
#: In the environment of a run: the name of a file whose reading fails, as on a failing disk.
UNREADABLE = "CHAOSUNREADABLE"
_FAILING_READS = f"""
import errno, hashlib, os
_digest = hashlib.file_digest
def file_digest(file, *arguments):
    if os.environ.get("{UNREADABLE}") == os.path.basename(str(file.name)):
        raise OSError(errno.EIO, os.strerror(errno.EIO), file.name)
    return _digest(file, *arguments)
hashlib.file_digest = file_digest
"""

#: By record: its checksum, which changes if it is written anew, for it says when; and its files with theirs.
Sealed = dict[Path, tuple[str, dict[Path, str]]]


@dataclass
class Figures:
    """What a suite adds up to."""

    faults: int = 0
    finished: int = 0
    redone: int = 0
    lost: int = 0

    def __str__(self) -> str:
        return (
            f"faults injected {self.faults}, runs finished {self.finished}, finished jobs re-done {self.redone}, "
            f"bytes lost {self.lost}"
        )


@dataclass
class Arena:
    """A project of one small model that faults strike; `expected` are the tables of an undisturbed run of it."""

    project: Project
    expected: dict[str, bytes]
    chance: random.Random
    figures: Figures

    @property
    def results(self) -> Path:
        return self.project.folder / "results"

    @property
    def _output(self) -> Path:
        return self.project.folder / "output.txt"

    def start(self, *arguments: str, limit: int | None = None, **environment: str) -> subprocess.Popen:
        """A run in a process group of its own, whose files may not grow beyond `limit` bytes; `said` is its output."""
        self._output.unlink(missing_ok=True)  # jobs that outlive their snakemake go on writing to the old file
        limited = [] if limit is None else ["prlimit", f"--fsize={limit}"]
        with self._output.open("w") as output:
            return subprocess.Popen(
                [*limited, *self.project.command("--cores", "2", *arguments)],
                cwd=self.project.folder,
                env=self.project.environment() | environment,
                start_new_session=True,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        """What the last run wrote."""
        return self._output.read_text()

    def run(self, *arguments: str, limit: int | None = None, **environment: str) -> tuple[int, str]:
        """A run to its end: exit code and output."""
        run = self.start(*arguments, limit=limit, **environment)
        return run.wait(), self.said()

    def advance(self, *arguments: str) -> None:
        """A run that no fault disturbs."""
        code, output = self.run(*arguments)
        assert code == 0, output

    def sealed(self) -> Sealed:
        """Every finished artifact that no job can write again: none that is still at work is older than its record."""
        begun = min((job.create_time() for job in jobs_of(self.project)), default=float("inf"))
        found: Sealed = {}
        for record, (_, written) in self.project.records().items():
            with contextlib.suppress(HeadgramError):
                files = {record.parent / name: entry.blake2b for name, entry in read_record(record).files.items()}
                if written / 1e9 < begun:
                    found[record] = (checksum(record), files)
        return found

    def recover(self, spared: Callable[[Path], bool] = lambda record: True, **environment: str) -> None:
        """Give the same command until it succeeds, and hold what it left against the undisturbed run.

        `spared` says which of the finished artifacts the fault left whole.
        """
        before = {record: state for record, state in self.sealed().items() if spared(record)}
        code, output = self.run(**environment)
        if code:
            assert "headgram: " in output, output  # one sentence says what is wrong
            code, output = self.run(**environment)
        assert code == 0, output
        psutil.wait_procs(jobs_of(self.project), timeout=120)  # jobs that outlived their snakemake
        self._account(before)

    def _account(self, before: Sealed) -> None:
        self.figures.finished += 1
        after = self.sealed()
        redone = [record for record, (state, _) in before.items() if record not in after or after[record][0] != state]
        sums = {path: known for _, files in before.values() for path, known in files.items()}
        lost = [path for path, known in sums.items() if not path.exists() or checksum(path) != known]
        tables = self.project.tables()
        differing = [name for name in self.expected.keys() | tables.keys() if self.expected.get(name) != tables.get(name)]
        self.figures.redone += len(redone)
        self.figures.lost += sum(path.stat().st_size if path.exists() else 1 for path in lost)
        self.figures.lost += sum(len(self.expected.get(name, b"-")) for name in differing)
        assert (redone, lost, differing) == ([], [], []), (redone, lost, differing)
        leftovers = [path for path in self.results.rglob("*") if path.name.endswith(".tmp") or "-tile-" in path.name]
        assert not leftovers, leftovers
        with filelock.FileLock(self.results / ".lock", timeout=0):
            pass
        assert self.project.planned() == set()

    def renew(self) -> None:
        """Forget all results, so that there is work for the next fault."""
        shutil.rmtree(self.results, ignore_errors=True)
        shutil.rmtree(self.project.folder / ".snakemake", ignore_errors=True)


def new_arena(folder: Path, seed: int, figures: Figures, on_stand_in: bool = False) -> Arena:
    """A project of one model in seven or so jobs, run once without any disturbance."""
    project = new_project(folder)
    if on_stand_in:
        project = OnStandIn(folder)
    write_llama(folder / "models" / "llama")
    write_manifest(folder / "config" / "models.tsv", {MODEL: "models/llama"})
    edit(folder / "config" / "config.yaml", "layers_per_job: auto", "layers_per_job: 2")
    edit(folder / "config" / "config.yaml", "layers_per_tile: auto", "layers_per_tile: 2")
    pretended = (WITH_STAND_IN / "sitecustomize.py").read_text() if on_stand_in else ""
    (folder / "src" / "sitecustomize.py").write_text(pretended + _FAILING_READS)
    project.run()
    return Arena(project, project.tables(), random.Random(seed), figures)


def jobs_of(project: Project) -> list[psutil.Process]:
    """The processes that run a script of the pipeline in a project, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "python" not in process.name() or not _script(process) or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.cwd() == str(project.folder.resolve()):
                found.append(process)
    return found


def servers(run: subprocess.Popen) -> list[psutil.Process]:
    """The process that a run's jobs are copies of; none before it is started."""
    with contextlib.suppress(psutil.Error):
        return [child for child in psutil.Process(run.pid).children() if "headgram.run.forkserver" in child.cmdline()]
    return []


def copies(run: subprocess.Popen) -> list[psutil.Process]:
    """The copies of it that are at work."""
    with contextlib.suppress(psutil.Error):
        return [copy for server in servers(run) for copy in server.children() if copy.status() != psutil.STATUS_ZOMBIE]
    return []


def stage_of(job: psutil.Process) -> str:
    """The stage that a process of `jobs_of` runs."""
    with contextlib.suppress(psutil.Error):
        return Path(_script(job)).stem
    return ""


def _script(process: psutil.Process) -> str:
    """The script of the pipeline that a process was started for."""
    return next((part for part in process.cmdline() if Path(part).parent.name == "scripts"), "")


def wait_for(condition: Callable[[], object], run: subprocess.Popen) -> None:
    """Wait until something holds, or the run has ended."""
    while not condition() and run.poll() is None:
        time.sleep(0.02)
