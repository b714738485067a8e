"""Faults in real runs, at random moments; `arena.py` says what must hold after each of them.

`make chaos` is the long form: every fault, at least fifty kills, and figures at the end. `test_chaos.py` is the short one.
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
from dataclasses import replace
from pathlib import Path

import psutil

from headgram.results.files import checksum
from pipeline.arena import MODEL, STAGES, UNREADABLE, Arena, Figures, copies, jobs_of, new_arena, servers, stage_of, wait_for
from pipeline.conftest import new_project
from pipeline.slurm_cluster import OPTIONS, missing, slurm_cluster
from tiny import write_llama

# ---------------------------------------------------------------------------------------------------------------- kills


def kill_snakemake(arena: Arena, run: subprocess.Popen) -> bool:
    """Its jobs live on, and write beside those of the next command."""
    run.kill()
    return True


def kill_job(arena: Arena, run: subprocess.Popen) -> bool:
    """Snakemake lives on, and says which job failed."""
    return _kill_one_of(arena, jobs_of(arena.project))


def kill_copy(arena: Arena, run: subprocess.Popen) -> bool:
    """As when memory runs out: the process that does a job's work is gone, the one that Snakemake waits for says so."""
    return _kill_one_of(arena, copies(run))


def kill_server(arena: Arena, run: subprocess.Popen) -> bool:
    """Jobs at work go on; later ones do without."""
    return _kill_one_of(arena, servers(run))


def kill_group(arena: Arena, run: subprocess.Popen) -> bool:
    """As when a terminal is closed by force."""
    with contextlib.suppress(ProcessLookupError):  # it may just have ended by itself
        os.killpg(run.pid, signal.SIGKILL)
        return True
    return False


def _kill_one_of(arena: Arena, processes: list[psutil.Process]) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):  # it may just have ended by itself
        arena.chance.choice(processes).kill()
        return True
    return False


KILLS = (kill_snakemake, kill_job, kill_copy, kill_server, kill_group)


def kill_at_random(arena: Arena, kill: Callable[[Arena, subprocess.Popen], bool]) -> bool:
    """Start a run, and kill some time after its first job began; what was finished before must still be.

    Returns whether the run was still at work then, and there was something to kill.
    """
    before = arena.sealed()
    run = arena.start()
    wait_for(lambda: jobs_of(arena.project), run)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(arena.chance.uniform(0, 4))
    struck = run.poll() is None and jobs_of(arena.project) != [] and kill(arena, run)
    arena.figures.faults += struck
    run.wait()
    assert {record: checksum(record) for record in before} == {record: state for record, (state, _) in before.items()}
    return struck


def random_kills(arena: Arena, count: int = len(KILLS)) -> None:
    """Kill one thing after the other, with the same command at once after each; start anew whenever a run came to its end."""
    arena.renew()
    kills = 0
    while kills < count:
        struck = kill_at_random(arena, KILLS[kills % len(KILLS)])
        kills += struck
        if not struck or arena.chance.random() < 0.2 or kills == count:
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


def dying_nodes(arena: Arena, count: int = 2) -> None:
    """On a real Slurm of two nodes: kill -9 of a slurmd and of all that it started, while a job is at work there."""
    for _ in range(count):
        arena.renew()
        with slurm_cluster() as cluster:
            run = arena.start("--profile", "profiles/slurm", *OPTIONS, **cluster.environment())
            node, earlier = arena.chance.choice(["n1", "n2"]), arena.chance.randrange(4)
            wait_for(lambda: len(cluster.jobs()) > earlier, run)  # noqa: B023
            wait_for(lambda: cluster.at_work(node), run)  # noqa: B023
            assert run.poll() is None, arena.said()
            cluster.kill_node(node)
            arena.figures.faults += 1
            assert run.wait() == 0, arena.said()
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
            victim = arena.chance.choice(sorted((arena.results / "models" / MODEL / "self" / "qk" / stage).glob(pattern)))
            later = ["provenance/**/*.json"] + (
                ["models/*/*/eigen/*.json", "models/*/*/gram/*.json"] if stage == "weights" else []
            )
            for record in (record for pattern in later for record in arena.results.glob(pattern)):
                record.unlink()
            arena.figures.faults += 1
            if damage:
                damage(victim, arena.chance)
            else:
                code, output = arena.run(**{UNREADABLE: victim.name})
                assert code != 0, output
                assert f"{victim.name} cannot be read (Input/output error); its record was removed" in output, output
            mended = victim.with_suffix(".json")
            arena.recover(lambda record: stage != "weights" and record != mended)  # noqa: B023


# ------------------------------------------------------------------------------------- other runs, other clocks, other files


def two_runs(arena: Arena, same_folder: Sequence[bool] = (True, False)) -> None:
    """Two snakemakes at once, in one folder and in two folders over one results folder: one works, the other says so."""
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = replace(arena.project, folder=new_project(Path(folder) / "elsewhere").folder)
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
        dying_nodes,
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
    parser.add_argument("--stand-in", action="store_true", help="on two pretended GPUs, which refuse what real ones refuse")
    arguments = parser.parse_args()
    total = Figures()
    with tempfile.TemporaryDirectory() as folder:
        arena = new_arena(Path(folder) / "project", arguments.seed, total, arguments.stand_in)
        for name in arguments.only or FAULTS:
            if FAULTS[name] is dying_nodes and missing():
                print(f"{name}: left out, for this machine lacks Slurm's {', '.join(missing())}")
                continue
            start = time.monotonic()
            if FAULTS[name] is random_kills:
                random_kills(arena, arguments.kills)
            else:
                FAULTS[name](arena)
            print(f"{name}: survived, {time.monotonic() - start:.0f} s; so far {total}", flush=True)
    print(f"seed {arguments.seed}: {total}")


if __name__ == "__main__":
    main()
