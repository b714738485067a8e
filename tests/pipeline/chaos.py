"""Faults in real runs, at random moments, and what must hold after each of them.

`make chaos` is the long form: every fault, at least fifty kills, and figures at the end. `test_chaos.py` is the short one. After
a fault the same command is given again, at most twice: once to meet what the fault left, once to mend it. Then the tables must
be those of an undisturbed run, byte by byte, nothing that was finished may have been made again, and nothing half-written, no
lock that is held and no job to do may be left.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import psutil

from headgram.artifacts import checksum, read_record
from headgram.errors import HeadgramError
from pipeline.conftest import Project, edit, new_project
from tiny import write_llama, write_manifest

STAGES = ("extract", "eigen", "gram", "merge", "derive")
MODEL = "tiny-llama"
#: In the environment of a run: the name of a file whose reading fails, as on a failing disk.
_UNREADABLE = "CHAOS_UNREADABLE"
_FAILING_READS = f"""
import errno, hashlib, os
_digest = hashlib.file_digest
def file_digest(file, *arguments):
    if os.environ.get("{_UNREADABLE}") == os.path.basename(str(file.name)):
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
                files = {record.parent / name: entry["blake2b"] for name, entry in read_record(record)["files"].items()}
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
        assert (redone, lost, differing) == ([], [], [])
        leftovers = [path for path in self.results.rglob("*") if path.name.endswith(".tmp") or path.name.startswith("tile-")]
        assert leftovers == []
        with filelock.FileLock(self.results / ".lock", timeout=0):
            pass
        assert self.project.planned() == set()

    def renew(self) -> None:
        """Forget all results, so that there is work for the next fault."""
        shutil.rmtree(self.results, ignore_errors=True)
        shutil.rmtree(self.project.folder / ".snakemake", ignore_errors=True)


def new_arena(folder: Path, seed: int, figures: Figures) -> Arena:
    """A project of one model in seven or so jobs, run once without any disturbance."""
    project = new_project(folder)
    write_llama(folder / "models" / "llama")
    write_manifest(folder / "config" / "models.tsv", {MODEL: "models/llama"})
    edit(folder / "config" / "config.yaml", "layers_per_job: auto", "layers_per_job: 2")
    edit(folder / "config" / "config.yaml", "layers_per_tile: auto", "layers_per_tile: 2")
    (folder / "src" / "sitecustomize.py").write_text(_FAILING_READS)
    project.run()
    return Arena(project, project.tables(), random.Random(seed), figures)


def jobs_of(project: Project) -> list[psutil.Process]:
    """The processes that run a script of the pipeline in a project, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            runs_script = "python" in process.name() and any("/.snakemake/scripts/" in part for part in process.cmdline())
            if runs_script and process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(project.folder.resolve()):
                found.append(process)
    return found


def stage_of(job: psutil.Process) -> str:
    """The stage that a process of `jobs_of` runs: its script is called `tmpXXXX.STAGE.py`."""
    with contextlib.suppress(psutil.Error):
        return next((Path(part).suffixes[-2][1:] for part in job.cmdline() if "/.snakemake/scripts/" in part), "")
    return ""


def wait_for(condition: Callable[[], object], run: subprocess.Popen) -> None:
    """Wait until something holds, or the run has ended."""
    while not condition() and run.poll() is None:
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------------------------- kills


def kill_snakemake(arena: Arena, run: subprocess.Popen) -> None:
    """Its jobs live on, and write beside those of the next command."""
    run.kill()


def kill_job(arena: Arena, run: subprocess.Popen) -> None:
    """Snakemake lives on, and says which job failed."""
    if jobs := jobs_of(arena.project):
        with contextlib.suppress(psutil.NoSuchProcess):
            arena.chance.choice(jobs).kill()


def kill_group(arena: Arena, run: subprocess.Popen) -> None:
    """As when a terminal is closed by force."""
    with contextlib.suppress(ProcessLookupError):  # it may just have ended by itself
        os.killpg(run.pid, signal.SIGKILL)


KILLS = (kill_snakemake, kill_job, kill_group)


def kill_at_random(arena: Arena, kill: Callable[[Arena, subprocess.Popen], None]) -> bool:
    """Start a run, and kill some time after its first job began; what was finished before must still be.

    Returns whether the run was still at work then.
    """
    before = arena.sealed()
    run = arena.start()
    wait_for(lambda: jobs_of(arena.project), run)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(arena.chance.uniform(0, 8))
    at_work = run.poll() is None and jobs_of(arena.project) != []
    if at_work:
        kill(arena, run)
        arena.figures.faults += 1
    run.wait()
    assert {record: checksum(record) for record in before} == {record: state for record, (state, _) in before.items()}
    return at_work


def random_kills(arena: Arena, count: int = len(KILLS)) -> None:
    """Kill one thing after the other, with the same command at once after each; start anew whenever a run came to its end."""
    arena.renew()
    struck = 0
    while struck < count:
        at_work = kill_at_random(arena, KILLS[struck % len(KILLS)])
        struck += at_work
        if not at_work or arena.chance.random() < 0.2 or struck == count:
            arena.recover()
            arena.renew()


def orphans(arena: Arena, stages: tuple[str, ...] = STAGES) -> None:
    """Snakemake alone dies while a job of each stage is at work; the same command is given while that job still writes."""
    arena.renew()
    for stage in stages:
        run = arena.start()
        begun = time.time()

        def at_work(stage: str = stage, begun: float = begun) -> bool:
            return any(stage_of(job) == stage and job.create_time() > begun for job in jobs_of(arena.project))

        wait_for(at_work, run)
        run.kill()
        arena.figures.faults += 1
        run.wait()
    arena.recover()


def a_lease_holder_that_dies(arena: Arena) -> None:
    """A job that holds a GPU's lease is killed; the device is free at once for the next one."""
    arena.renew()
    with tempfile.TemporaryDirectory() as folder:
        one_gpu = {"CUDA_VISIBLE_DEVICES": "0", "TMPDIR": folder}
        run = arena.start(**one_gpu)
        wait_for(lambda: "eigen" in map(stage_of, jobs_of(arena.project)) and list(Path(folder).rglob("gpu-0.lock")), run)
        holders = [job for job in jobs_of(arena.project) if stage_of(job) in ("eigen", "gram")]
        for holder in holders:
            with contextlib.suppress(psutil.NoSuchProcess):
                holder.kill()
        arena.figures.faults += 1
        assert holders != []
        run.wait()
        arena.recover(**one_gpu)


# ----------------------------------------------------------------------------------------------------------------- disks


def full_disk(arena: Arena, stages: tuple[str, ...] = STAGES) -> None:
    """The disk has room for a few pages more, in one stage after the other; where none can be mounted, files may not grow."""
    arena.renew()
    with small_disk(arena.results) as mounted:
        for stage in stages if mounted else set(stages) - {"gram"}:  # a Gram row of so small a model is below any limit
            if earlier := STAGES[: STAGES.index(stage)]:
                arena.advance("--until", *earlier)
            with filled(arena.results) if mounted else contextlib.nullcontext():
                arena.figures.faults += 1
                code, output = arena.run(limit=None if mounted else 16384)
            assert code != 0
            # A job says that the disk is full; Snakemake, which writes its scripts, says it in the system's words.
            words = ("the disk is full; free some space", "No space left on device") if mounted else ("File too large",)
            assert any(sentence in output for sentence in words), output
            assert not list(arena.results.rglob(".*.tmp"))
        arena.recover()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a disk of 4 MiB at a folder; yields whether that is allowed here."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Leave four pages free."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"-" * 4096):
            pass
    os.truncate(filler, filler.stat().st_size - 4 * 4096)
    try:
        yield
    finally:
        filler.unlink()


def read_only_results(arena: Arena) -> None:
    """The folder may not be written; root, too, is held to that."""
    arena.renew()
    arena.advance("--until", "extract")
    folders = [arena.results, *(path for path in arena.results.rglob("*") if path.is_dir())]
    modes = {folder: folder.stat().st_mode for folder in folders}
    before = arena.sealed()
    for folder in folders:
        folder.chmod(0o555)
    arena.figures.faults += 1
    obedient = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    done = subprocess.run(
        [*obedient, *arena.project.command("--cores", "2")],
        cwd=arena.project.folder,
        env=arena.project.environment(),
        capture_output=True,
        text=True,
    )
    for folder, mode in modes.items():
        folder.chmod(mode)
    assert done.returncode != 0
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("headgram: ")]
    assert "cannot be written" in sentence
    assert "Permission denied" in sentence
    assert arena.sealed() == before
    arena.recover()


# ----------------------------------------------------------------------------------------------------------- the cache


Damage = Callable[[Path, random.Random], None] | None


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


CACHE = (("weights", "*.pt"), ("eigen", "*.pt"), ("eigen", "*.parquet"), ("gram", "*.parquet"))


def damaged_cache(
    arena: Arena, files: Sequence[tuple[str, str]] = CACHE, damages: Sequence[Damage] = (truncate, flip, None)
) -> None:
    """A cached file is cut short, has a bit flipped, or cannot be read (None), when the next stage needs it."""
    if not arena.sealed():
        arena.advance()
    for stage, pattern in files:
        for damage in damages:
            victim = arena.chance.choice(sorted((arena.results / "models" / MODEL / "self" / stage).glob(pattern)))
            later = ["provenance/**/*.json"] + (
                ["models/*/*/eigen/*.json", "models/*/*/gram/*.json"] if stage == "weights" else []
            )
            for record in (record for pattern in later for record in arena.results.glob(pattern)):
                record.unlink()
            arena.figures.faults += 1
            if damage:
                damage(victim, arena.chance)
            else:
                code, output = arena.run(**{_UNREADABLE: victim.name})
                assert code != 0
                assert f"{victim.name} cannot be read (Input/output error); its record was removed" in output, output
            mended = victim.with_suffix(".json")
            arena.recover(lambda record: stage != "weights" and record != mended)  # noqa: B023


# ------------------------------------------------------------------------------------- other runs, other clocks, other files


def two_runs(arena: Arena, same_folder: Sequence[bool] = (True, False)) -> None:
    """Two snakemakes at once, in one folder and in two folders over one results folder: one works, the other says so."""
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = new_project(Path(folder) / "elsewhere")
        for name in ("models", "config"):
            shutil.copytree(arena.project.folder / name, elsewhere.folder / name, dirs_exist_ok=True)
        for other in (arena.project if same else elsewhere for same in same_folder):
            arena.renew()
            arena.figures.faults += 1
            command = other.command("--cores", "1", "--config", f"results={arena.results}")
            first = arena.start()
            second = subprocess.run(command, cwd=other.folder, env=other.environment(), capture_output=True, text=True)
            first.wait()
            output = arena.said()
            assert sorted((first.returncode, second.returncode)) == [0, 1], output + second.stderr
            assert f"Another run works on {arena.results if second.returncode else 'results'}" in output + second.stderr
            arena.recover()


def clock_set_back(arena: Arena) -> None:
    """Whatever a stage finished is dated a year ahead, so that all later files are older than what they were made from."""
    arena.renew()
    for stage in STAGES[:-1]:
        arena.advance("--until", stage)
        for path in (arena.results / "models").rglob("*"):
            os.utime(path, (time.time() + 365 * 86400,) * 2)
        arena.figures.faults += 1
    arena.recover()


def lost_memory(arena: Arena) -> None:
    """`.snakemake` is lost after each stage, and after the last."""
    arena.renew()
    for stage in STAGES:
        arena.advance("--until", stage)
        shutil.rmtree(arena.project.folder / ".snakemake")
        arena.figures.faults += 1
    arena.recover()


def replaced_checkpoint(arena: Arena) -> None:
    """Other weights of the same shapes replace the checkpoint while it is extracted; it is refused until it is restored."""
    arena.renew()
    folder = arena.project.folder / "models" / "llama"
    path, kept = folder / "model.safetensors", folder.with_name("kept")
    shutil.copytree(folder, kept)
    write_llama(folder.with_name("other"), seed=1)
    run = arena.start()
    wait_for(lambda: jobs_of(arena.project), run)
    (folder.with_name("other") / path.name).replace(path)
    arena.figures.faults += 1
    assert run.wait() != 0
    assert "changed since it was locked" in arena.said(), arena.said()
    assert not list((arena.results / "models").rglob("*.json"))
    code, output = arena.run()
    assert code != 0
    assert "changed since it was locked" in output, output
    (kept / path.name).replace(path)
    shutil.rmtree(kept)
    shutil.rmtree(folder.with_name("other"))
    arena.recover()


FAULTS: Mapping[str, Callable[[Arena], None]] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        random_kills,
        orphans,
        a_lease_holder_that_dies,
        full_disk,
        read_only_results,
        damaged_cache,
        two_runs,
        clock_set_back,
        lost_memory,
        replaced_checkpoint,
    )
}


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser(description="Faults in real runs; every one must be survived.")
    parser.add_argument("--kills", type=int, default=51)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FAULTS, action="append")
    arguments = parser.parse_args()
    total = Figures()
    with tempfile.TemporaryDirectory() as folder:
        arena = new_arena(Path(folder) / "project", arguments.seed, total)
        for name in arguments.only or FAULTS:
            start = time.monotonic()
            if FAULTS[name] is random_kills:
                random_kills(arena, arguments.kills)
            else:
                FAULTS[name](arena)
            print(f"{name}: survived, {time.monotonic() - start:.0f} s; so far {total}", flush=True)
    print(f"seed {arguments.seed}: {total}")


if __name__ == "__main__":
    main()
